"""Who may read what the library writes: the umask says it, of every file and folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from dti_model.cli import main
from dti_model.data import prepare
from dti_model.model.export import export_run
from dti_model.scorer import Scorer
from dti_model.training import train
from tests.data.movielens_files import some_ratings, write_1m
from tests.scorer.scoring_jobs import requests, score, write_jsonl
from tests.training.small_runs import small_run


@pytest.fixture
def umask() -> Iterator[int]:
    """None that a system has by default; `test_a_model_is_for_whom_the_umask_says` has others."""
    before = os.umask(0o027)
    yield 0o027
    os.umask(before)


def wrong_modes(folder: Path, umask: int) -> dict[str, str]:
    """Paths below a folder with another mode than the umask's."""
    found = {path: path.stat().st_mode & 0o777 for path in sorted(folder.rglob("*"))}
    return {
        path.relative_to(folder).as_posix(): oct(mode)
        for path, mode in found.items()
        if mode != (0o777 if path.is_dir() else 0o666) & ~umask
    }


def test_everything_written_has_the_mode_of_the_umask(tmp_path: Path, umask: int) -> None:
    """Weights were readable for one user alone, so that a service of another user could not read a run."""
    place = tmp_path / "all"
    data, run = place / "data", place / "run"
    prepare("ml-1m", data, write_1m(tmp_path / "raw", some_ratings(num_users=8)), subset=True, vocab_size=300)
    train(small_run(data, run, report_to=("tensorboard",)))
    write_jsonl(place / "in.jsonl", requests(3))
    score(Scorer.from_run(run, device="cpu"), place / "in.jsonl", place / "out.jsonl")
    score(Scorer.from_run(run, device="cpu"), place / "in.jsonl", place / "out.parquet")
    main(["evaluate", "--run", str(run), "--split", "val", "--json", str(place / "val.json")])
    export_run(run, place / "exported", library_only=True)
    names = {path.relative_to(place).as_posix() for path in place.rglob("*")}
    assert {
        "run/model/model.safetensors",
        "exported/model.safetensors",
        "data/tokens",
        "out.parquet",
    } <= names
    assert any(name.startswith("run/checkpoints/checkpoint-") for name in names), names
    assert wrong_modes(place, umask) == {}
