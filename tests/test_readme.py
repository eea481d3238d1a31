"""The README holds: its Python runs, its commands exist, its figures are those of the recorded results."""

from __future__ import annotations

import re
import subprocess

import pytest

from benchmarks import report
from dti_model.cli import main
from tests.conftest import ROOT

TEXT = (ROOT / "README.md").read_text()
PYTHON_BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
SHELL_LINES = [
    line.split("#")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
    for line in block.splitlines()
]


def test_python_blocks_run() -> None:
    assert PYTHON_BLOCKS
    for block in PYTHON_BLOCKS:
        names: dict = {}
        exec(block, names)
        assert names["q"].grad is not None


@pytest.mark.parametrize("command", [line for line in SHELL_LINES if line.startswith("make ")])
def test_make_targets_exist(command: str) -> None:
    subprocess.run(["make", "--dry-run", *command.split()[1:]], check=True, cwd=ROOT, capture_output=True)


@pytest.mark.parametrize("command", [line for line in SHELL_LINES if "/dti " in line])
def test_dti_commands_parse(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Their subcommand and every flag is one that --help lists."""
    words = command.split()
    with pytest.raises(SystemExit):
        main([words[1], "--help"])
    listed = capsys.readouterr().out
    for word in words[2:]:
        assert not word.startswith("--") or word in listed, word


def test_ci_runs_the_test_command_of_the_readme() -> None:
    assert "make test" in SHELL_LINES
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_generated_parts_are_those_of_the_results() -> None:
    assert report.render(TEXT) == TEXT


def test_paths_named_in_the_readme_exist() -> None:
    for path in re.findall(r"\]\((benchmarks/[^)]+)\)", TEXT):
        assert (ROOT / path).is_file(), path
