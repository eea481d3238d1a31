"""The one error type that a user of the data layer sees."""

from __future__ import annotations

from pathlib import Path


class DataError(ValueError):
    """Data is wrong, or not where it should be; the message names file, line and the way out."""


def at_line(path: Path, line: int, problem: str) -> DataError:
    """A `DataError` that points at `path:line`; lines count from 1, as editors do."""
    return DataError(f"{path}:{line}: {problem}")
