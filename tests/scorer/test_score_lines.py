"""The input of `dti score`: files that change while they are read, paths that are no files, lines that used to stick a job."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from dti_model.cli import main
from dti_model.model.run import Run
from dti_model.scorer import Scorer
from dti_model.scorer import file as module
from dti_model.scorer import lines as score_lines
from dti_model.scorer.file import CHUNK_LINES
from dti_model.scorer.items import ItemError
from dti_model.scorer.lines import InputChangedError, InputFile, fields_of, request_of, user_of
from tests.scorer.scoring_jobs import (
    meanwhile,
    score,
)

CHANGES: dict[str, Callable[[Path], object]] = {
    "grows": lambda path: path.open("a").write('{"user": "1", "candidates": ["1"]}\n'),
    "shrinks": lambda path: os.truncate(path, path.stat().st_size // 2),
    "is replaced": lambda path: (path.with_name("new").write_text("x"), path.with_name("new").replace(path)),
    "is removed": lambda path: path.unlink(),
    "is written to in place": lambda path: path.open("r+").write(" "),
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_input_that_changes_meanwhile(
    run_scorer: Scorer, requests_file: Path, whole_scores: bytes, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """The output was made of two inputs, or ended early, and nobody was told."""
    output, content = requests_file.with_name("out.jsonl"), requests_file.read_bytes()
    meanwhile(monkeypatch, 2, lambda: CHANGES[change](requests_file))
    with pytest.raises(
        InputChangedError,
        match=r"in.jsonl changed while it was being scored\. Earlier scores are kept",
    ):
        score(run_scorer, requests_file, output)
    assert not output.exists()
    if change in ("grows", "shrinks"):
        with pytest.raises(
            FileExistsError, match="belongs to a job with another input: delete it and out.jsonl.job"
        ):
            score(run_scorer, requests_file, output)
    monkeypatch.undo()
    requests_file.write_bytes(content)
    assert score(run_scorer, requests_file, output).resumed == CHUNK_LINES
    assert output.read_bytes() == whole_scores


def test_an_input_that_changes_behind_its_time_of_change(
    run_scorer: Scorer, requests_file: Path, whole_scores: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, content, status = (
        requests_file.with_name("out.jsonl"),
        requests_file.read_bytes(),
        requests_file.stat(),
    )

    def rewrite() -> None:
        place = content.rindex(b", 0]")  # a label of a later chunk
        requests_file.write_bytes(content[:place] + b", 1]" + content[place + 4 :])
        os.utime(requests_file, ns=(status.st_atime_ns, status.st_mtime_ns))

    meanwhile(monkeypatch, 1, rewrite)
    with pytest.raises(InputChangedError, match="Nothing that was scored is kept"):
        score(run_scorer, requests_file, output)
    assert {path.name for path in requests_file.parent.iterdir()} == {"in.jsonl"}
    requests_file.write_bytes(content)
    assert score(run_scorer, requests_file, output).resumed == 0
    assert output.read_bytes() == whole_scores


def test_a_bad_line_of_a_growing_input_is_no_bad_line(
    run_scorer: Scorer, requests_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the last line was there when it was read."""
    with requests_file.open("a") as file:
        file.write('{"user": "1", "cand')
    original = module.fields_of

    def grown(line: Any) -> Any:
        if b"cand" in line[-5:]:
            CHANGES["grows"](requests_file)
        return original(line)

    monkeypatch.setattr(module, "fields_of", grown)
    with pytest.raises(InputChangedError):
        score(run_scorer, requests_file, requests_file.with_name("out.jsonl"))


def test_outputs_and_inputs_that_are_no_files(
    run_folder: Path, requests_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "same.jsonl").symlink_to(requests_file)
    os.link(requests_file, tmp_path / "hard.jsonl")
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "not.parquet").write_text("no")
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    for given, output, message in (
        (requests_file, Path("/dev/null"), "/dev/null is no regular file"),
        (requests_file, tmp_path / "folder.jsonl", "is a folder: give the name of a file"),
        (requests_file, tmp_path, "is a folder: give the name of a file"),
        (requests_file, tmp_path / "pipe.jsonl", "pipe.jsonl is no regular file"),
        (requests_file, tmp_path / "loop.jsonl", "loop.jsonl cannot be made (Too many levels of symbolic"),
        (
            requests_file,
            tmp_path / "loop.jsonl" / "a.jsonl",
            "a.jsonl cannot be made (Too many levels of symb",
        ),
        (requests_file, tmp_path / f"{'a' * 300}.jsonl", "cannot be made (File name too long"),
        (requests_file, tmp_path / "same.jsonl", "is the input itself"),
        (requests_file, tmp_path / "hard.jsonl", "is the input itself"),
        (tmp_path / "pipe.jsonl", tmp_path / "out.jsonl", "pipe.jsonl is no regular file"),
        (tmp_path / "folder.jsonl", tmp_path / "out.jsonl", "folder.jsonl is no regular file"),
        (tmp_path / "not.parquet", tmp_path / "out.jsonl", "not.parquet cannot be read as Parquet"),
        (
            requests_file,
            Path("/dev/null/out.jsonl"),
            "/dev/null is a file, so there is no folder for out.jsonl",
        ),
    ):
        before = {path.name for path in tmp_path.iterdir()}
        command = ["score", f"--run={run_folder}", "--progress=false", "--precision=fp32"]
        assert main([*command, f"--input={given}", f"--output={output}"]) == 2
        error = capsys.readouterr().err
        assert message in error, error
        assert error.count("\n") == 1, error
        assert {path.name for path in tmp_path.iterdir()} == before


def records_of(
    run_scorer: Scorer, requests_file: Path, lines: list[str], output: str = "out.jsonl"
) -> list[dict[str, Any]]:
    requests_file.write_text("\n".join(lines))
    path = requests_file.with_name(output)
    score(run_scorer, requests_file, path, skip_bad_lines=True)
    if path.suffix == ".parquet":
        return pl.read_parquet(path).to_dicts()
    return [json.loads(line) for line in path.read_text().splitlines()]


GOOD = '{"user": "5", "candidates": ["1"]}'


@pytest.mark.parametrize("output", ["out.jsonl", "out.parquet"])
@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (r'{"user": "5", "candidates": [{"text": "caf\ud83d"}]}', r"candidates[0]: half a surrogate pair"),
        (r'{"user": "5", "candidates": [{"title": "caf\ud83d", "genres": []}]}', r"half a surrogate pair"),
        (r'{"user": "5", "candidates": [{"title": "a", "genres": ["\udc00"]}]}', r"half a surrogate pair"),
        (r'{"user": "5", "candidates": [{"\ud83d": "a"}]}', r"half a surrogate pair"),
        (r'{"history": [[{"text": "\ud83d"}, 1]], "candidates": []}', r"history[0]: half a surrogate pair"),
        (r'{"user": "\ud83d", "history": [], "candidates": []}', r"half a surrogate pair"),
        (r'{"user": "\ud83d", "candidates": []}', r"half a surrogate pair"),
        (r'{"user": "5", "candidates": ["\ud83d"]}', r"no item with id '\ud83d'"),
        (r'{"\ud83d": "5"}', r"unknown field '\ud83d'"),
        ('{"user": "5", "candidates": ' + "[" * 900 + "]" * 900 + "}", "nested more than 16 deep"),
        ('{"user": "5", "candidates": ' + "[" * 90_000 + "]" * 90_000 + "}", "nested more than 16 deep"),
        (
            '{"user": "5", "candidates": [' + '{"a":' * 900 + "1" + "}" * 900 + "]}",
            "nested more than 16 deep",
        ),
        ('{"user": ["5"], "candidates": []}', "a user is an id, got ['5'] of list"),
        ('{"user": "5", "candidates": [' + "1" * 5_000 + "]}", "an integer of more than 4,300 digits"),
        ('{"history": [["1", NaN]], "candidates": []}', "a label must be 0 or 1, got nan"),
        ('{"history": [["1", 0.5]], "candidates": []}', "a label must be 0 or 1, got 0.5"),
    ],
)
def test_lines_that_stuck_a_job(
    run_scorer: Scorer, requests_file: Path, line: str, problem: str, output: str
) -> None:
    """TypeError or RecursionError at every try, whatever --bad-lines said."""
    first, bad, last = records_of(run_scorer, requests_file, [GOOD, line, GOOD], output)
    assert problem in bad["error"]
    assert len(bad["error"]) < 1_500
    assert first["probabilities"] == pytest.approx(last["probabilities"], abs=1e-6)
    assert first["user"] == "5"


def test_labels_of_floats_are_labels(run_scorer: Scorer, requests_file: Path) -> None:
    """1.0 was refused."""
    lines = [
        f'{{"history": [["1", {yes}], ["2", {no}]], "candidates": ["9"]}}'
        for yes, no in (("1", "0"), ("1.0", "0.0"))
    ]
    one, other = records_of(run_scorer, requests_file, lines)
    assert one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-6)
    assert "error" not in other


@pytest.mark.parametrize("end", ["\n", "\n\n", "\n \t\r\n\n", "\r\n\r\n", ""])
def test_a_blank_end_is_no_line(run_scorer: Scorer, requests_file: Path, end: str) -> None:
    """The job stopped at it: not valid JSON."""
    requests_file.write_text(f"{GOOD}\n\n{GOOD}{end}")
    output = requests_file.with_name("out.jsonl")
    done = score(run_scorer, requests_file, output, skip_bad_lines=True)
    assert (done.lines, done.bad) == (3, 1), "a blank line in between is one that is not valid"
    requests_file.write_text(f"{GOOD}\n{GOOD}{end}")
    assert score(run_scorer, requests_file, requests_file.with_name("again.jsonl")).lines == 2


@pytest.mark.parametrize("block", [1, 2, 7])
def test_lines_are_counted_across_blocks(
    requests_file: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(score_lines, "_BLOCK_BYTES", block)
    for content, expected in ((b"", 0), (b"a", 1), (b"a\n", 1), (b"\n\nab\n \nc\r\n\n \n", 5), (b" \n\n", 0)):
        requests_file.write_bytes(content)
        with InputFile(requests_file) as opened:
            assert opened.num_lines == expected
            assert len(list(opened.lines(after=0))) == expected
            assert opened.facts == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


@pytest.mark.parametrize("content", ["", "\n\n"])
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_an_empty_input_gives_an_empty_output(
    run_scorer: Scorer, requests_file: Path, content: str, suffix: str
) -> None:
    requests_file.write_text(content)
    output = requests_file.with_name("out" + suffix)
    assert score(run_scorer, requests_file, output).lines == 0
    assert output.read_bytes() == b"" if suffix == ".jsonl" else len(pl.read_parquet(output)) == 0


def test_no_value_in_a_line_ends_otherwise_than_scored_or_refused(run_scorer: Scorer) -> None:
    """2,000 made-up lines: whatever stands in a field, a job goes past it."""
    rng = random.Random(0)
    leaves: list[Any] = [
        None,
        True,
        0,
        1,
        1.0,
        -7,
        1e308,
        float("nan"),
        "",
        "1",
        "9",
        "x" * 5_000,
        "\ud83d",
        "\0",
        "[SUM]",
        2**70,
    ]
    names = ["user", "history", "candidates", "text", "title", "genres", "item", "label", "1"]

    def value(depth: int) -> Any:
        kind = rng.random()
        if depth == 0 or kind < 0.4:
            return rng.choice(leaves)
        if kind < 0.7:
            return [value(depth - 1) for _ in range(rng.randrange(4))]
        return {rng.choice(names): value(depth - 1) for _ in range(rng.randrange(4))}

    scored = 0
    for _ in range(2_000):
        line = {name: value(4) for name in ("user", "history", "candidates") if rng.random() < 0.8}
        if rng.random() < 0.5:
            line["candidates"] = [
                rng.choice(["1", {"text": value(1)}, {"title": value(1), "genres": value(2)}])
            ]
            line["history"] = [[rng.choice(["1", {"text": value(0)}]), value(0)]]
        try:
            fields = fields_of(json.dumps(line).encode())
            user_of(fields)
            run_scorer.score_many([request_of(run_scorer, fields)])
            scored += 1
        except ItemError as error:
            str(error).encode()
    assert scored > 20


def test_probabilities_that_are_no_numbers(run_folder: Path, requests_file: Path) -> None:
    """NaN is no JSON: such an output could not be read."""
    run = Run.load(run_folder, device="cpu")
    with torch.no_grad():
        next(run.model.parameters()).fill_(np.nan)
    with pytest.raises(ValueError, match=r"in.jsonl:\d+: the model's probabilities are not finite"):
        score(Scorer(run), requests_file, requests_file.with_name("out.jsonl"))
