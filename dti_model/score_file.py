"""`dti score`: a file of requests in, a file of probabilities out; in bounded memory, and it goes on after a kill.

Input, JSON lines or Parquet (`history` then as a list of structs `item, label`):

    {"user": "5", "candidates": ["50", "172"]}                          a user of the prepared data, with the stored history
    {"history": [["50", 1], ["172", 0]], "candidates": ["181", {"title": "Brazil (1985)", "genres": ["Sci-Fi"]}]}

Output, JSON lines or Parquet, one record per input line, in their order:

    {"line": 1, "user": "5", "probabilities": [0.71, 0.42]}             in the order of the candidates
    {"line": 2, "user": null, "error": "candidates[0]: no item with id '9999' ..."}

Finished chunks of lines stand in OUTPUT.partial; OUTPUT appears when all is done. Chunks are the same in every run, so a run that
was killed and started again writes the same bytes as an unbroken one.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from dti_model.items import ItemError
from dti_model.run import MODEL_FOLDER, write_json
from dti_model.scorer import Request, Scorer

CHUNK_LINES = 64
SHOWN = 5  # bad lines that are printed
DIGITS = 9  # of a probability, beyond float32's
JSON_SUFFIXES, PARQUET_SUFFIXES = (".jsonl", ".json", ".ndjson"), (".parquet", ".pq")
FIELDS = {"user", "history", "candidates"}
OUTPUT_SCHEMA = pa.schema(
    {"line": pa.int64(), "user": pa.string(), "probabilities": pa.list_(pa.float64()), "error": pa.string()}
)


class BadLineError(ValueError):
    """A line of the input that cannot be scored, where bad lines are fatal."""


@dataclass(frozen=True)
class FileScores:
    """What a call of `score_file` did.

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
    scorer: Scorer, run: Path, source: Path, output: Path, skip_bad_lines: bool, progress: bool
) -> FileScores:
    """Score every request of a file (see the module docstring for the formats).

    Args:
        scorer: of the run.
        run: its folder, to recognise an interrupted job.
        source: `.jsonl` or `.parquet`.
        output: `.jsonl` or `.parquet`, not there yet.
        skip_bad_lines: write an error in the place of a bad line's probabilities; False: stop at the first.
        progress: show a progress bar.

    Raises:
        BadLineError: a bad line, named by number, where they are not skipped; what was scored before it is kept for a next call.
        FileExistsError: the output is there, or OUTPUT.partial belongs to another job.
        FileNotFoundError: there is no such input.
        ValueError: the suffix of a file says neither JSON lines nor Parquet.
    """
    for path in (source, output):
        _is_parquet(path)
    if not source.is_file():
        raise FileNotFoundError(f"{source} does not exist")
    if output.exists():
        raise FileExistsError(f"{output} exists: choose another --output, or delete it")
    partial = output.with_name(output.name + ".partial")
    job = output.with_name(output.name + ".job")
    done = _resume(partial, job, _identity(run, source, scorer))
    total = _num_lines(source)
    with (
        partial.open("ab") as file,
        tqdm(total=total, initial=done, desc="scoring", unit="line", disable=not progress) as bar,
    ):
        lines = itertools.islice(enumerate(_lines(source), 1), done, None)
        while chunk := list(itertools.islice(lines, CHUNK_LINES)):
            records = _scored(scorer, chunk, skip_bad_lines, source)
            file.write(b"".join(json.dumps(record).encode() + b"\n" for record in records))
            file.flush()
            bar.update(len(chunk))
    bad, first_bad = 0, []
    for record in _records(partial):
        if "error" in record:
            bad += 1
            if bad <= SHOWN:
                first_bad.append(f"line {record['line']}: {record['error']}")
    _finish(partial, output)
    job.unlink()
    return FileScores(total, done, bad, first_bad)


def _scored(
    scorer: Scorer, chunk: list[tuple[int, Any]], skip_bad_lines: bool, source: Path
) -> list[dict[str, Any]]:
    """The output records of some input lines."""
    records: list[dict[str, Any]] = []
    requests: list[Request] = []
    for number, line in chunk:
        record: dict[str, Any] = {"line": number, "user": None}
        try:
            fields = _fields(line)
            record["user"] = None if fields.get("user") is None else str(fields["user"])
            requests.append(_request(scorer, fields))
            record["probabilities"] = None
        except ItemError as error:
            if not skip_bad_lines:
                raise BadLineError(
                    f"{source}:{number}: {error}. Lines before it are kept: go on past bad lines with --bad-lines skip"
                ) from None
            record["error"] = str(error)
        records.append(record)
    scores = iter(scorer.score_many(requests))
    for record in records:
        if "error" not in record:
            record["probabilities"] = [round(p, DIGITS) for p in next(scores).tolist()]
    return records


def _fields(line: bytes | Mapping[str, Any]) -> Mapping[str, Any]:
    """A line's fields; those that are null are absent."""
    if isinstance(line, bytes):
        try:
            line = json.loads(line)
        except ValueError as error:
            raise ItemError(f"not valid JSON ({error})") from None
    if not isinstance(line, Mapping):
        raise ItemError(f"a line must be an object with {', '.join(sorted(FIELDS))}, got {line!r}")
    fields: Mapping[str, Any] = _without_nulls(line)
    if unknown := fields.keys() - FIELDS:
        raise ItemError(f"unknown field {sorted(unknown)[0]!r}: a line has {', '.join(sorted(FIELDS))}")
    return fields


def _without_nulls(value: Any) -> Any:
    """Parquet structs name every field, in every row."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(x) for key, x in value.items() if x is not None}
    return [_without_nulls(x) for x in value] if isinstance(value, list) else value


def _request(scorer: Scorer, fields: Mapping[str, Any]) -> Request:
    if "candidates" not in fields:
        raise ItemError("no candidates: give a list of items")
    if "history" not in fields and "user" not in fields:
        raise ItemError("neither a history nor a user of the prepared data")
    history = fields["history"] if "history" in fields else scorer.history_of(fields["user"])
    if isinstance(history, list):
        history = [
            (entry["item"], entry["label"])
            if isinstance(entry, Mapping) and entry.keys() == {"item", "label"}
            else entry
            for entry in history
        ]
    return scorer.request(history, fields["candidates"])


def _identity(run: Path, source: Path, scorer: Scorer) -> dict[str, Any]:
    """What decides the output: another input, run, prepared folder or token budget is another job."""

    def stamp(path: Path) -> list[int]:
        return [path.stat().st_size, path.stat().st_mtime_ns]

    weights = sorted((run / MODEL_FOLDER).glob("*.safetensors"))
    return {
        "input": [str(source.resolve()), *stamp(source)],
        "run": [str(run.resolve()), [[path.name, *stamp(path)] for path in weights]],
        "data": str(scorer.run.data.path.resolve()),
        "token_budget": scorer.token_budget,
        "chunk_lines": CHUNK_LINES,
    }


def _resume(partial: Path, job: Path, identity: dict[str, Any]) -> int:
    """Lines that are done: whole chunks of a killed call; what follows them is cut off."""
    if not (job.exists() and partial.exists()):
        if partial.exists():
            raise FileExistsError(f"{partial} exists without {job.name}: delete it to start anew")
        write_json(job, identity)
        partial.touch()
        return 0
    if json.loads(job.read_text()) != identity:
        raise FileExistsError(
            f"{partial} belongs to a job with another input, run, data or token budget (see {job.name}): "
            "delete both to start anew, or choose another --output"
        )
    done, kept, position = 0, 0, 0
    with partial.open("rb+") as file:
        for number, line in enumerate(file, 1):
            position += len(line)
            if line.endswith(b"\n") and number % CHUNK_LINES == 0:
                done, kept = number, position
        file.truncate(kept)
    return done


def _finish(partial: Path, output: Path) -> None:
    """`partial` becomes `output`, which appears complete or not at all."""
    if not _is_parquet(output):
        os.replace(partial, output)
        return
    temporary = output.with_name(output.name + ".tmp")
    records = _records(partial)
    with pq.ParquetWriter(temporary, OUTPUT_SCHEMA) as writer:
        while group := list(itertools.islice(records, 16 * CHUNK_LINES)):
            writer.write_table(pa.Table.from_pylist(group, OUTPUT_SCHEMA))
    os.replace(temporary, output)
    partial.unlink()


def _records(partial: Path) -> Iterator[dict[str, Any]]:
    with partial.open("rb") as file:
        for line in file:
            yield json.loads(line)


def _is_parquet(path: Path) -> bool:
    if path.suffix in PARQUET_SUFFIXES:
        return True
    if path.suffix in JSON_SUFFIXES:
        return False
    raise ValueError(
        f"{path}: the name must end in one of {', '.join(JSON_SUFFIXES + PARQUET_SUFFIXES)}, "
        f"got {path.suffix or 'no suffix'}"
    )


def _lines(source: Path) -> Iterator[bytes | dict[str, Any]]:
    """Lines of a JSON file as bytes, rows of a Parquet file as dicts."""
    if _is_parquet(source):
        for batch in pq.ParquetFile(source).iter_batches(batch_size=CHUNK_LINES):
            yield from batch.to_pylist()
    else:
        with source.open("rb") as file:
            yield from file


def _num_lines(source: Path) -> int:
    if _is_parquet(source):
        num_rows: int = pq.ParquetFile(source).metadata.num_rows
        return num_rows
    with source.open("rb") as file:
        return sum(1 for _ in file)
