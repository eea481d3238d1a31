"""`dti evaluate --json`: a file of its own making may be replaced, and nothing else."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from dti_model import evaluation
from dti_model.cli import evaluate as evaluate_cli
from dti_model.cli import main
from dti_model.files import WriteError, write_sealed
from dti_model.files.locks import locked_beside


@pytest.fixture
def run(run_folder: Path, tmp_path: Path) -> Path:
    """A run folder of this test's own, with metrics."""
    folder = shutil.copytree(run_folder, tmp_path / "run")
    (folder / "metrics.json").write_text('{"baselines": {}, "test": {}, "val": {}}')
    return folder


def evaluate(run: Path, file: Path) -> int:
    return main(
        ["evaluate", f"--run={run}", "--split=val", "--progress=false", "--device=cpu", f"--json={file}"]
    )


@pytest.fixture
def no_scoring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        evaluation, "evaluate_run", lambda *_: pytest.fail("scored before the file was looked at")
    )


@pytest.mark.usefixtures("no_scoring")
def test_what_evaluate_did_not_write_stays(run: Path, tmp_path: Path, capsys: Any) -> None:
    """A link to a run's metrics.json, a copy of one and any JSON with a key `baselines` were written over."""
    link, copy, other, loop = (
        tmp_path / name for name in ("link.json", "copy.json", "other.json", "loop.json")
    )
    link.symlink_to(run / "metrics.json")
    shutil.copy(run / "metrics.json", copy)
    other.write_text('{"baselines": 1}')
    loop.symlink_to(loop)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for path in (link, copy, other, run / "metrics.json", run / "config.yaml", run, fifo):
        before = path.read_bytes() if path.is_file() else b""
        assert evaluate(run, path) == 2
        assert "is not a file that `dti evaluate` wrote" in capsys.readouterr().err
        assert (path.read_bytes() if path.is_file() else b"") == before
    for path in (fifo, Path("/dev/null")):
        assert evaluate(run, path) == 2
        assert "it is no regular file" in capsys.readouterr().err
    assert evaluate(run, loop) == 2
    assert "is a symbolic link to nothing" in capsys.readouterr().err


@pytest.mark.usefixtures("no_scoring")
@pytest.mark.parametrize(
    "name",
    [
        "metrics.json",
        "report.png",
        "checksums.json",
        "predictions-test.parquet",
        "model/x.json",
        "checkpoints",
        ".lock",
    ],
)
def test_names_of_a_run_folder_are_the_runs(run: Path, name: str, tmp_path: Path, capsys: Any) -> None:
    """metrics.json in the folder of an unfinished run made it a finished one."""
    (run / "metrics.json").unlink()
    (tmp_path / "link").symlink_to(run)
    for folder in (run, tmp_path / "link"):
        assert evaluate(run, folder / name) == 2
        assert "own files: choose another name" in capsys.readouterr().err


OWN_NAMES = {
    "run": [
        "metrics.json",
        "predictions-test.parquet",
        "model.json",
        "model",
        "tensorboard/x.jsonl",
        ".x.jsonl",
    ],
    "data": ["stats.json", "tokens/x.jsonl", "tokenizer"],
    "search": ["search.json", "k=3/seed-0/x.jsonl", "base", "search-folder.json"],
}


@pytest.mark.usefixtures("no_scoring")
@pytest.mark.parametrize(("folder", "name"), [(a, b) for a, names in OWN_NAMES.items() for b in names])
def test_outputs_of_commands_have_no_names_that_mean_something(
    run: Path, small_folder: Path, folder: str, name: str, tmp_path: Path, capsys: Any
) -> None:
    """A file of scores called metrics.json made a run a finished one; an export was evaluated as a run's model, and deleted."""
    (tmp_path / "search").mkdir()
    (tmp_path / "search" / "search-folder.json").write_text("{}")
    shutil.copytree(small_folder, tmp_path / "data")
    (run / "metrics.json").unlink()
    (tmp_path / "in.jsonl").write_text('{"user": "1", "candidates": ["1"]}\n')
    path = tmp_path / folder / name
    is_own = name != "model.json"
    commands = [["export", f"--run={run}", f"--out={path}", "--library-only"]]
    if path.suffix:
        commands.append(
            ["score", f"--run={run}", "--device=cpu", f"--input={tmp_path / 'in.jsonl'}", f"--output={path}"]
        )
    for command in commands:
        for _ in range(2):
            before = sorted(tmp_path.rglob("*"))
            assert main(command) == (2 if is_own else 0)
            assert ("own files: choose another name" in capsys.readouterr().err) == is_own
            assert (sorted(tmp_path.rglob("*")) == before) == is_own
            if not is_own:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.usefixtures("no_scoring")
def test_a_place_that_cannot_be_written(run: Path, capsys: Any) -> None:
    """It was noticed after the scoring."""
    assert evaluate(run, Path("/proc/out.json")) == 2
    assert "--json /proc/out.json cannot be written" in capsys.readouterr().err


@pytest.mark.usefixtures("no_scoring")
def test_a_name_that_is_too_long_for_what_is_written_beside_it(
    run: Path, tmp_path: Path, capsys: Any
) -> None:
    """It was noticed after the scoring, and the metrics were lost."""
    for length in (223, 245, 255):
        assert evaluate(run, tmp_path / ("x" * length)) == 2
        assert re.search(r"x cannot be written \(.*long", capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.usefixtures("no_scoring")
def test_a_second_evaluation_into_one_file_is_told_of_the_first(
    run: Path, tmp_path: Path, capsys: Any
) -> None:
    """Both ended well, and the file had the metrics of the later one."""
    (tmp_path / "link.json").symlink_to(tmp_path / "out.json")
    write_sealed(tmp_path / "out.json", {"written_by": "dti evaluate"})
    with locked_beside(tmp_path / "out.json", "dti evaluate"):
        for name in ("out.json", "link.json"):
            assert evaluate(run, tmp_path / name) == 2
            assert (
                f"{name} is being written by dti evaluate (process {os.getpid()} on"
                in capsys.readouterr().err
            )


def test_metrics_are_printed_where_the_file_cannot_be_written(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Hours of scoring were lost on a disk that became full meanwhile."""

    def full(*_: Any, **__: Any) -> None:
        assert (tmp_path / ".out.json.lock").exists(), "held while it is scored and written"
        raise WriteError("out.json cannot be written (No space left on device)")

    monkeypatch.setattr(evaluate_cli, "write_sealed", full)
    assert evaluate(run, tmp_path / "out.json") == 2
    printed = capsys.readouterr()
    assert "AUC" in printed.out
    assert "out.json cannot be written (No space left on device)" in printed.err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_the_file_may_lie_in_the_run_folder_and_is_replaced(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The second call said that evaluate had not written it; a stdout that was closed lost the file."""

    class Broken:
        def write(self, _: str) -> None:
            raise BrokenPipeError

        def flush(self) -> None:
            raise BrokenPipeError

    for _ in range(2):
        assert evaluate(run, run / "eval.json") == 0
    first = json.loads((run / "eval.json").read_text())
    (run / "eval.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Broken())
        evaluate(run, run / "eval.json")
    assert json.loads((run / "eval.json").read_text()) == first
    # Somebody puts a file there while it is scored.
    (run / "eval.json").unlink()
    real = evaluation.evaluate_run

    def meanwhile(*arguments: Any) -> Any:
        (run / "eval.json").write_text("mine")
        return real(*arguments)

    monkeypatch.setattr(evaluation, "evaluate_run", meanwhile)
    capsys.readouterr()
    assert evaluate(run, run / "eval.json") == 2
    assert (run / "eval.json").read_text() == "mine"
