"""Commands that are complete but for what a test breaks."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from dti_model.data import SOURCES
from tests.cli.commands import EVERY_COMMAND
from tests.data.log_files import write_amazon
from tests.data.movielens_files import some_ratings


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Nothing of a launcher in the environment, and nobody waits for a pipe."""
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("waits for somebody to write to a pipe"))
    signal.alarm(100)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def bases(small_folder: Path, run_folder: Path, tmp_path: Path) -> dict[tuple[str, ...], dict[str, str]]:
    """Of every command, options that it takes: what is broken in the table is the only thing that is. A new command is added here, or a
    source with options of its own."""
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    (inputs / "in.jsonl").write_text('{"user": "1", "candidates": ["1"]}\n')
    (inputs / "rows.csv").write_text("user,item,timestamp,liked\n1,1,1,1\n")
    (inputs / "items.csv").write_text("item,title\n1,a\n")
    (inputs / "users.csv").write_text("user,town\n1,Rome\n")
    reviews, meta = write_amazon(inputs, some_ratings())
    for file in (reviews, meta):
        (inputs / file.name.replace("CDs_and_Vinyl", "Kindle_Store")).symlink_to(file)
    out = {"--out": str(tmp_path / "out")}
    train = {**out, "--data": str(small_folder)}
    of_a_folder = {
        ("prepare", name): {**out, "--raw-dir": str(inputs)}
        for name, entry in SOURCES.items()
        if entry.raw_dir
    }
    found = {
        **of_a_folder,
        ("prepare", "amazon"): {
            **out,
            "--reviews": str(reviews),
            "--meta": str(meta),
        },
        ("prepare", "custom"): {
            **out,
            "--interactions": str(inputs / "rows.csv"),
            "--items": str(inputs / "items.csv"),
            "--text": "{title}",
            "--label": "liked",
            "--users": str(inputs / "users.csv"),
            "--user-text": "{town}",
        },
        ("train",): train,
        ("search",): {**train, "--grid": "{k: [3]}"},
        ("evaluate",): {"--run": str(run_folder)},
        ("score",): {
            "--precision": "fp32",
            "--run": str(run_folder),
            "--input": str(inputs / "in.jsonl"),
            "--output": str(tmp_path / "out.jsonl"),
        },
        ("fetch-model",): out,
        ("export",): {**out, "--run": str(run_folder)},
    }
    assert set(found) == set(EVERY_COMMAND)
    return found
