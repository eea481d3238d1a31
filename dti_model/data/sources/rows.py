"""Rows on their way in: whole lines in batches, ids as numbers, and a list of the rows that were rejected.

A loader reads a file once, batch by batch, so its memory is the finished columns (20 bytes a row, and 4 for each extra column), one
entry per distinct id or extra value, and one batch. Every row of a file is kept or rejected, and a rejected row is listed with its line.
"""

from __future__ import annotations

import codecs
import gzip
import os
import stat
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import polars as pl

from dti_model.data.errors import DataError, at_line
from dti_model.shown import MAX_CHARS, one_line

BATCH_BYTES = 1 << 24
MAX_LINE_BYTES = 1 << 24  # a file without line ends must not fill the memory
GZIP_MAGIC = b"\x1f\x8b"
# Logs shrink 5 to 20 times. A large file that shrinks 200 times was made to fill the memory.
MAX_UNPACKED_RATIO, MIN_BOMB_BYTES = 200, 1 << 26
_WIDE = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
INTERACTION_SCHEMA = {"user": pl.Int32, "item": pl.Int32, "timestamp": pl.Int64, "rating": pl.Float32}
NUM_SHOWN = 5
MAX_LISTED = 1_000_000  # rejected rows that are held in memory
MAX_REJECTED = 0.01  # default share of a file's rows


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Batches of whole lines of a plain or gzip file, each with the number of its first line, counted from 1.

    Every batch ends with a line feed; one is added where the last line has none. CR LF becomes LF, and a byte order mark of UTF-8
    before the first line goes.

    Raises:
        DataError: the file cannot be read, is empty, is a damaged gzip file, holds another encoding or other line ends, has an
            endless line, or unpacks to more than a text does.
    """
    check_file(path)
    line, rest = 1, b""
    try:
        with _open(path) as file:
            block = _without_mark(path, file.read(BATCH_BYTES))
            _check_line_ends(path, block)
            while block:
                block = rest + block
                stop = block.rfind(b"\n") + 1
                rest = block[stop:]
                if len(rest) > MAX_LINE_BYTES:
                    raise at_line(
                        path,
                        line + block.count(b"\n", 0, stop),
                        f"a line of more than {MAX_LINE_BYTES:,} bytes. Shorten it, or leave its longest values out.",
                    )
                if stop:
                    yield line, block[:stop].replace(b"\r\n", b"\n")
                    line += block.count(b"\n", 0, stop)
                block = file.read(BATCH_BYTES)
                check_ratio(path, os.fstat(file.fileno()).st_size, file.tell())
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(
            f"{path}: cannot be read after line {line - 1:,} ({reason}). Get the file again, whole."
        ) from error
    if rest:
        yield line, rest.removesuffix(b"\r") + b"\n"
    elif line == 1:
        raise at_line(path, 1, "the file is empty.")


def check_file(path: Path) -> None:
    """Raise a DataError unless there is such a file; a named pipe would let its reader wait for ever."""
    try:
        is_file = stat.S_ISREG(path.stat().st_mode)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if not is_file:
        raise DataError(f"{path}: not a file")


def _without_mark(path: Path, head: bytes) -> bytes:
    """The first bytes of a text file without the byte order mark of UTF-8.

    Raises:
        DataError: they are UTF-16 or UTF-32, which spreadsheets call Unicode text.
    """
    if head.startswith(_WIDE) or b"\0" in head[:2]:  # without a mark, every other byte of such a text is 0
        raise at_line(path, 1, "not UTF-8 but UTF-16, UTF-32 or no text at all. Save the file as UTF-8.")
    return head.removeprefix(codecs.BOM_UTF8)


def _check_line_ends(path: Path, head: bytes) -> None:
    """Raise a DataError where lines end with a carriage return alone, so that the file would be one line."""
    if b"\n" not in head and b"\r" in head.rstrip(b"\r"):
        raise at_line(
            path, 1, "lines end with a carriage return alone. Save the file with line feeds (LF or CR LF)."
        )


def check_ratio(path: Path, packed: int, unpacked: int) -> None:
    """Raise a DataError where a file of `packed` bytes holds so many that it was made to fill the memory."""
    if unpacked > max(MIN_BOMB_BYTES, MAX_UNPACKED_RATIO * packed):
        raise DataError(
            f"{path}: {packed:,} bytes unpack to {unpacked:,} or more, which no log does. If that is meant, store the file without "
            "compression and name that one."
        )


def _open(path: Path) -> BinaryIO:
    with path.open("rb") as file:
        zipped = file.read(2) == GZIP_MAGIC
    return gzip.open(path) if zipped else path.open("rb")  # type: ignore[return-value]


class IdTable:
    """Numbers ids in the order of their first appearance."""

    def __init__(self) -> None:
        self._codes: dict[str, int] = {}

    def encode(self, ids: list[str]) -> npt.NDArray[np.int32]:
        """The number of each id, int32; a new id gets the next one."""
        codes = self._codes
        return np.array([codes.setdefault(name, len(codes)) for name in ids], dtype=np.int32)

    def names(self) -> pl.Series:
        """The ids by number."""
        return pl.Series("id", list(self._codes), dtype=pl.String)


class Interactions:
    """Collects the interactions of a source, batch by batch.

    Attributes:
        users, items: the ids.
        extra: the values of each extra column, by its name.
        num_dropped: rows that `drop_duplicates` took out.
    """

    def __init__(self) -> None:
        self.users, self.items = IdTable(), IdTable()
        self.extra: dict[str, IdTable] = {}
        self.num_dropped = 0
        self._batches: list[pl.DataFrame] = []

    def add(
        self,
        users: list[str],
        items: list[str],
        timestamps: pl.Series,
        ratings: pl.Series,
        extra: Mapping[str, pl.Series] | None = None,
    ) -> None:
        """Append rows: ids as text, times as integers, ratings as numbers, and the same `extra` columns every time, as text (null is "").

        Extra columns are kept as numbers of their distinct values: what decides is how many of those there are.
        """
        columns = {
            "user": self.users.encode(users),
            "item": self.items.encode(items),
            "timestamp": timestamps.cast(pl.Int64),
            "rating": ratings.cast(pl.Float32),
        }
        frame = pl.DataFrame(columns, schema=INTERACTION_SCHEMA)
        coded = [self._coded(name, values) for name, values in (extra or {}).items()]
        self._batches.append(frame.with_columns(coded))

    def _coded(self, name: str, values: pl.Series) -> pl.Series:
        texts = values.cast(pl.String).fill_null("")
        distinct = texts.unique(maintain_order=True)
        codes = self.extra.setdefault(name, IdTable()).encode(distinct.to_list())
        found = texts.replace_strict(distinct, pl.Series(codes), return_dtype=pl.Int32)
        return found.alias(f"={name}")

    def drop_duplicates(self) -> None:
        """Keep the first of the rows that are equal in all columns.

        Sorting takes 46 bytes a row for a moment, less than `index_rows` does later; a hash table of the rows takes 200.
        """
        frame = self.frame()
        columns = [column.to_numpy() for column in frame]
        order = np.lexsort(columns)  # stable: the first of equal rows stays before the others
        equal = np.ones(max(order.size - 1, 0), dtype=bool)
        for column in columns:
            ordered = column[order]
            equal &= ordered[1:] == ordered[:-1]
        kept = np.ones(order.size, dtype=bool)
        kept[order[1:][equal]] = False
        self.num_dropped += int(equal.sum())
        self._batches = [frame.filter(pl.Series(kept))]

    def frame(self) -> pl.DataFrame:
        """All rows, one chunk per batch: joining them would hold everything twice."""
        if not self._batches:
            return pl.DataFrame(schema=INTERACTION_SCHEMA)
        return pl.concat(self._batches, rechunk=False)


class Rejected:
    """The rows of one raw file that cannot be used, each with its line and the reason."""

    def __init__(self, path: Path, place: str = "line") -> None:
        """Start an empty list for `path`; `place` is what the numbers count: "line" or "row"."""
        self.path, self.place = path, place
        self._lines: list[int] = []
        self._problems: list[str] = []

    def __len__(self) -> int:
        return len(self._lines)

    def add(self, line: int, problem: str) -> None:
        """Note one row.

        Raises:
            DataError: so many rows that this cannot be the right kind of file.
        """
        if len(self) == MAX_LISTED:
            raise DataError(
                f"{self.path}: more than {MAX_LISTED:,} rows cannot be used. Mend the file. The first: {'; '.join(self.first())}"
            )
        self._lines.append(line)
        self._problems.append(one_line(problem, MAX_CHARS))

    def frame(self) -> pl.DataFrame:
        """file, line and problem of every rejected row, in the order of the file."""
        columns = {"file": [self.path.name] * len(self), "line": self._lines, "problem": self._problems}
        schema = {"file": pl.String, "line": pl.Int64, "problem": pl.String}
        return pl.DataFrame(columns, schema=schema).sort("line", maintain_order=True)

    def first(self) -> list[str]:
        """The first few as text, `file:line: problem`."""
        head = self.frame().head(NUM_SHOWN)
        place = ":" if self.place == "line" else f" {self.place} "
        return [f"{one_line(file)}{place}{line}: {problem}" for file, line, problem in head.iter_rows()]

    def check(self, num_rows: int, limit: float) -> None:
        """Stop when more than the share `limit` of the file's `num_rows` rows was rejected.

        Raises:
            DataError: with the count, the first few rows and the way out.
        """
        if len(self) > limit * num_rows:
            share = len(self) / num_rows
            raise DataError(
                f"{self.path}: {len(self):,} of {num_rows:,} rows ({share:.2%}) cannot be used, more than "
                f"max_rejected = {limit:g} allows. Mend the file, or allow more with max_rejected (--max-rejected). "
                f"The first: {'; '.join(self.first())}"
            )


def check_limits(max_rejected: float, max_chars: int) -> None:
    """Raise a ValueError unless `max_rejected` is a share from 0 to 1 and `max_chars` at least 1."""
    if not 0 <= max_rejected <= 1:
        raise ValueError(f"max_rejected must be a share of the rows from 0 to 1, but is {max_rejected}")
    if max_chars < 1:
        raise ValueError(f"max_chars must be at least 1, but is {max_chars}")
