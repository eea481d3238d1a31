"""Two processes train what one does: DDP and FSDP2 over gloo, against one process that accumulates the same batches."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler, SequentialSampler

from dti_model import devices
from dti_model.config import LoraSettings, ModelConfig, OptimConfig, TrainConfig
from dti_model.devices import device_of_rank
from dti_model.evaluation import evaluate_run
from dti_model.files import locked
from dti_model.model.run import Run
from dti_model.prompts import PackedPrompts, Prompts
from dti_model.training import train
from dti_model.training.start import LOCK_FILE
from tests.conftest import ROOT
from tests.model.pretrained_files import pretrained_folder
from tests.training.small_runs import small_model, small_run
from tests.training.two_ranks import STOP_AT

STEPS = 20
RANK_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
    # A rank that a signal ends says where its threads were: once, SIGSEGV ended one of them and named no place.
    "PYTHONFAULTHANDLER": "1",
    # Arrow's idle thread blocks all signals, and PyTorch's report of C++ frames ends at the first thread that does not answer.
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
}


def losses(folder: Path) -> list[float]:
    """Of every optimizer step."""
    states = sorted(
        (folder / "checkpoints").glob("*/trainer_state.json"), key=lambda path: path.stat().st_mtime
    )
    return [entry["loss"] for entry in json.loads(states[-1].read_text())["log_history"] if "loss" in entry]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As the two ranks have: the last bit of a matrix product depends on how many threads share it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=["scratch", "lora"])
def config(
    request: pytest.FixtureRequest, small_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> TrainConfig:
    """One process; without dropout, which draws other numbers on every rank."""
    model = small_model(layers=2, dropout=0.0)
    if request.param == "lora":
        base = pretrained_folder(
            tmp_path_factory.mktemp("base"), "llama2"
        )  # FSDP2 with LoRA needs untied embeddings
        model = ModelConfig(pretrained=str(base), lora=LoraSettings(rank=4, alpha=8, dropout=0.0))
    optim = OptimConfig(epochs=5, token_budget=250, patience=0, accumulation=2, precision="fp32")
    out = tmp_path_factory.mktemp("ranks") / "one"
    return small_run(small_folder, out, logging_steps=1, model=model, optim=optim)


@pytest.fixture(scope="module")
def runs(config: TrainConfig) -> dict[str, Any]:
    """Metrics by the way of training; two processes are interrupted on the way."""
    metrics = {"one": train(config)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(ROOT / "tests" / "training" / "two_ranks.py"), str(config.out.parent)],
        capture_output=True,
        text=True,
        env={**os.environ, **RANK_ENVIRONMENT},
        timeout=200,
    )
    # All of it: what ended one rank stands far before the error of the other, which waited for it.
    assert done.returncode == 0, done.stderr
    for name in ("ddp", "fsdp"):
        metrics[name] = json.loads((config.out.parent / name / "metrics.json").read_text())
    return metrics


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_two_ranks_train_like_one(config: TrainConfig, runs: dict[str, Any], name: str) -> None:
    """Losses of every step, although SIGTERM stopped both ranks at the same step and they resumed from its checkpoint."""
    for rank in (0, 1):
        status, checkpoints = json.loads((config.out.parent / f"stopped-{rank}.json").read_text())[name]
        assert status == 75
        assert f"checkpoint-{STOP_AT}" in checkpoints
    expected = losses(config.out)
    assert len(expected) >= STEPS
    np.testing.assert_allclose(losses(config.out.parent / name)[:STEPS], expected[:STEPS], rtol=0, atol=1e-5)
    assert runs[name]["training"]["processes"] == 2
    for fact in ("targets", "epochs", "tokens", "best_epoch", "optimizer_steps"):
        assert runs[name]["training"][fact] == runs["one"]["training"][fact], fact


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_scores_of_two_ranks_are_those_of_one(config: TrainConfig, runs: dict[str, Any], name: str) -> None:
    """One AUC over all targets, bit for bit: each batch is scored by one rank as one process scores it."""
    for split in ("val", "test"):
        alone = evaluate_run(config.out.parent / name, None, split, progress=False)
        assert alone[split] == runs[name][split]


def start_ranks(command: list[str], **environment: str) -> list[subprocess.Popen[str]]:
    """Two processes, without torchrun, which ends the second one as soon as the first has failed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    together = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    return [
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                **RANK_ENVIRONMENT,
                **together,
                "RANK": rank,
                "LOCAL_RANK": rank,
                **environment,
            },
        )
        for rank in ("0", "1")
    ]


def ends_of(processes: list[subprocess.Popen[str]]) -> list[tuple[str, str, int]]:
    """Each one's stdout, stderr and status; none is left when one waits for ever."""
    try:
        return [(*process.communicate(timeout=240), process.returncode) for process in processes]
    finally:
        for process in processes:
            process.kill()


@pytest.mark.slow
def test_all_ranks_hear_of_another_run(small_folder: Path, tmp_path: Path) -> None:
    """Rank 0 holds the lock of the run folder; the others wait for nobody."""
    command = [sys.executable, "-m", "dti_model.cli", "train", f"--data={small_folder}"]
    command.append(f"--out={tmp_path / 'run'}")
    with locked(tmp_path / "run" / LOCK_FILE, "dti train"):
        processes = start_ranks(command)
        errors = [process.communicate(timeout=120)[1] for process in processes]
        assert list((tmp_path / "run").iterdir()) == [tmp_path / "run" / LOCK_FILE]
    for process, error in zip(processes, errors):
        assert process.returncode == 2, error
        assert f"is being written by dti train (process {os.getpid()} on" in error


@pytest.fixture(scope="module")
def searched(small_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """The folder of a search by two processes, and how the command ended when it was given twice."""
    out = tmp_path_factory.mktemp("ranks") / "search"
    command = [sys.executable, "-m", "dti_model.cli", "search", f"--data={small_folder}", f"--out={out}"]
    command += ["--grid={k: [2, 3]}", "--seeds=[0]", "--window=3", "--progress=false", "--report-to=[]"]
    command += ["--model.layers=1", "--model.width=16", "--model.heads=2", "--model.kv-heads=1"]
    command += ["--model.mlp-width=24", "--optim.epochs=1", "--optim.token-budget=600"]
    return out, [ends_of(start_ranks(command)) for _ in range(2)]


@pytest.mark.slow
def test_two_ranks_search(searched: tuple[Path, list[Any]]) -> None:
    """Each took itself for the first, and the second ended with "is being written by dti search"."""
    out, calls = searched
    for call in calls:
        assert [status for _, _, status in call] == [0, 0], call
        assert call[0][0].count("best: --k ") == 1
        assert call[1][0] == "", "the first rank prints"
    assert "epoch 1: " in calls[0][0][0]
    assert "epoch 1: " not in calls[1][0][0], "all is finished"
    cells = json.loads((out / "search.json").read_text())["cells"]
    assert {cell["k"] for cell in cells} == {2, 3}
    for cell in cells:
        metrics = json.loads((out / f"k={cell['k']}" / "seed-0" / "metrics.json").read_text())
        assert metrics["training"]["processes"] == 2
        assert metrics["val"]["auc"] == cell["val_auc_mean"]
    assert not list(out.glob(".*"))


@pytest.mark.slow
def test_two_ranks_evaluate_on_a_device_that_is_named(
    searched: tuple[Path, list[Any]], tmp_path: Path
) -> None:
    """With --device they joined nobody: both scored, printed and wrote all."""
    run = searched[0] / "k=3" / "seed-0"
    command = [sys.executable, "-m", "dti_model.cli", "evaluate", f"--run={run}", "--split=val"]
    command += ["--progress=false", f"--json={tmp_path / 'out.json'}"]
    ends = ends_of(start_ranks([*command, "--device=cpu"]))
    assert [status for _, _, status in ends] == [0, 0], ends
    assert "AUC" in ends[0][0]
    assert ends[1][0] == ""
    metrics = json.loads((run / "metrics.json").read_text())["val"]
    assert json.loads((tmp_path / "out.json").read_text())["val"] == metrics
    for _, error, status in ends_of(start_ranks([*command, "--device=cpu:0"])):
        assert status == 2
        assert "device 'cpu:0' is one device, and each of 2 processes has its own: say cpu" in error


def test_processes_have_one_kind_of_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that contradicts it is refused, not ignored."""
    monkeypatch.setattr(devices, "join_ranks", lambda cpu: torch.device("cpu" if cpu else "cuda:1"))
    monkeypatch.setattr(devices, "num_processes", lambda: 2)
    assert device_of_rank("cpu") == "cpu"
    assert device_of_rank("cuda") == "cuda:1"
    for name, message in (
        ("cuda:1", "each of 2 processes has its own: say cuda"),
        ("mps", "processes have cuda"),
    ):
        with pytest.raises(ValueError, match=message):
            device_of_rank(name)


LEAVING = """
import atexit, os, sys, threading
atexit.register(lambda: print("handlers run"))
from dti_model import ranks
import torch.distributed as dist

class Freed:
    def __del__(self):
        print("the interpreter ends", flush=True)

kept = Freed()
sys.modules["kept"] = kept  # until the end of the interpreter
dist.init_process_group("gloo")
ranks.first_rank_does(lambda: None)
threading.Thread(target=lambda: print("threads end")).start()
if "alone" in sys.argv and os.environ["RANK"] == "0":
    ranks.exit_with(2)
if "alone" in sys.argv:
    try:
        dist.barrier()
    except RuntimeError:
        ranks.exit_with(3)
if "library" not in sys.argv:
    ranks.exit_with(75 if "stop" in sys.argv else 0)
"""


@pytest.mark.parametrize(
    ("how", "statuses"), [("end", (0, 0)), ("stop", (75, 75)), ("alone", (2, 3)), ("library", None)]
)
def test_one_of_several_ranks_ends_without_the_end_of_the_interpreter(
    how: str, statuses: tuple[int, int] | None
) -> None:
    """A thread of the process group that freed a tensor meanwhile aborted one process of twelve, those of finished trainings too."""
    for index, process in enumerate(start_ranks([sys.executable, "-c", LEAVING, how])):
        printed, error = process.communicate(timeout=120)
        if statuses is None:  # what the test looks for is there otherwise
            assert "the interpreter ends" in printed or process.returncode == -signal.SIGABRT
        else:
            assert process.returncode == statuses[index], error
            assert sorted(printed.splitlines()) == ["handlers run", "threads end"]


def test_lora_of_a_tied_model_is_not_sharded(
    small_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Before anything is written."""
    base = pretrained_folder(tmp_path_factory.mktemp("tied"), "smollm2")
    out = tmp_path_factory.mktemp("run") / "tied"
    config = TrainConfig(
        data=small_folder, out=out, model=ModelConfig(pretrained=str(base)), optim=OptimConfig(fsdp=True)
    )
    with pytest.raises(ValueError, match=r"one weight for embedding and head.*leave optim.fsdp out"):
        train(config)
    assert not out.exists()


def test_ranks_get_equal_work_and_every_target_once(config: TrainConfig) -> None:
    """As accelerate shards them: per step, ranks differ by no more than the longest prompt."""
    run = Run.start(config)
    rows = run.data.targets("train")
    prompts = Prompts.streaming(run.data, rows, config.window, 3)
    for ranks in (2, 3):
        dataset = PackedPrompts(run.builder, prompts, 300, seed=0, batch_multiple=ranks)
        dataset.set_epoch(1)
        sampler = BatchSampler(SequentialSampler(dataset), 1, drop_last=False)
        mine = [[i for (i,) in BatchSamplerShard(sampler, ranks, rank)] for rank in range(ranks)]
        seen = np.concatenate([dataset[i].targets.numpy() for indices in mine for i in indices])
        assert sorted(seen) == sorted(rows), "every target once"
        sizes = np.array([[dataset[i].layout.num_rows for i in indices] for indices in mine])
        assert (sizes.max(0) - sizes.min(0)).max() <= dataset.num_rows.max()
