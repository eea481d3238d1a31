"""How commands end: bugs, --debug, launchers, broken outputs and random words have a line and a status of their own."""

from __future__ import annotations

import importlib
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dti_model.cli.command import BUG_STATUS, COMMANDS, ERROR_STATUS
from dti_model.config.bounds import check_settings
from dti_model.error_lines import MOST_CHARACTERS, joined, line_of, line_of_bug, reason_of
from dti_model.launch import num_processes
from tests.cli.commands import EVERY_COMMAND, parser_of, refused, status_of, words_of
from tests.conftest import ROOT

pytestmark = pytest.mark.usefixtures("quick")


class Unheard(Exception):
    """Of a library that nobody has thought of."""


def raising(error: BaseException) -> Callable[..., None]:
    def fail(*_: Any) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    "error",
    [
        TypeError("a\nb" * 5000),
        KeyError("x"),
        AssertionError(),
        Unheard("\x1b"),
        ZeroDivisionError(),
        StopIteration(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_bugs_have_a_line_and_a_status_of_their_own(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """A traceback, and the status 1."""
    monkeypatch.setattr("dti_model.cli.evaluate.run", raising(error))
    line = refused(["evaluate", "--run=x"], capsys, BUG_STATUS)
    start = rf"dti evaluate: a bug in dti, {type(error).__name__} at dti_model/cli/command\.py:\d+: "
    assert re.match(start, line), line
    assert line.endswith("Run the command again with --debug, which shows all of it, and report that")


@pytest.mark.parametrize("place", [0, 1, 2])
def test_debug_shows_the_traceback_wherever_it_stands(place: int, capsys: Any) -> None:
    """Behind the subcommand it was an unrecognized argument, and the line that names it is printed there."""
    arguments = ["evaluate", "--run=nowhere"]
    plain = refused(arguments, capsys)
    assert status_of([*arguments[:place], "--debug", *arguments[place:]]) == ERROR_STATUS
    error = capsys.readouterr().err
    assert error.startswith("Traceback (most recent call last)")
    assert error.endswith(f"\n{plain}\n")


def test_lines_of_errors() -> None:
    """Of OSErrors the file comes first; a library's own words say whose they are; the way out at the end of long ones stays."""
    assert (
        line_of(FileNotFoundError(2, "No such file or directory", "a\x00b"))
        == "a\\x00b: No such file or directory"
    )
    assert line_of(MemoryError()) == "out of memory: use a smaller model or token budget"
    assert (
        line_of(RuntimeError("CUDA\nerror")) == "CUDA error (RuntimeError of a library; --debug shows where)"
    )
    announced = ValueError("Validation error for 'sizes':\n    ValueError: 15 is no multiple of 2.\nmore")
    assert reason_of(announced) == "Validation error for 'sizes': ValueError: 15 is no multiple of 2."
    assert reason_of(ValueError("first\nsecond")) == "first"
    assert reason_of(KeyError()) == "KeyError"
    with pytest.raises(TypeError) as raised:
        check_settings(3)
    assert "TypeError at dti_model/config/bounds.py:" in line_of_bug(raised.value)
    long = joined("x" * 10**6 + " delete it")
    assert len(long) < MOST_CHARACTERS
    assert long.endswith("x delete it")
    assert joined("r\udcff\u202e") == "r\\udcff\\u202e"


# -- launchers ------------------------------------------------------------------------------------------------------------

TWO = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "x", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "abc"}, r"WORLD_SIZE in the environment must be an integer >= 1, got 'abc'"),
        ({"WORLD_SIZE": "0"}, r"WORLD_SIZE .* got '0'"),
        ({"WORLD_SIZE": ""}, r"WORLD_SIZE .* got ''"),
        ({"RANK": "9" * 5000}, r"RANK .* got '9{60}'"),
        ({"LOCAL_RANK": "1.0"}, r"LOCAL_RANK .* got '1\.0'"),
        ({"WORLD_SIZE": "2"}, r"WORLD_SIZE=2 and no RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT: start with torchrun"),
        ({**TWO, "RANK": "2"}, r"RANK=2 in the environment must be below WORLD_SIZE=2"),
    ],
)  # fmt: skip
def test_ranks_of_no_sense(
    environment: dict[str, str],
    message: str,
    bases: dict[tuple[str, ...], dict[str, str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    """`invalid literal for int()`, or half an hour of waiting for a process that nobody had started."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for command in (("train",), ("search",), ("evaluate",), ("score",), ("prepare", "custom")):
        assert re.search(message, refused(words_of(command, bases[command]), capsys)), command


def test_commands_of_one_process(
    bases: dict[tuple[str, ...], dict[str, str]], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Under torchrun all ranks scored into one file, and the slower ones were told that it existed."""
    assert num_processes() == 1
    for name, value in TWO.items():
        monkeypatch.setenv(name, value)
    assert num_processes() == 2
    alone = [command for command in EVERY_COMMAND if command[0] not in ("train", "search", "evaluate")]
    for command in alone:
        line = refused(words_of(command, bases[command]), capsys)
        assert f"dti {command[0]} runs in one process, and WORLD_SIZE=2" in line
    monkeypatch.setenv("WORLD_SIZE", "-1")
    assert num_processes() == 1


# -- real processes -------------------------------------------------------------------------------------------------------


def test_closed_and_full_outputs(tmp_path: Path) -> None:
    """Errors that cannot be printed have their status all the same; one process forks for each, so that modules are imported once."""
    code = """
import os, sys
from dti_model.cli.command import command_of, main
command_of(["train"])
def status(arguments, *redirected):
    if os.fork() == 0:
        for descriptor, path in redirected:
            os.close(descriptor)
            if path: os.open(path, os.O_WRONLY)
        sys.stdout, sys.stderr = (None if not path else open(descriptor, "w") for descriptor, path in redirected)
        try: status = main(arguments)
        except SystemExit as end: status = end.code
        os._exit(status)
    return os.waitstatus_to_exitcode(os.wait()[1])
for path in (None, "/dev/full"):
    for arguments in (["train", "--k=1:30"], ["trian"], ["--help"]):
        print(status(arguments, (1, path), (2, path)), end=" ", flush=True)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert ended.stdout == "2 2 0 2 2 0 "
    assert ended.stderr == ""


# -- random words ---------------------------------------------------------------------------------------------------------

EXAMPLES = int(os.environ.get("DTI_FUZZ_EXAMPLES", "100"))
NAMES = st.deferred(
    lambda: st.sampled_from(
        sorted({name for words in EVERY_COMMAND for name in parser_of(words)._option_string_actions})
    )
)
VALUES = ["", "x", "nan", "-1", "1e999", "9" * 5000, "[" * 60, "{a: {b: [1]}}", "&a [*a]", "\0", "\udcff", "\x1b[0m", "a\nb", "~", "true", "3",
          "!!python/name:os.system", "--", "{k: [3]}", "optim: 3", "'", "%s", "{", "x" * 5000, "1:30", "null", "val"]  # fmt: skip
WORDS = st.one_of(
    st.sampled_from([word for command in EVERY_COMMAND for word in command]),
    NAMES,
    st.sampled_from(VALUES),
    st.builds("{}={}".format, NAMES, st.sampled_from(VALUES) | st.text(max_size=9)),
    st.text(max_size=5).map("--{}".format),
)


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(
    command=st.sampled_from([(), *EVERY_COMMAND]),
    words=st.lists(WORDS, max_size=5),
    is_complete=st.booleans(),
)
def test_random_words(
    command: tuple[str, ...],
    words: list[str],
    is_complete: bool,
    bases: dict[tuple[str, ...], dict[str, str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    """Parsed to the end, or one line; what commands do has its own tests."""
    for name in COMMANDS:
        module = importlib.import_module(f"dti_model.cli.{name.replace('-', '_')}")
        monkeypatch.setattr(module, "run", lambda *_: None)
    base = words_of(command, bases[command]) if command and is_complete else list(command)
    arguments = [word for word in [*base, *words] if word not in ("-h", "--debug")]
    capsys.readouterr()
    status = status_of(arguments)
    assert status in (0, ERROR_STATUS), arguments
    if status == ERROR_STATUS:
        refused(arguments, capsys)


def test_a_library_in_a_folder_of_our_name_is_a_library(tmp_path: Path) -> None:
    """An environment below a checkout called dti_model made every library's error the project's own."""
    path = tmp_path / "dti_model" / "library.py"
    path.parent.mkdir()
    path.write_text("raise RuntimeError('x')")
    with pytest.raises(RuntimeError) as raised:
        runpy.run_path(str(path))
    assert line_of(raised.value) == "x (RuntimeError of a library; --debug shows where)"
    assert "library.py" not in line_of_bug(raised.value)
