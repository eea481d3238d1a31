"""Real processes are killed, terminated and starved of disk; the same settings then end like a run that nothing happened to."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from dti_model import files
from dti_model.config import OptimConfig, TrainConfig
from dti_model.files import whole as whole_files
from dti_model.training import checkpoint, train
from dti_model.training import driver as training
from dti_model.training.checkpoint import (
    OPTIMIZER_FILE,
    TRAINER_FILE,
    WEIGHTS_FILE,
    CheckpointError,
    last_checkpoint,
)
from dti_model.training.resumable import TERMINATED_STATUS, Terminated
from dti_model.training.start import CHECKPOINTS_FOLDER, METRICS_FILE
from dti_model.training.trainer import StreamTrainer
from tests.conftest import ROOT
from tests.training.small_runs import small_model, small_run

pytestmark = pytest.mark.slow
# A server imports once; every process that is killed starts from it.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["dti_model.training.driver"])


@pytest.fixture(scope="module")
def config(small_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """Dropout, accumulation and checkpoints inside epochs; early stopping ends it before the last epoch."""
    optim = OptimConfig(
        epochs=9,
        learning_rate=0.02,
        token_budget=300,
        patience=2,
        accumulation=2,
        save_steps=2,
        precision="fp32",  # in processes of their own too
    )
    out = tmp_path_factory.mktemp("interrupt") / "whole"
    return small_run(small_folder, out, model=small_model(layers=2), optim=optim)


def outcome(config: TrainConfig) -> dict[str, Any]:
    """Everything that a finished run says, but for how fast it was."""
    folder = last_checkpoint(config.out / CHECKPOINTS_FOLDER)
    assert folder is not None
    state = json.loads((folder / TRAINER_FILE).read_text())
    log = [{k: v for k, v in entry.items() if not k.endswith("per_s")} for entry in state["log_history"]]
    return {
        "metrics": json.loads((config.out / METRICS_FILE).read_text()),
        "predictions": [
            pl.read_parquet(config.out / f"predictions-{split}.parquet") for split in ("val", "test")
        ],
        "log": log,
        "best": (state["best_metric"], state["best_global_step"]),
        "weights": [
            (file.name, file.read_bytes()) for file in sorted((config.out / "model").glob("*.safetensors"))
        ],
    }


@pytest.fixture(scope="module")
def whole(config: TrainConfig) -> dict[str, Any]:
    result = train(config)
    assert result["training"]["epochs"] < config.optim.epochs, (
        "early stopping is part of what must be resumed"
    )
    return outcome(config)


def assert_ends_like(config: TrainConfig, whole: dict[str, Any]) -> None:
    train(config)
    ended = outcome(config)
    for one, other in zip(ended.pop("predictions"), whole["predictions"], strict=True):
        assert one.equals(other)
    assert ended == {name: value for name, value in whole.items() if name != "predictions"}
    leftovers = [path.name for path in (config.out / CHECKPOINTS_FOLDER).iterdir() if path.name[0] == "."]
    assert not leftovers


def in_one_thread(target, *arguments: Any) -> None:
    """As the tests themselves: sums of PyTorch's attention may depend in their last bit on the number of threads."""
    torch.set_num_threads(1)
    target(*arguments)


def started(target, *arguments: Any) -> Any:
    process = PROCESSES.Process(target=in_one_thread, args=(target, *arguments))
    process.start()
    return process


def kill_while(config: TrainConfig, moment: str, count: int) -> None:
    """Train, and SIGKILL this process in the middle of the `count`-th write, rename or removal of a checkpoint."""
    module, name = {
        "writing": (checkpoint, "save_file"),
        "flushing": (whole_files, "_flush"),
        "removing": (shutil, "rmtree"),
        "finishing": (training, "finish"),
    }[moment]
    original, calls = getattr(module, name), [0]

    def killed(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] < count:
            return original(*args, **kwargs)
        if moment == "writing":
            original(*args, **kwargs)
            os.truncate(args[1], os.path.getsize(args[1]) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(module, name, killed)
    train(config)


@pytest.mark.parametrize(
    ("moment", "count"), [("writing", 1), ("writing", 4), ("flushing", 9), ("removing", 9), ("finishing", 1)]
)
def test_sigkill_around_checkpoints(
    config: TrainConfig, whole: dict[str, Any], moment: str, count: int, tmp_path: Path
) -> None:
    """Half of a file, a checkpoint before its name, half of a removal, and after early stopping: it must not train on."""
    broken = dataclasses.replace(config, out=tmp_path / "broken")
    process = started(kill_while, broken, moment, count)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert_ends_like(broken, whole)


def test_sigkill_at_random_moments(config: TrainConfig, whole: dict[str, Any], tmp_path: Path) -> None:
    """One run, killed again and again wherever it is."""
    broken = dataclasses.replace(config, out=tmp_path / "broken")
    rng = random.Random(0)
    for _ in range(4):
        process = started(train, broken)
        waited = time.monotonic() + 30
        before = last_checkpoint(broken.out / CHECKPOINTS_FOLDER)
        while last_checkpoint(broken.out / CHECKPOINTS_FOLDER) == before and time.monotonic() < waited:
            if not process.is_alive():
                break
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
        process.join()
        if (broken.out / METRICS_FILE).exists():
            break
    if (broken.out / METRICS_FILE).exists():
        (broken.out / METRICS_FILE).unlink()
    assert_ends_like(broken, whole)


def test_what_a_kill_after_the_last_checkpoint_left_is_removed(
    config: TrainConfig, whole: dict[str, Any], tmp_path: Path
) -> None:
    """No checkpoint follows that would tidy: the process was killed while it removed an older one, or while it scored."""
    ended = dataclasses.replace(config, out=tmp_path / "ended")
    train(ended)
    (ended.out / METRICS_FILE).unlink()
    leftover = ended.out / CHECKPOINTS_FOLDER / ".checkpoint-2.dti-0123456789abcdef.removed"
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    assert_ends_like(ended, whole)


def test_sigterm_writes_a_checkpoint_and_says_so(
    config: TrainConfig, whole: dict[str, Any], tmp_path: Path
) -> None:
    """`dti train` ends with a status of its own at the next step, not at the next save."""
    folder = tmp_path / "bröken"  # in an output that knows ASCII only
    optim = config.optim
    command = [sys.executable, "-m", "dti_model.cli", "train", f"--data={config.data}", f"--out={folder}"]
    command += ["--k=3", "--window=3", "--progress=false", "--report-to=[]", "--logging-steps=1"]
    command += ["--model.layers=2", "--model.width=16", "--model.heads=2", "--model.kv-heads=1"]
    command += ["--model.mlp-width=24", f"--optim.epochs={optim.epochs}", "--optim.learning-rate=0.02"]
    command += ["--optim.token-budget=300", "--optim.patience=2", "--optim.accumulation=2"]
    command += ["--optim.precision=fp32"]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "PYTHONIOENCODING": "ascii",
    }
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=tmp_path, env=environment
    ) as process:
        assert process.stdout is not None
        printed = []
        for line in process.stdout:
            printed.append(line)
            if line.startswith("step "):
                process.send_signal(signal.SIGTERM)
                break
        printed += process.stdout.readlines()
    assert process.returncode == TERMINATED_STATUS, printed
    match = re.search(
        r"SIGTERM: wrote \S*checkpoint-(\d+) and stopped\. Give the same command again", printed[-1]
    )
    assert match, printed
    # An epoch's last step is saved after its validation, whose line then follows the step's.
    steps = [line for line in printed if line.startswith("step ")]
    assert int(match[1]) == int(steps[-1].split()[1].split("/")[0]), "at the next step"
    again = dataclasses.replace(
        config, out=folder, logging_steps=1, optim=dataclasses.replace(optim, save_steps=0)
    )
    assert train(again) == whole["metrics"]


def test_sigterm_after_the_last_step_is_not_forgotten(
    config: TrainConfig,
    whole: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It went on to score, and a benchmark to its next training."""
    broken = dataclasses.replace(config, out=tmp_path / "broken")
    with monkeypatch.context() as patched:
        load_best = StreamTrainer._load_best_model

        def terminated(self: StreamTrainer) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            load_best(self)

        patched.setattr(StreamTrainer, "_load_best_model", terminated)
        with pytest.raises(Terminated) as end:
            train(broken)
    assert end.value.code == TERMINATED_STATUS
    assert (
        "stopped at the end of training, before scoring. Give the same command again"
        in capsys.readouterr().out
    )
    assert not (broken.out / METRICS_FILE).exists()
    assert_ends_like(broken, whole)


def train_with_little_room(config: TrainConfig, pipe: Any) -> None:
    """No file may become larger than 20 kB: what a full disk does, for one process."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    try:
        train(config)
    except CheckpointError as error:
        pipe.send(str(error))


def test_a_full_disk_and_a_damaged_checkpoint(
    config: TrainConfig, whole: dict[str, Any], tmp_path: Path
) -> None:
    """Both say what to do, and doing it ends like the whole run."""
    broken = dataclasses.replace(config, out=tmp_path / "broken")
    process = started(kill_while, broken, "writing", 6)
    process.join(60)
    checkpoints = broken.out / CHECKPOINTS_FOLDER
    good = last_checkpoint(checkpoints)
    assert good is not None
    content = {path.name: path.read_bytes() for path in good.iterdir()}
    receive, send = multiprocessing.Pipe()
    started(train_with_little_room, broken, send).join(60)
    assert receive.poll(), "the run did not stop"
    message = receive.recv()
    assert re.search(
        r"checkpoint-\d+ cannot be written \(.*\)\. Earlier checkpoints are untouched: make room", message
    )
    assert last_checkpoint(checkpoints) == good
    assert {path.name: path.read_bytes() for path in good.iterdir()} == content
    for file in (WEIGHTS_FILE, OPTIMIZER_FILE):
        (good / file).write_bytes(content[file][: len(content[file]) // 2])
        with pytest.raises(
            CheckpointError, match=f"{file} has .* bytes instead of .* Delete .*{good.name} and give the same"
        ):
            train(broken)
        (good / file).write_bytes(content[file])
    (good / WEIGHTS_FILE).write_bytes(b"")
    files.remove_folder(good)
    assert_ends_like(broken, whole)
