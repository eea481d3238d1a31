"""Help is quick, and in words that are no Python."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from dti_model.cli import main
from tests.cli.commands import EVERY_COMMAND
from tests.conftest import ROOT

# Each takes longer to import than help may take.
HEAVY = ("torch", "transformers", "polars", "matplotlib", "sklearn")


@pytest.mark.parametrize("command", [(), ("prepare",), *EVERY_COMMAND], ids=" ".join)
def test_help_at_every_level(command: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    """Types were shown as `<class 'Path'>` and `<function <locals>.<lambda> at 0x7f7af01a4720>`, names of settings with underscores."""
    with pytest.raises(SystemExit) as exit_:
        main([*command, "--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: {' '.join(('dti', *command))} ")
    python = r"<(?:class|function|locals|lambda)|lambda|\b(?:Optional|Union|Literal|dict|list|tuple)\[|\bNone\b|\bTrue\b|\bFalse\b"
    assert re.findall(python, text) == []
    assert re.findall(r"--[\w.-]*_[\w.-]*", text) == []
    assert re.findall(r"CONFIG|null", text) == []


@pytest.mark.parametrize(
    "command", ["--help", "train --help", "search --help", "prepare custom --help", "score --help", "trian"]
)
def test_help_imports_nothing_that_takes_long(command: str) -> None:
    """`dti --help` took five seconds: it built the parsers of all commands, and settings imported four families of models."""
    code = f"""
import sys
from dti_model.cli import main
try:
    main({command.split()})
except SystemExit:
    print([name for name in {HEAVY} if name in sys.modules])
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert ended.stdout.endswith("[]\n"), ended.stdout
