"""`dti score`: both formats, bad lines, and a real SIGKILL in the middle."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from dti_model.cli import main
from dti_model.scorer import Scorer
from dti_model.scorer import file as score_file
from tests.conftest import ROOT
from tests.scorer.scoring_jobs import requests, write_jsonl


def dti_score(run: Path, source: Path, output: Path, *more: str) -> int:
    return main(
        ["score", f"--run={run}", f"--input={source}", f"--output={output}", "--progress=false", *more]
    )


def test_both_formats_give_the_scorer_s_probabilities(run_folder: Path, tmp_path: Path) -> None:
    lines = requests(150)
    write_jsonl(tmp_path / "in.jsonl", lines)
    structs = [
        {
            "user": line.get("user"),
            "history": [{"item": item, "label": label} for item, label in line["history"]]
            if "history" in line
            else None,
            "candidates": line["candidates"],
        }
        for line in lines
    ]
    pl.DataFrame(structs).write_parquet(tmp_path / "in.parquet")
    scorer = Scorer.from_run(run_folder, device="cpu")
    expected = [
        scorer.score(
            line.get("history") or scorer.history_of(line["user"]) if "user" in line else line["history"],
            line["candidates"],
        )
        for line in lines
    ]
    for source, output in itertools.product(("in.jsonl", "in.parquet"), ("out.jsonl", "out.parquet")):
        path = tmp_path / f"{source}-{output}"
        assert dti_score(run_folder, tmp_path / source, path, "--device=cpu") == 0
        if path.suffix == ".jsonl":
            records = [json.loads(line) for line in path.read_text().splitlines()]
        else:
            records = pl.read_parquet(path).to_dicts()
        assert [record["line"] for record in records] == list(range(1, 151))
        assert [record["user"] for record in records] == [line.get("user") for line in lines]
        for record, scores in zip(records, expected, strict=True):
            assert np.allclose(record["probabilities"], scores, rtol=0, atol=1e-5)
    assert len(list(tmp_path.iterdir())) == 6, "nothing but the inputs and the outputs is left"


BAD = {
    "{not json": "not valid JSON",
    "": "not valid JSON",
    "[1]": "a line must be an object",
    '{"user": "1"}': "no candidates",
    '{"candidates": ["1"]}': "neither a history nor a user",
    '{"user": "none", "candidates": ["1"]}': "no user with id 'none'",
    '{"user": "1", "candidates": ["777"]}': "candidates[0]: no item with id '777'",
    '{"user": "1", "candidate": ["1"]}': "unknown field 'candidate'",
    '{"history": 3, "candidates": ["1"]}': "history must be a list",
    '{"history": [["1", 5]], "candidates": ["1"]}': "history[0]: a label must be 0 or 1, got 5",
}


def test_bad_lines_stop_with_their_number_or_are_skipped(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = requests(score_file.CHUNK_LINES)
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_jsonl(source, [*good, *BAD, good[0]])
    assert dti_score(run_folder, source, output) == 2
    error = capsys.readouterr().err
    assert f"in.jsonl:{len(good) + 1}: not valid JSON" in error
    assert not output.exists()
    assert dti_score(run_folder, source, output, "--bad-lines=skip") == 0
    printed = capsys.readouterr()
    assert f"65 of 75 lines scored, {len(good)} of them before this call" in printed.out
    assert f"line {len(good) + 4}: no candidates" in printed.err
    records = [json.loads(line) for line in output.read_text().splitlines()]
    for record, problem in zip(records[len(good) : -1], BAD.values(), strict=True):
        assert problem in record["error"]
    assert records[-1]["probabilities"] == pytest.approx(records[0]["probabilities"], abs=1e-5)


def test_a_killed_call_goes_on_and_writes_the_same_bytes(run_folder: Path, tmp_path: Path) -> None:
    source, output, whole = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    write_jsonl(source, requests(1_500))
    partial = output.with_name("out.jsonl.partial")
    command = [sys.executable, "-m", "dti_model.cli", "score", f"--run={run_folder}", f"--input={source}"]
    process = subprocess.Popen(
        [*command, f"--output={output}", "--progress=false", "--device=cpu", "--precision=fp32"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    while not (partial.exists() and partial.stat().st_size > 10_000):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not output.exists()
    with partial.open("ab") as file:
        file.write(b'{"line": 999999, "us')  # what a write that the kill cut short leaves
    done = partial.read_bytes().count(b"\n")
    assert 0 < done < 1_500
    assert dti_score(run_folder, source, output, "--device=cpu") == 0
    assert dti_score(run_folder, source, whole, "--device=cpu") == 0
    assert output.read_bytes() == whole.read_bytes()


def test_another_job_s_leftovers_are_not_mixed_in(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_jsonl(source, [*requests(score_file.CHUNK_LINES), "bad"])
    assert dti_score(run_folder, source, output) == 2
    write_jsonl(source, requests(3))
    for arguments, message in (
        ((source, output), "belongs to a job with another input"),
        ((tmp_path / "no.jsonl", tmp_path / "x.jsonl"), "no.jsonl does not exist"),
        ((source, tmp_path / "out.csv"), "the name must end in one of .jsonl"),
        ((source, source), "in.jsonl is the input itself"),
    ):
        assert dti_score(run_folder, *arguments) == 2
        assert message in capsys.readouterr().err
