"""Whose a run folder is: what is somebody else's stays as it is, and one process writes at a time."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dti_model.cli import main
from dti_model.config import ModelConfig, OptimConfig, TrainConfig
from dti_model.files import LockedError, locked
from dti_model.run_folder import LOCK_FILE, RunExistsError
from dti_model.search import search
from dti_model.train import train
from tests.conftest import ROOT


@pytest.fixture
def config(small_folder: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        data=small_folder,
        out=tmp_path / "run",
        k=3,
        window=3,
        progress=False,
        report_to=(),
        model=ModelConfig(layers=1, width=16, heads=2, kv_heads=1, mlp_width=24),
        optim=OptimConfig(epochs=1, token_budget=600),
    )


def content(folder: Path) -> dict[str, tuple[str, int]]:
    """Every file below a folder, with its time of change."""
    return {
        path.relative_to(folder).as_posix(): (
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "",
            path.stat().st_mtime_ns,
        )
        for path in [folder, *folder.rglob("*")]
    }


FOREIGN = {
    "another program's settings": {"config.yaml": "theme: dark\nmodel: {name: x}\n"},
    "settings that are no YAML": {"config.yaml": "\x00\x01"},
    "an empty config.yaml": {"config.yaml": ""},
    "some of our names": {"config.yaml": "data: a\nout: b\nk: 3\n"},
    "a model": {"model/config.json": "{}", "model/weights.bin": "x"},
    "checkpoints": {"checkpoints/checkpoint-5/state": "x"},
    "metrics": {"metrics.json": "{}"},
    "notes": {"notes.txt": "x"},
    "a hidden file": {".git/HEAD": "x"},
    "another's model beside another's settings": {
        "config.yaml": "a: 1\n",
        "model/a": "x",
        "metrics.json": "{}",
        "checkpoints/checkpoint-1/a": "x",
    },
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_folder_of_something_else_is_refused_and_stays(config: TrainConfig, name: str) -> None:
    """A foreign config.yaml used to be overwritten, and model/ and checkpoints beside it deleted."""
    for file, text in FOREIGN[name].items():
        (config.out / file).parent.mkdir(parents=True, exist_ok=True)
        (config.out / file).write_text(text)
    before = content(config.out)
    with pytest.raises(RunExistsError, match="not a run folder") as raised:
        train(config)
    assert "delete" not in str(raised.value)
    assert content(config.out) == before
    with pytest.raises(RunExistsError, match="is not the folder of a search"):
        search(config, {"k": [3]}, [0])
    assert content(config.out) == before


def test_a_file_in_the_place_of_the_folder(config: TrainConfig) -> None:
    config.out.write_text("x")
    for call in (train, lambda config: search(config, {"k": [3]}, [0])):
        with pytest.raises(RunExistsError, match="is not a folder"):
            call(config)


def test_what_a_killed_start_leaves_is_a_fresh_folder(config: TrainConfig) -> None:
    """The lock, an empty folder of checkpoints, and a config.yaml without its name."""
    (config.out / "checkpoints").mkdir(parents=True)
    (config.out / LOCK_FILE).write_text("dti train (process 1 on elsewhere)\n")
    (config.out / ".config.yaml.dti-0123456789abcdef.incomplete").write_text("half")
    train(config)
    assert not list(config.out.rglob(".*"))


def test_folders_of_others_among_the_checkpoints_stay(config: TrainConfig) -> None:
    """checkpoint-best and checkpoint-5.old were deleted with the old checkpoints."""
    config.save(config.out)
    kept = ["checkpoint-abc", "checkpoint-5.old", "checkpoint-", "checkpoint-٣", "checkpoint-07", "mine"]
    for name in kept:
        (config.out / "checkpoints" / name).mkdir(parents=True)
        (config.out / "checkpoints" / name / "file").write_text("x")
    (config.out / "checkpoints" / "checkpoint-9").write_text("a file")
    train(config)
    for name in kept:
        assert (config.out / "checkpoints" / name / "file").read_text() == "x"
    assert (config.out / "checkpoints" / "checkpoint-9").read_text() == "a file"


def test_a_run_that_fails_at_its_start_leaves_no_folder(config: TrainConfig, tmp_path: Path) -> None:
    deep = dataclasses.replace(config, out=tmp_path / "a" / "b" / "run", optim=OptimConfig(token_budget=10))
    with pytest.raises(ValueError, match="raise the budget"):
        train(deep)
    assert not (tmp_path / "a").exists()


def in_another_process(config: TrainConfig, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "dti_model.cli", "train", f"--data={config.data}", f"--out={config.out}"]
    command += ["--k=3", "--window=3", "--progress=false", "--report_to=[]", "--model.layers=1", *more]
    command += ["--model.width=16", "--model.heads=2", "--model.kv_heads=1", "--model.mlp_width=24"]
    command += ["--optim.token_budget=600", "--logging_steps=1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def test_one_process_at_a_time(config: TrainConfig) -> None:
    """Two trainings of different settings both ended well: config.yaml was of one, model and metrics of the other."""
    first = in_another_process(config, "--optim.epochs=2000", "--optim.patience=0")
    try:
        assert first.stdout is not None
        assert first.stdout.readline().startswith("step ")
        before = (config.out / "config.yaml").read_bytes()
        for other in (config, dataclasses.replace(config, k=2)):
            with pytest.raises(LockedError, match=rf"is being written by dti train \(process {first.pid} on"):
                train(other)
        second = in_another_process(config, "--optim.epochs=1")
        _, error = second.communicate(timeout=60)
        assert second.returncode == 2
        assert len(error.strip().splitlines()) == 1
        assert f"process {first.pid}" in error
        assert (config.out / "config.yaml").read_bytes() == before
    finally:
        first.kill()
        first.communicate()
    shutil.rmtree(config.out / "checkpoints")
    train(config)  # the lock of a killed process is free
    assert TrainConfig.load(config.out) == config


def test_searches_take_turns_and_know_their_folder(config: TrainConfig) -> None:
    with locked(config.out / LOCK_FILE, "dti search"), pytest.raises(LockedError, match="by dti search"):
        search(config, {"k": [3]}, [0])
    search(config, {"k": [3]}, [0])
    search(config, {"k": [3, 4]}, [0])
    assert {path.name for path in config.out.iterdir()} == {
        "k=3", "k=4", "search.csv", "search.json", "search-folder.json"
    }  # fmt: skip
    # As version 0.1.0 left it.
    (config.out / "search-folder.json").unlink()
    search(config, {"k": [3]}, [0])


def test_a_finished_cell_that_was_damaged_is_not_read(config: TrainConfig) -> None:
    search(config, {"k": [3]}, [0])
    path = config.out / "k=3" / "seed-0" / "metrics.json"
    metrics = json.loads(path.read_text())
    metrics["val"]["auc"] = 0.9999
    path.write_text(json.dumps(metrics, indent=2) + "\n")
    with pytest.raises(ValueError, match=r"metrics\.json .*Delete .*seed-0 and give the same command again"):
        search(config, {"k": [3]}, [0])
    (path.parent / "checksums.json").unlink()
    with pytest.raises(ValueError, match=r"checksums\.json is missing. Delete .*seed-0"):
        search(config, {"k": [3]}, [0])
    (path.parent / "model" / "provenance.json").unlink()  # as version 0.1.0 left it
    path.write_text("{")
    with pytest.raises(ValueError, match=r"metrics\.json is damaged .*Delete .*seed-0"):
        search(config, {"k": [3]}, [0])


def test_evaluate_replaces_nothing_but_its_own_file(
    config: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    """--json wrote over whatever it was given, and only after the scoring."""
    train(config)
    command = ["evaluate", f"--run={config.out}", "--progress=false", "--split=val"]
    notes = config.out.parent / "notes.txt"
    notes.write_text("x")
    for path in (notes, config.out / "config.yaml", config.out / "metrics.json", config.out):
        before = content(config.out)
        assert main([*command, f"--json={path}"]) == 2
        assert "is not a file that `dti evaluate` wrote" in capsys.readouterr().err
        assert content(config.out) == before
    assert notes.read_text() == "x"
    assert main([*command, f"--json={config.out.parent / 'no' / 'out.json'}"]) == 2
    assert "there is no folder" in capsys.readouterr().err
    for _ in range(2):
        assert main([*command, f"--json={config.out.parent / 'out.json'}"]) == 0
    result = json.loads((config.out.parent / "out.json").read_text())
    assert result["val"] == json.loads((config.out / "metrics.json").read_text())["val"]


def test_a_run_says_that_it_goes_on(config: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    first = in_another_process(config, "--optim.epochs=3", "--optim.save_steps=2")
    checkpoints = config.out / "checkpoints"
    deadline = time.monotonic() + 60
    while not list(checkpoints.glob("checkpoint-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    first.kill()
    first.communicate()
    step = max(int(path.name.split("-")[1]) for path in checkpoints.glob("checkpoint-*"))
    again = dataclasses.replace(
        config, logging_steps=1, optim=dataclasses.replace(config.optim, epochs=3, save_steps=2)
    )
    steps = train(again)["training"]["optimizer_steps"]
    assert f"goes on from step {step} of {steps}" in capsys.readouterr().out
