"""`dti score`: a file of requests in, a file of probabilities out; in bounded memory, and it goes on after a kill.

Input, JSON lines or Parquet (`history` then as a list of structs `item, label`):

    {"user": "5", "candidates": ["50", "172"]}                          a user of the prepared data, with the stored history
    {"history": [["50", 1], ["172", 0]], "candidates": ["181", {"title": "Brazil (1985)", "genres": ["Sci-Fi"]}]}

Output, JSON lines or Parquet, one record per input line, in their order:

    {"line": 1, "user": "5", "probabilities": [0.71, 0.42]}             in the order of the candidates
    {"line": 2, "user": null, "error": "candidates[0]: no item with id '9999' ..."}

Blank lines at the end of the input are no requests. Finished chunks of lines are kept in OUTPUT.partial; OUTPUT appears when all is
done. Chunks are the same in every run, so a run that was killed and started again writes the same bytes as an unbroken one.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from tqdm.auto import tqdm

from dti_model.config import why_owned
from dti_model.data import ENCODING_VERSION
from dti_model.files import locked
from dti_model.scorer.items import ItemError
from dti_model.scorer.job import Job
from dti_model.scorer.lines import (
    InputChangedError,
    InputFile,
    Line,
    fields_of,
    is_parquet,
    request_of,
    user_of,
)
from dti_model.scorer.requests import Request
from dti_model.scorer.scorer import Scorer
from dti_model.shown import one_line

CHUNK_LINES = 64
SHOWN = 5  # bad lines that are printed
DIGITS = 9  # of a probability, beyond float32's


class BadLineError(ValueError):
    """A line of the input that cannot be scored, where bad lines are fatal."""


@dataclass(frozen=True)
class FileScores:
    """Outcome of a call of `score_file`.

    Attributes:
        lines: of the input.
        resumed: lines that an earlier, killed call had done.
        bad: lines that got an error instead of probabilities.
        first_bad: `line N: why` of the first few.
    """

    lines: int
    resumed: int
    bad: int
    first_bad: list[str]


def score_file(
    scorer: Scorer, source: Path, output: Path, skip_bad_lines: bool, progress: bool
) -> FileScores:
    """Score every request of a file (see the module docstring for the formats).

    Args:
        scorer: of a run or an export.
        source: `.jsonl` or `.parquet`.
        output: `.jsonl` or `.parquet`, not there yet.
        skip_bad_lines: write an error in the place of a bad line's probabilities; False: stop at the first.
        progress: show a progress bar.

    Raises:
        BadLineError: a bad line, named by number, where they are not skipped; what was scored before it is kept for a next call.
        DamagedFileError: OUTPUT.job is damaged. (A damaged OUTPUT.partial is computed anew from there.)
        FileExistsError: the output is there, or comes meanwhile; or OUTPUT.partial or OUTPUT.job is of another job or somebody's own.
        FileNotFoundError: there is no such input.
        InputChangedError: the input changes meanwhile.
        LockedError: another process makes this output.
        ValueError: a file is no regular one, or its suffix says neither JSON lines nor Parquet.
        WriteError: the disk is full; what was scored is kept.
    """
    output = _checked_output(source, output)
    lock = output.with_name(f".{output.name}.lock")
    with locked(lock, "dti score", output), InputFile(source) as requests:
        job = Job(output, _identity(scorer, requests), skip_bad_lines)
        if job.is_finished():
            return _summary(output, requests.num_lines, requests.num_lines)
        done = job.resume()
        with tqdm(
            total=requests.num_lines, initial=done, desc="scoring", unit="line", disable=not progress
        ) as bar:
            lines = requests.lines(after=done)
            while chunk := list(itertools.islice(lines, CHUNK_LINES)):
                records = _scored(scorer, chunk, skip_bad_lines, requests)
                requests.check_stamp()
                job.append(records)
                bar.update(len(chunk))
        requests.check_stamp()
        if not requests.has_same_content():
            job.drop()
            raise InputChangedError(
                f"{one_line(source)} changed while it was being scored. Nothing that was scored is kept: give the same command again"
            )
        job.publish(requests.num_lines)
        return _summary(output, requests.num_lines, done)


def _checked_output(source: Path, output: Path) -> Path:
    """The output with links resolved; an existing one is left to the job."""
    try:
        output.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise ValueError(
            f"{one_line(output)} cannot be made ({error.strerror}): choose another --output"
        ) from None
    if source.exists() and output.exists() and source.samefile(output):
        raise ValueError(f"{one_line(output)} is the input itself: choose another --output")
    if output.is_dir():
        raise ValueError(f"{one_line(output)} is a folder: give the name of a file to make in it")
    if output.exists() and not output.is_file():
        raise ValueError(
            f"{one_line(output)} is no regular file: the output is written beside its name and renamed when complete, so give a file"
        )
    if output.parent.exists() and not output.parent.is_dir():
        raise ValueError(
            f"{one_line(output.parent)} is a file, so there is no folder for {one_line(output.name)}"
        )
    for path in (source, output):
        is_parquet(path)
    owned = why_owned(output)
    if owned is not None:
        raise ValueError(f"{one_line(output)} {owned}")
    return Path(os.path.realpath(output))


def _scored(
    scorer: Scorer, chunk: list[tuple[int, Line]], skip_bad_lines: bool, source: InputFile
) -> list[dict[str, Any]]:
    """The output records of some input lines."""
    records: list[dict[str, Any]] = []
    requests: list[Request] = []
    for number, line in chunk:
        record: dict[str, Any] = {"line": number, "user": None}
        try:
            fields = fields_of(line)
            record["user"] = user_of(fields)
            requests.append(request_of(scorer, fields))
            record["probabilities"] = None
        except ItemError as error:
            if not skip_bad_lines:
                source.check_stamp()  # half a line, where the file is being written
                raise BadLineError(
                    f"{one_line(source.path)}:{number}: {error}. Lines before it are kept: go on past bad lines with --bad-lines skip"
                ) from None
            record["error"] = str(error)
        records.append(record)
    scores = iter(scorer.score_many(requests))
    for record in records:
        if "error" not in record:
            record["probabilities"] = [round(p, DIGITS) for p in next(scores).tolist()]
            if not all(map(math.isfinite, record["probabilities"])):
                raise ValueError(
                    f"{one_line(source.path)}:{record['line']}: the model's probabilities are not finite numbers: its weights are broken"
                )
    return records


def _identity(scorer: Scorer, source: InputFile) -> dict[str, Any]:
    """All that decides the output, by the names that an error gives it."""
    model = scorer.click_model
    return {
        "input": source.facts,
        **model.fingerprints(),
        "dti settings": asdict(model.dti),
        "prompt format": asdict(model.prompt),
        "encoding of item texts": ENCODING_VERSION,
        "item text template": None if model.item_text is None else dict(model.item_text),
        "calibration": None if model.calibration is None else asdict(model.calibration),
        "token budget": scorer.token_budget,
        "device": model.model.device.type
        + (" in bfloat16" if scorer.precision == "bf16" else "")
        + (" through CUDA graphs" if scorer.uses_graphs else ""),  # their padding rounds otherwise
        "chunk size": CHUNK_LINES,
    }


def _summary(output: Path, num_lines: int, resumed: int) -> FileScores:
    bad, first_bad = 0, []
    for record in _records(output):
        if record.get("error") is not None:
            bad += 1
            if bad <= SHOWN:
                first_bad.append(f"line {record['line']}: {record['error']}")
    return FileScores(num_lines, resumed, bad, first_bad)


def _records(output: Path) -> Iterator[dict[str, Any]]:
    if is_parquet(output):
        for batch in pq.ParquetFile(output).iter_batches(columns=["line", "error"]):
            yield from batch.to_pylist()
    else:
        with output.open("rb") as file:
            yield from map(json.loads, file)
