"""Scoring jobs that are broken off, watched or run by other processes, for the tests of `dti score`."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from dti_model.cli import main
from dti_model.config import ModelConfig, TrainConfig
from dti_model.model import MODEL_FOLDER, Run
from dti_model.scorer import Scorer
from dti_model.scorer import file as module
from dti_model.scorer.file import FileScores, score_file

# A server imports once; every process starts from it.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["dti_model.scorer.file"])
ITEMS = ["1", "2", "9", "10", "11", "100", "101"]


def untrained_run(folder: Path, data: Path) -> Path:
    """A run as `dti train` leaves it, untrained."""
    folder.mkdir()
    model = ModelConfig(layers=2, width=16, heads=2, kv_heads=1, mlp_width=24)
    config = TrainConfig(data=data, out=folder, window=4, model=model)
    run = Run.start(config)
    config.save(folder)
    run.save_model(folder / MODEL_FOLDER)
    return folder


def requests(num_lines: int) -> list[dict]:
    """Stored users and given histories by turns."""
    rng, lines = np.random.default_rng(0), []
    for line in range(num_lines):
        candidates = rng.choice(ITEMS, rng.integers(0, 6)).tolist()
        if line % 2:
            lines.append({"user": str(line % 60 + 1), "candidates": candidates})
        else:
            history = [
                [item, int(rng.integers(2))] for item in rng.choice(ITEMS, rng.integers(0, 7)).tolist()
            ]
            lines.append({"history": history, "candidates": candidates})
    return lines


def write_jsonl(path: Path, lines: list) -> None:
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))


def score(scorer: Scorer, requests_file: Path, output: Path, skip_bad_lines: bool = False) -> FileScores:
    return score_file(scorer, requests_file, output, skip_bad_lines, progress=False)


class Stop(Exception):
    """Ends a job in the middle of a test."""


def broken_off(
    scorer: Scorer, requests_file: Path, output: Path, monkeypatch: pytest.MonkeyPatch, chunks: int = 2
) -> tuple[Path, Path]:
    """A job that ended while it computed the chunk behind these: OUTPUT.partial and OUTPUT.job."""
    meanwhile(monkeypatch, chunks + 1, stop)
    with pytest.raises(Stop):
        score(scorer, requests_file, output)
    monkeypatch.undo()
    return output.with_name(output.name + ".partial"), output.with_name(output.name + ".job")


def stop() -> None:
    raise Stop


def meanwhile(monkeypatch: pytest.MonkeyPatch, chunk: int, action: Callable[[], object]) -> None:
    """Let something happen while a job computes its `chunk`-th chunk of this call."""
    original, calls = module._scored, [0]

    def watched(*arguments: Any) -> Any:
        calls[0] += 1
        records = original(*arguments)
        if calls[0] == chunk:
            action()
        return records

    monkeypatch.setattr(module, "_scored", watched)


def assert_same(output: Path, whole_scores: bytes) -> None:
    if output.suffix == ".jsonl":
        assert output.read_bytes() == whole_scores
        return
    expected = [json.loads(line) for line in whole_scores.splitlines()]
    for record, wanted in zip(pl.read_parquet(output).to_dicts(), expected, strict=True):
        assert record == {**wanted, "error": None}


def run_command(arguments: list[str]) -> int:
    """As the tests themselves, in one thread: sums may depend in their last bit on the number of threads."""
    torch.set_num_threads(1)
    return main(arguments)


def started(target: Callable[..., Any], *arguments: Any) -> Any:
    process = PROCESSES.Process(target=target, args=arguments)
    process.start()
    return process


def command(run_folder: Path, requests_file: Path, output: Path) -> list[str]:
    files = [f"--run={run_folder}", f"--input={requests_file}", f"--output={output}"]
    return ["score", *files, "--progress=false", "--device=cpu", "--precision=fp32"]  # of other processes too
