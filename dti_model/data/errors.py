"""Errors of the data layer, whose messages are one line."""

from __future__ import annotations

from pathlib import Path

from dti_model.shown import one_line

MAX_CHARS = 2000  # of a message


class OneLineError(ValueError):
    """An error whose message is made one printable line: names of files and columns, and values, may stand in it as they are."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message, MAX_CHARS))


class DataError(OneLineError):
    """Data is wrong, or not where it should be; the message names file, line and the way out."""


def at_line(path: Path, line: int, problem: str) -> DataError:
    """A `DataError` that points at `path:line`; lines count from 1, as editors do."""
    return DataError(f"{path}:{line}: {problem}")
