"""The README holds: its Python runs, its commands exist, its figures are those of the recorded results."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.made_up import made_up_data
from dti_model.cli import main
from dti_model.config import ModelConfig, TrainConfig
from dti_model.run import MODEL_FOLDER, Run
from tests.conftest import ROOT

TEXT = (ROOT / "README.md").read_text()
PYTHON_BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
SHELL_LINES = [
    line.split("#")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
    for line in block.splitlines()
]


def test_python_blocks_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a folder with a quickstart run, untrained."""
    folder = tmp_path / "runs" / "quickstart"
    config = TrainConfig(
        data=made_up_data(tmp_path), out=folder, model=ModelConfig(layers=1, width=16, heads=2, kv_heads=1)
    )
    folder.mkdir(parents=True)
    config.save(folder)
    run = Run.start(config)
    run.model.save_pretrained(folder / MODEL_FOLDER)
    run.tokenizer.save_pretrained(folder / MODEL_FOLDER)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in PYTHON_BLOCKS:
        exec(block, names)
    assert names["q"].grad is not None
    ranked = [line for line in capsys.readouterr().out.splitlines() if line.startswith("0.")]
    assert len(ranked) == len(names["candidates"])
    probabilities = [float(line.split()[0]) for line in ranked]
    assert sorted(probabilities, reverse=True) == probabilities
    assert any(line.endswith("The Grand Budapest Hotel (2014); Comedy, Drama") for line in ranked)


@pytest.mark.parametrize("command", [line for line in SHELL_LINES if line.startswith("make ")])
def test_make_targets_exist(command: str) -> None:
    subprocess.run(["make", "--dry-run", *command.split()[1:]], check=True, cwd=ROOT, capture_output=True)


@pytest.mark.parametrize("command", [line for line in SHELL_LINES if "/dti " in line])
def test_dti_commands_parse(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Their subcommand (and its source) and every flag is one that --help lists."""
    words = command.split()[1:]
    flags = [word for word in words if word.startswith("--")]
    with pytest.raises(SystemExit):
        main([*words[: words.index(flags[0])], "--help"])
    listed = capsys.readouterr().out
    for flag in flags:
        assert flag in listed, flag


def test_ci_runs_the_test_command_of_the_readme() -> None:
    assert "make test" in SHELL_LINES
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_generated_parts_are_those_of_the_results() -> None:
    assert report.render(TEXT) == TEXT


def test_paths_named_in_the_readme_exist() -> None:
    for path in re.findall(r"\]\((benchmarks/[^)]+)\)", TEXT):
        assert (ROOT / path).is_file(), path
