"""Every command with its parser, and how one is refused: for the tests of the command line."""

from __future__ import annotations

from functools import cache
from typing import Any

from dti_model.cli import main
from dti_model.cli.command import COMMANDS, ERROR_STATUS, command_of
from dti_model.cli.parser import Parser
from dti_model.data import SOURCES
from dti_model.error_lines import MOST_CHARACTERS

EVERY_COMMAND = [
    *(("prepare", source) for source in SOURCES),
    *((command,) for command in COMMANDS if command != "prepare"),
]
# A line's most characters, with those besides the error's own words: the command, and where help is.
MOST_OF_A_LINE = MOST_CHARACTERS + 200


@cache
def parser_of(words: tuple[str, ...]) -> Parser:
    return command_of(words)[0]


def status_of(arguments: list[str]) -> int:
    try:
        return main(arguments)
    except SystemExit as end:  # of the parser
        return int(str(end.code))


def refused(arguments: list[str], capsys: Any, status: int = ERROR_STATUS) -> str:
    """The one line of an error."""
    capsys.readouterr()
    assert status_of(arguments) == status, arguments
    error: str = capsys.readouterr().err
    assert error.endswith("\n")
    line = error[:-1]
    assert line.isprintable(), arguments
    assert "Traceback" not in line
    assert len(line) <= MOST_OF_A_LINE, arguments
    return line


def words_of(command: tuple[str, ...], options: dict[str, str]) -> list[str]:
    positional = ["smollm2-135m"] if command == ("fetch-model",) else []
    return [*command, *positional, *(f"{name}={value}" for name, value in options.items())]
