"""Owners of a run folder: somebody else's files stay as they are, and one process writes at a time."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from dti_model.cli import main
from dti_model.config import OptimConfig, TrainConfig, why_owned
from dti_model.files import write_checksums
from dti_model.model import RunExistsError
from dti_model.model import run as run_module
from dti_model.model.export import export_run
from dti_model.training import search, train
from dti_model.training.checkpoint import CheckpointError
from dti_model.training.start import LOCK_FILE
from dti_model.training.trainer import StreamTrainer
from tests.training.small_runs import Interrupted, small_run, train_until


@pytest.fixture
def config(small_folder: Path, tmp_path: Path) -> TrainConfig:
    return small_run(small_folder, tmp_path / "run")


def content(folder: Path) -> dict[str, tuple[str, int]]:
    """Every file below a folder, with its time of change."""
    return {
        path.relative_to(folder).as_posix(): (
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "",
            path.lstat().st_mtime_ns,
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
    train(config)
    for name in kept:
        assert (config.out / "checkpoints" / name / "file").read_text() == "x"


@pytest.fixture(scope="module")
def interrupted(small_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A run that was killed after its second step, at which it had been saved for the second time."""
    optim = OptimConfig(epochs=1, token_budget=600, save_steps=1)
    config = small_run(small_folder, tmp_path_factory.mktemp("interrupted") / "run", optim=optim)
    train_until(2, config)
    assert [path.name for path in (config.out / "checkpoints").iterdir()] == ["checkpoint-2"]
    return config


def copied(folder: Path, step: int) -> Path:
    return shutil.copytree(folder / "checkpoint-2", folder / f"checkpoint-{step}")


def other_settings(folder: Path) -> None:
    """A whole checkpoint of another run."""
    path = copied(folder, 1)
    run = json.loads((path / "run.json").read_text())
    run["provenance"]["settings"] = "0" * 64
    (path / "run.json").write_text(json.dumps(run))
    state = json.loads((path / "trainer_state.json").read_text())
    (path / "trainer_state.json").write_text(json.dumps({**state, "global_step": 1}))
    (path / "checksums.json").unlink()
    write_checksums(path)


def damaged(folder: Path) -> None:
    (copied(folder, 1) / "weights.safetensors").write_bytes(b"x")


FOREIGN_IN_CHECKPOINTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "notes": (lambda folder: (folder / "checkpoint-2" / "notes.txt").write_text("x"), "checkpoint-2/notes.txt"),
    "a folder": (lambda folder: (folder / "checkpoint-2" / "mine").mkdir(), "checkpoint-2/mine"),
    "notes in another": (lambda folder: (copied(folder, 1) / "own.txt").write_text("x"), "checkpoint-1/own.txt"),
    "another's": (lambda folder: copied(folder, 1), "checkpoint-1 is no whole checkpoint of this run"),
    "another's of another size": (damaged, "checkpoint-1 is no whole checkpoint of this run"),
    "another run's": (other_settings, "checkpoint-1 is of a run with other settings"),
    "an empty folder": (lambda folder: (folder / "checkpoint-1").mkdir(), "checkpoint-1 is no whole checkpoint"),
    "a link": (lambda folder: (folder / "checkpoint-1").symlink_to(folder.parent), "checkpoint-1 is no file"),
    "a later link": (lambda folder: (folder / "checkpoint-3").symlink_to("nothing"), "checkpoint-3 is no file"),
    "a file": (lambda folder: (folder / "checkpoint-9").write_text("x"), "checkpoint-9 is no file"),
    "a pipe": (lambda folder: os.mkfifo(folder / "checkpoint-2" / "x"), "checkpoint-2/x"),
    "a report": (lambda folder: (folder.parent / "report.png").write_bytes(b"\x89PNG mine"), "report.png"),
    "a pipe as a report": (lambda folder: os.mkfifo(folder.parent / "report.png"), "report.png"),
    "checksums": (lambda folder: (folder.parent / "checksums.json").write_text("{}"), "checksums.json"),
    "predictions": (
        lambda folder: (folder.parent / "predictions-val.parquet").write_bytes(b"PAR1"),
        "predictions-val.parquet",
    ),
    "predictions of others": (
        lambda folder: pl.DataFrame({"a": [1]}).write_parquet(folder.parent / "predictions-test.parquet"),
        "predictions-test.parquet",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN_IN_CHECKPOINTS)
def test_what_is_somebody_s_in_an_interrupted_run_is_named(
    interrupted: TrainConfig, tmp_path: Path, name: str
) -> None:
    """It went with old checkpoints, or under the run's results, without a word; a link was renamed, and ended the run."""
    config = dataclasses.replace(interrupted, out=shutil.copytree(interrupted.out, tmp_path / "run"))
    make, named = FOREIGN_IN_CHECKPOINTS[name]
    make(config.out / "checkpoints")
    before = content(config.out)
    with pytest.raises(RunExistsError, match=re.escape(named)) as raised:
        train(config)
    assert "another --out" in str(raised.value)
    after = content(config.out)
    del before["."], after["."]  # the lock came and went
    assert after == before


def test_what_comes_into_a_run_that_is_trained_stays(
    interrupted: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A note in an old checkpoint, a link that the next one would have followed, and a report."""
    config = dataclasses.replace(interrupted, out=shutil.copytree(interrupted.out, tmp_path / "run"))
    checkpoints, training_step = config.out / "checkpoints", StreamTrainer.training_step

    def meanwhile(self: StreamTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 2:
            (checkpoints / "checkpoint-2" / "note").touch()
            (checkpoints / "checkpoint-3").symlink_to(tmp_path)
        return training_step(self, *args, **kwargs)

    monkeypatch.setattr(StreamTrainer, "training_step", meanwhile)
    with pytest.raises(
        CheckpointError, match=r"checkpoint-3 is no file of a checkpoint, and in the way of one"
    ):
        train(config)
    assert (checkpoints / "checkpoint-2" / "note").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    (checkpoints / "checkpoint-3").unlink()
    with pytest.raises(RunExistsError, match="checkpoint-2/note is no file of a run's checkpoint"):
        train(config)
    (checkpoints / "checkpoint-2" / "note").unlink()
    monkeypatch.undo()
    save_model = run_module.Run.save_model

    def and_a_report(self: Any, *args: Any) -> None:
        save_model(self, *args)
        (config.out / "report.png").write_text("mine")

    monkeypatch.setattr(run_module.Run, "save_model", and_a_report)
    with pytest.raises(RunExistsError, match=r"report\.png is no file of a run"):
        train(config)
    assert (config.out / "report.png").read_text() == "mine"
    (config.out / "report.png").unlink()
    monkeypatch.undo()
    with (
        monkeypatch.context() as patch
    ):  # killed between its results and its end: they are known for the run's
        patch.setattr(
            "dti_model.training.results._write_checksums", lambda *_: (_ for _ in ()).throw(Interrupted)
        )
        with pytest.raises(Interrupted):
            train(config)
    assert (config.out / "report.png").exists()
    train(config)
    assert (config.out / "metrics.json").exists()


def test_an_export_is_no_model_of_a_run(interrupted: TrainConfig, run_folder: Path, tmp_path: Path) -> None:
    """`dti evaluate` reported it for a run that had not ended, and the run deleted it."""
    config = dataclasses.replace(interrupted, out=shutil.copytree(interrupted.out, tmp_path / "run"))
    with pytest.raises(FileExistsError, match="model is a place of .*run's own files: choose another name"):
        export_run(run_folder, config.out / "model", library_only=True)
    assert not (config.out / "model").exists()
    export_run(run_folder, config.out / "exported", library_only=True)
    shutil.copytree(config.out / "exported", config.out / "model")
    with pytest.raises(RunExistsError, match="model is not a folder of a run's model"):
        train(config)
    assert content(config.out / "model").keys() == content(config.out / "exported").keys()


def test_a_folder_with_a_copied_configuration_is_no_run(run_folder: Path, tmp_path: Path) -> None:
    """Settings that are used again with `--config config.yaml`: every output beside them was refused."""
    shutil.copy(run_folder / "config.yaml", tmp_path / "config.yaml")
    for name in ("metrics.json", "model", "predictions-new.jsonl", "checkpoints"):
        assert why_owned(tmp_path / name) is None
        assert (why_owned(run_folder / name) is None) == (name == "predictions-new.jsonl")
    (tmp_path / "checkpoints").mkdir()  # an interrupted run
    assert why_owned(tmp_path / "model" / "v1") is not None


def test_what_programs_leave_everywhere_does_not_stop_a_run(interrupted: TrainConfig, tmp_path: Path) -> None:
    """A restart by a scheduler has nobody who moves them away."""
    config = dataclasses.replace(interrupted, out=shutil.copytree(interrupted.out, tmp_path / "run"))
    for name in (
        ".DS_Store",
        "._run.json",
        ".nfs0000000000a1",
        "Thumbs.db",
        ".ipynb_checkpoints/run-checkpoint.json",
    ):
        path = config.out / "checkpoints" / "checkpoint-2" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    train(config)
    assert "checkpoint-2" not in os.listdir(config.out / "checkpoints")


def test_a_run_that_fails_at_its_start_leaves_no_folder(config: TrainConfig, tmp_path: Path) -> None:
    deep = dataclasses.replace(config, out=tmp_path / "a" / "b" / "run", optim=OptimConfig(token_budget=10))
    with pytest.raises(ValueError, match="raise the budget"):
        train(deep)
    assert not (tmp_path / "a").exists()


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
