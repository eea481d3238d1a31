"""Processes that write the same run folder take turns, and a run says that it goes on."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dti_model.config import TrainConfig
from dti_model.files import LockedError, locked
from dti_model.training import search, train
from dti_model.training.start import LOCK_FILE
from tests.conftest import ROOT
from tests.training.small_runs import small_run


@pytest.fixture
def config(small_folder: Path, tmp_path: Path) -> TrainConfig:
    return small_run(small_folder, tmp_path / "run")


def in_another_process(config: TrainConfig, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "dti_model.cli", "train", f"--data={config.data}", f"--out={config.out}"]
    command += ["--k=3", "--window=3", "--progress=false", "--report-to=[]", "--model.layers=1", *more]
    command += ["--model.width=16", "--model.heads=2", "--model.kv-heads=1", "--model.mlp-width=24"]
    command += ["--optim.token-budget=600", "--logging-steps=1"]
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


def test_a_run_says_that_it_goes_on(config: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    first = in_another_process(config, "--optim.epochs=3", "--optim.save-steps=2")
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
