"""A disk that is full at any file: one line that names it, nothing half written, and the same command goes on to the same bits."""

from __future__ import annotations

import errno
import multiprocessing
import os
import resource
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dti_model.cli import main
from dti_model.training import driver, results
from dti_model.training.curves import Curves

pytestmark = pytest.mark.slow
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["dti_model.training.driver", "dti_model.cli", "dti_model.evaluation.report"]
)


def command(data: Path, out: Path) -> list[str]:
    return [
        "train", f"--data={data}", f"--out={out}", "--k=3", "--window=3", "--progress=false", "--model.layers=1",
        "--model.width=16", "--model.heads=2", "--model.kv-heads=1", "--model.mlp-width=24", "--optim.epochs=2",
        "--optim.token-budget=600", "--optim.save-steps=2", "--logging-steps=1", "--optim.precision=fp32",
    ]  # fmt: skip


def run(arguments: list[str], log: Path, moment: str = "", limit: int = 0) -> None:
    """The command, its output in a pipe; from a moment on no file may be larger than `limit` bytes, as on a full disk."""
    torch.set_num_threads(1)
    descriptor = os.open(log, os.O_WRONLY)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)

    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    if moment:
        module = results if hasattr(results, moment) else driver
        original = getattr(module, moment)

        def late(*args: Any, **kwargs: Any) -> Any:
            fill()
            return original(*args, **kwargs)

        setattr(module, moment, late)
    status = main(arguments)
    sys.stdout.flush()
    os._exit(status)


def ended(arguments: list[str], log: Path, *more: Any) -> tuple[int, str]:
    """Exit status and output of `run`."""
    os.mkfifo(log)
    reading = os.open(log, os.O_RDONLY | os.O_NONBLOCK)
    process = PROCESSES.Process(target=run, args=(arguments, log, *more))
    process.start()
    process.join(120)
    printed = os.read(reading, 65536).decode()
    os.close(reading)
    log.unlink()
    assert process.exitcode is not None
    return process.exitcode, printed


def outcome(out: Path) -> dict[str, bytes]:
    """Every file of the run folder that a reader may look at."""
    files = [path for path in out.rglob("*") if path.is_file() and "tensorboard" not in path.parts]
    kept = {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in files
        if path.parent != out / "checkpoints"
    }
    # The place of the run folder, and how fast the steps were, differ.
    return {
        name: x
        for name, x in kept.items()
        if name not in ("config.yaml", "checksums.json") and "checkpoints" not in name
    }


@pytest.fixture(scope="module")
def whole(small_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("full")
    status, printed = ended(command(small_folder, folder / "run"), folder / "log")
    assert status == 0, printed
    found = outcome(folder / "run")
    assert found.keys() >= {
        "metrics.json",
        "report.png",
        "predictions-test.parquet",
        "model/model.safetensors",
    }
    return found


# The moments at which the limit begins to hold, and sizes around those of the files that are then written.
MOMENTS = {
    "_train_in": (0, 500, 3_000, 10_000, 25_000, 60_000),
    "_save_model": (0, 400, 10_000, 25_000),
    "_write_results": (0, 2_000, 3_000, 20_000, 60_000),
}


@pytest.mark.parametrize(
    ("moment", "limit"), [(m, limit) for m, limits in MOMENTS.items() for limit in limits]
)
def test_a_full_disk(
    moment: str, limit: int, small_folder: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    """A traceback at 7 of 12 sizes, and half a file where a whole one is looked for."""
    arguments, log = command(small_folder, tmp_path / "run"), tmp_path / "log"
    status, printed = ended(arguments, log, moment, limit)
    assert status == 2, printed
    assert "Traceback" not in printed
    (error,) = [line for line in printed.splitlines() if "error" in line]
    assert "cannot be written (" in error
    assert str(tmp_path / "run") in error
    assert "give the same command again" in error
    assert not list(tmp_path.rglob(".*")), "something half written"
    status, printed = ended(arguments, log)
    assert status == 0, printed
    assert "Traceback" not in printed
    assert outcome(tmp_path / "run") == whole


def test_curves_end_with_a_warning(
    tmp_path: Path, small_folder: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """TensorBoard's thread printed a traceback, and its next call ended the run."""
    on_log, calls = Curves.on_log, [0]

    def no_room(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def full(self: Curves, *args: Any, **kwargs: Any) -> None:
        calls[0] += 1
        if calls[0] == 2:
            writer: Any = self.tb_writer
            monkeypatch.setattr(writer.file_writer.event_writer._async_writer._writer, "write", no_room)
        on_log(self, *args, **kwargs)

    monkeypatch.setattr(Curves, "on_log", full)
    assert main(command(small_folder, tmp_path / "run")) == 0
    error = capfd.readouterr().err
    assert error.count("cannot be written") == 1
    assert "curves end here, the run goes on" in error
    assert "Traceback" not in error
    assert outcome(tmp_path / "run") == whole


def test_a_folder_of_curves_that_cannot_be_made(small_folder: Path, tmp_path: Path, capfd: Any) -> None:
    """A file in its place."""
    out = tmp_path / "run"
    assert main(command(small_folder, out)) == 0
    shutil.rmtree(out / "tensorboard")
    for name in ("metrics.json", "checksums.json"):
        (out / name).unlink()
    (out / "tensorboard").write_text("x")
    assert main(command(small_folder, out)) == 0
    error = capfd.readouterr().err
    assert "curves end here, the run goes on" in error
    assert "Traceback" not in error
