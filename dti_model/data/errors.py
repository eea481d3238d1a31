"""The one error type that a user of the data layer sees."""

from __future__ import annotations

from pathlib import Path

from dti_model.shown import one_line

MAX_MESSAGE_CHARS = 2000


class DataError(ValueError):
    """Data is wrong, or not where it should be; the message, one line, names file, line and the way out."""

    def __init__(self, message: str) -> None:
        """File names, column names and values may stand in the message as they are."""
        super().__init__(one_line(message, MAX_MESSAGE_CHARS))


def at_line(path: Path, line: int, problem: str) -> DataError:
    """A `DataError` that points at `path:line`; lines count from 1, as editors do."""
    return DataError(f"{path}:{line}: {problem}")
