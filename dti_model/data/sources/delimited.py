"""Delimited text, one record a line, checked as a whole and reported by line.

A column is parsed in one vectorised pass that leaves null where a value does not fit; only then is the first
bad line looked for. So a good file costs nothing extra and a bad one is reported as `file:line`.
"""

from __future__ import annotations

import os
from pathlib import Path

import polars as pl

from dti_model.data.errors import DataError, at_line
from dti_model.data.sources.rows import check_file, read_lines
from dti_model.shown import shown

MAX_BYTES = 1 << 28  # ten times the largest file of the sets that have this form


class DelimitedFile:
    """The lines of a text file, split into named string columns of equal height."""

    def __init__(
        self, path: Path, columns: list[str], separator: str, encoding: str, header: str | None = None
    ) -> None:
        """Read and split a file.

        Args:
            path: the file.
            columns: names of the fields of a line, in order.
            separator: what stands between two fields; may be several characters.
            encoding: text encoding.
            header: the exact first line, where the format has one.

        Raises:
            DataError: the file is missing, empty, cut short, wrongly encoded, or a line has other fields.
        """
        self.path = path
        self._first_line = 1 if header is None else 2
        lines = _read_lines(path, encoding)
        if header is not None and lines[0] != header:
            raise at_line(path, 1, f"the first line must be {header!r}, but is {shown(lines[0])}")
        self.lines = pl.Series("line", lines[self._first_line - 1 :], dtype=pl.String)
        num_separators = self.lines.str.count_matches(separator, literal=True)
        self.require(
            num_separators == len(columns) - 1,
            f"a line must have {len(columns)} fields separated by {separator!r} ({', '.join(columns)})",
        )
        fields = self.lines.str.split_exact(separator, len(columns) - 1).struct.rename_fields(columns)
        self.columns = fields.struct.unnest()

    def require(self, good: pl.Series, rule: str) -> None:
        """Raise a `DataError` at the first line where the boolean series `good` is not true."""
        bad = ~good.fill_null(False)
        if bad.any():
            row = int(bad.arg_true()[0])
            raise at_line(
                self.path, row + self._first_line, f"{rule}, but the line is {shown(self.lines[row])}"
            )

    def integers(self, column: str, low: int = 0) -> pl.Series:
        """A column as Int64, every value at least `low`."""
        values = self.columns[column].cast(pl.Int64, strict=False)
        self.require(values >= low, f"{column} must be an integer of at least {low}")
        return values

    def numbers(self, column: str, low: float, high: float) -> pl.Series:
        """A column as Float32, every value in `[low, high]`."""
        values = self.columns[column].cast(pl.Float32, strict=False)
        self.require(
            (values >= low) & (values <= high), f"{column} must be a number from {low:g} to {high:g}"
        )
        return values

    def ids(self, column: str) -> pl.Series:
        """A column of positive integers as text; 007 is 7."""
        return self.integers(column, low=1).cast(pl.String)

    def unique_ids(self, column: str) -> pl.Series:
        """`ids`, none of them twice."""
        values = self.ids(column)
        self.require(values.is_first_distinct(), f"{column} must not repeat an earlier line's")
        return values


def _read_lines(path: Path, encoding: str) -> list[str]:
    check_file(path)
    if path.stat().st_size > MAX_BYTES:
        raise DataError(
            f"{path}: more than {MAX_BYTES:,} bytes, which no file of this data set has. Fetch it again."
        )
    raw = b"".join(batch for _, batch in read_lines(path))
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise at_line(path, line, f"not valid {encoding} ({error.reason}). Fetch the file again.") from error
    # Not splitlines(): it also breaks at characters such as \x85, which latin-1 titles may hold.
    lines = text.split("\n")[:-1]
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        if file.read() != b"\n":
            raise at_line(
                path, len(lines), "the last line has no line end: the file is cut short. Fetch it again."
            )
    return lines
