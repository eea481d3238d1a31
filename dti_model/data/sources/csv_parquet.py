"""CSV, TSV and Parquet files as batches of columns, with the line (CSV, TSV) or row (Parquet) of every row.

CSV is RFC 4180 with a header, UTF-8, gzip or plain; blank lines are no rows. In an interaction file a line is a
row, so a stray quote spoils one line and not all up to the next quote; in an item file quoted values may hold line
ends. Lines without a quote are split in one vectorised pass, the others by Python's csv module in its strict mode,
whose longest value, 131,072 characters, is that of all. No file is ever in memory as a whole.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dti_model.data.errors import DataError, at_line
from dti_model.data.sources.rows import (
    BATCH_BYTES,
    MAX_LINE_BYTES,
    Rejected,
    check_file,
    check_ratio,
    read_lines,
)

SEPARATORS = {".csv": ",", ".tsv": "\t"}
PARQUET = (".parquet", ".pq")
_MAX_RECORDS = 50_000  # of a batch
_ROW_BYTES = 20  # of an interaction in memory
_FIRST_DAY, _END_DAY = -719_162, 2_932_897  # of the years 1 to 9999, in days since 1970
LINE = "line"  # the column that a batch has besides those asked for; they are renamed to "=name"


class Table:
    """A file of columns, read once.

    Attributes:
        path: the file.
        columns: its column names.
        rejected: the rows that could not be split into columns; the reader of the values may add to it.
        num_rows: rows read so far, rejected ones included.
    """

    def __init__(self, path: Path, columns: list[str], place: str) -> None:
        self.path, self.columns = path, columns
        self.rejected = Rejected(path, place)
        self.num_rows = 0
        repeated = sorted({name for name in columns if columns.count(name) > 1})
        if repeated:
            raise DataError(f"{path}: two columns have the name {', '.join(repeated)}")

    def batches(self, names: Sequence[str]) -> Iterator[pl.DataFrame]:
        """The columns `names`, as `=name`, and `line`, in batches, in the order of the file.

        Raises:
            DataError: there is no such column, or the file cannot be read.
        """
        missing = [name for name in names if name not in self.columns]
        if missing:
            raise DataError(
                f"{self.path}: there is no column {', '.join(missing)}; there are {', '.join(self.columns)}. Say "
                "which one it is with the option of that column"
            )
        return self._read(names)

    def _read(self, names: Sequence[str]) -> Iterator[pl.DataFrame]:
        raise NotImplementedError


def open_table(path: Path, *, multiline: bool) -> Table:
    """The reader for a file, by the end of its name; `multiline` allows line ends inside quoted CSV values.

    Raises:
        DataError: there is no such file, its name ends with nothing known, or it cannot be read or has no header.
    """
    ending = Path(path.name.removesuffix(".gz")).suffix.lower()
    is_parquet = path.suffix.lower() in PARQUET
    if ending not in SEPARATORS and not is_parquet:
        known = ", ".join((*SEPARATORS, *PARQUET))
        raise DataError(
            f"{path}: the name must end with one of {known}; .csv and .tsv may be followed by .gz"
        )
    check_file(path)
    return _Parquet(path) if is_parquet else _Csv(path, SEPARATORS[ending], multiline)


class _Csv(Table):
    def __init__(self, path: Path, separator: str, multiline: bool) -> None:
        _, batch = next(read_lines(path))
        header = batch[: batch.index(b"\n")]
        if not header.strip():
            raise at_line(path, 1, "the first line must name the columns, but is blank")
        try:
            columns = _fields(header.decode(), separator)
        except (UnicodeDecodeError, csv.Error) as error:
            raise at_line(path, 1, f"the header cannot be read ({_reason(error)})") from error
        super().__init__(path, [name.strip() for name in columns], "line")
        self._separator, self._multiline = separator, multiline

    def _read(self, names: Sequence[str]) -> Iterator[pl.DataFrame]:
        if self._multiline:
            yield from self._read_records(names)
            return
        for first, batch in read_lines(self.path):
            texts = pl.Series(self._decoded(first, batch), dtype=pl.String)
            numbers = pl.int_range(first, first + len(texts), eager=True)
            is_row = (texts != "") & (numbers > 1)
            texts, numbers = texts.filter(is_row), numbers.filter(is_row)
            self.num_rows += len(texts)
            yield self._split(texts, numbers, names)

    def _read_records(self, names: Sequence[str]) -> Iterator[pl.DataFrame]:
        wanted = [self.columns.index(name) for name in names]
        rows, numbers, num_chars = list[list[str]](), list[int](), 0
        for number, found in self._records():
            values = [found[i] for i in wanted]
            rows.append(values)
            numbers.append(number)
            num_chars += sum(map(len, values))
            if num_chars >= BATCH_BYTES or len(rows) == _MAX_RECORDS:
                yield _frame(rows, numbers, names)
                rows, numbers, num_chars = [], [], 0
        yield _frame(rows, numbers, names)

    def _decoded(self, first: int, batch: bytes) -> list[str]:
        """The lines of a batch; one that is not UTF-8 is rejected and becomes a blank one."""
        try:
            return batch.decode().split("\n")[:-1]
        except UnicodeDecodeError:
            pass
        lines = []
        for number, line in enumerate(batch.split(b"\n")[:-1], first):
            try:
                lines.append(line.decode())
            except UnicodeDecodeError as error:
                self._reject(number, f"not valid UTF-8 ({error.reason})")
                lines.append("")
        return lines

    def _split(self, lines: pl.Series, numbers: pl.Series, names: Sequence[str]) -> pl.DataFrame:
        last = len(self.columns) - 1
        plain = lines.str.count_matches(self._separator, literal=True) == last
        plain &= ~lines.str.contains('"', literal=True) & (lines.str.len_bytes() <= csv.field_size_limit())
        fields = lines.filter(plain).str.split_exact(self._separator, last).struct.rename_fields(self.columns)
        frame = fields.struct.unnest().select(pl.col(name).alias(f"={name}") for name in names)
        frame = frame.with_columns(numbers.filter(plain).alias(LINE))
        if plain.all():
            return frame
        rows, row_numbers = [], []
        for number, line in zip(numbers.filter(~plain), lines.filter(~plain)):
            try:
                found = _fields(line, self._separator)
            except csv.Error as error:
                self.rejected.add(number, _reason(error))
                continue
            if self._has_right_length(number, found):
                rows.append([found[self.columns.index(name)] for name in names])
                row_numbers.append(number)
        return pl.concat([frame, _frame(rows, row_numbers, names)]).sort(LINE)

    def _records(self) -> Iterator[tuple[int, list[str]]]:
        """First line and values of every record, which may span lines; after a bad record, reading goes on at the line behind its first."""
        batches = (self._decoded(first, batch) for first, batch in read_lines(self.path))
        lines = _Lines(line + "\n" for batch in batches for line in batch)
        next(lines)  # the header
        following = 1 + lines.forget()
        while True:
            try:
                for found in csv.reader(lines, delimiter=self._separator, strict=True):
                    number, following = following, following + lines.forget()
                    if not found:
                        continue
                    self.num_rows += 1
                    if self._has_right_length(number, found):
                        yield number, found
                return
            except csv.Error as error:
                self._reject(following, _reason(error))
                following += 1
                lines.go_back()

    def _reject(self, number: int, problem: str) -> None:
        self.num_rows += 1
        self.rejected.add(number, problem)

    def _has_right_length(self, number: int, fields: list[str]) -> bool:
        good = len(fields) == len(self.columns)
        if not good:
            self.rejected.add(number, f"a row must have {len(self.columns)} values, but has {len(fields)}")
        return good


class _Lines:
    """Lines, of which those since the last `forget` can be read again."""

    def __init__(self, lines: Iterator[str]) -> None:
        self._lines, self._again = lines, list[str]()
        self._used, self._num_chars = list[str](), 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._again.pop() if self._again else next(self._lines)
        self._used.append(line)
        self._num_chars += len(line)
        if self._num_chars > MAX_LINE_BYTES:
            raise csv.Error(f"a row of more than {MAX_LINE_BYTES:,} characters")
        return line

    def forget(self) -> int:
        """Give up going back before here. Returns the number of lines read since the last call."""
        num_lines = len(self._used)
        self._used, self._num_chars = [], 0
        return num_lines

    def go_back(self) -> None:
        """Go on at the second line since the last `forget`."""
        self._again += reversed(self._used[1:])
        self.forget()


def _frame(rows: list[list[str]], numbers: list[int], names: Sequence[str]) -> pl.DataFrame:
    values = zip(*rows) if rows else [()] * len(names)
    columns = {f"={name}": pl.Series(column, dtype=pl.String) for name, column in zip(names, values)}
    return pl.DataFrame({**columns, LINE: pl.Series(numbers, dtype=pl.Int64)})


def _fields(line: str, separator: str) -> list[str]:
    return next(csv.reader([line], delimiter=separator, strict=True), [])


def _reason(error: Exception) -> str:
    text = str(error)
    if text.startswith("new-line character"):
        return "a carriage return in a value without quotes"
    if text.startswith("field larger"):
        return (
            f"a value of more than {csv.field_size_limit():,} characters, or a quoted value that does not end"
        )
    return "a quoted value does not end" if text == "unexpected end of data" else text


class _Parquet(Table):
    def __init__(self, path: Path) -> None:
        try:
            self._file = pq.ParquetFile(path)
            columns = list(self._file.schema_arrow.names)
        except (pa.ArrowException, OSError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise DataError(f"{path}: not a complete Parquet file ({reason})") from error
        super().__init__(path, columns, "row")

    def _read(self, names: Sequence[str]) -> Iterator[pl.DataFrame]:
        for name in names:
            kind = self._file.schema_arrow.field(name).type
            if not _is_known(kind):
                raise DataError(
                    f"{self.path}: column {name} has the type {kind}, which has no plain text: make it text, a number or a time"
                )
        check_ratio(self.path, self.path.stat().st_size, self._num_bytes(names))
        try:
            for batch in self._batches(names):
                batch.validate(full=True)  # among others, that text is UTF-8
                numbers = pa.array(range(self.num_rows + 1, self.num_rows + batch.num_rows + 1), pa.int64())
                self.num_rows += batch.num_rows
                columns = {f"={name}": _plain(batch.column(name)) for name in names}
                frame = pl.from_arrow(pa.table({**columns, LINE: numbers}))
                assert isinstance(frame, pl.DataFrame)
                yield frame.with_columns(
                    _within_years(pl.col(name), kind) for name, kind in frame.schema.items()
                )
        except (pa.ArrowException, OSError, ValueError, pl.exceptions.PolarsError) as error:
            reason = str(error).partition("\n")[0]
            raise DataError(f"{self.path}: cannot be read after row {self.num_rows:,} ({reason})") from error
        if self.num_rows != self._file.metadata.num_rows:
            promised = self._file.metadata.num_rows
            raise DataError(
                f"{self.path}: holds {self.num_rows:,} rows, but its footer promises {promised:,}"
            )

    def _num_bytes(self, names: Sequence[str]) -> int:
        """Memory that the footer promises: of columns as they are read, or of rows as they are kept, whichever is more."""
        footer = self._file.metadata
        groups = [footer.row_group(index) for index in range(footer.num_row_groups)]
        chunks = [group.column(index) for group in groups for index in range(group.num_columns)]
        wanted = [chunk for chunk in chunks if chunk.path_in_schema.partition(".")[0] in names]
        return max(
            int(footer.num_rows) * _ROW_BYTES, sum(int(chunk.total_uncompressed_size) for chunk in wanted)
        )

    def _batches(self, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
        kinds = [self._file.schema_arrow.field(name).type for name in names]
        if not any(pa.types.is_nested(kind) and pa.types.is_dictionary(kind.value_type) for kind in kinds):
            yield from self._file.iter_batches(columns=list(names))
            return
        # Arrow reads no lists of categories across row groups, each of which has a dictionary of its own.
        for group in range(self._file.num_row_groups):
            yield from self._file.iter_batches(row_groups=[group], columns=list(names))


def _is_known(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _is_known(kind.value_type) and not (
            pa.types.is_nested(kind.value_type) or pa.types.is_decimal(kind.value_type)
        )
    if pa.types.is_dictionary(kind):
        return _is_known(kind.value_type)
    tests = ("string", "large_string", "string_view", "integer", "floating", "boolean", "date", "timestamp")
    return any(getattr(pa.types, f"is_{test}")(kind) for test in (*tests, "decimal", "null"))


def _plain(array: pa.Array) -> pa.Array:
    """A column in one of the few types that values are parsed from; what it says stays the same.

    Dictionaries (categories, enums) become their values, decimals their shortest text, a column of nulls empty text.
    """
    kind = array.type
    if pa.types.is_dictionary(kind):
        return _plain(array.dictionary_decode())
    if pa.types.is_decimal(kind):
        text = array.cast(pa.string())
        return pc.replace_substring_regex(text, r"^(-?\d+)\.0+$|^(-?\d+\.\d*[1-9])0+$", r"\1\2")
    plain = _plain_type(kind)
    return array if plain == kind else array.cast(plain)


def _within_years(values: pl.Expr, kind: Any) -> pl.Expr:
    """Dates and times, null where they are not of the years 1 to 9999: Polars panics where it shows or converts one far beyond."""
    if isinstance(kind, pl.List):
        return values.list.eval(_within_years(pl.element(), kind.inner))
    if isinstance(kind, pl.Datetime):
        scale = {"ms": 10**3, "us": 10**6, "ns": 10**9}[kind.time_unit]
        first, end = _FIRST_DAY * 86_400 * scale, _END_DAY * 86_400 * scale
    elif kind == pl.Date:
        first, end = _FIRST_DAY, _END_DAY
    else:
        return values
    since_1970 = values.to_physical().cast(pl.Int64)
    return pl.when(since_1970.is_between(max(first, -(2**63)), min(end, 2**63) - 1)).then(values)


@cache
def _is_known_zone(kind: pa.DataType) -> bool:
    """Whether Polars has the zone of these times: it knows names, and no "+05:30"."""
    try:
        pl.from_arrow(pa.array([], kind))
    except pl.exceptions.PolarsError:
        return False
    return True


def _plain_type(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return pa.large_list(_plain_type(kind.value_type))
    if pa.types.is_dictionary(kind):
        return _plain_type(kind.value_type)
    if pa.types.is_timestamp(kind) and not _is_known_zone(kind):
        return pa.timestamp(kind.unit, "UTC")  # the moment is the same
    if pa.types.is_float16(kind):
        return pa.float32()
    return pa.string() if pa.types.is_null(kind) or pa.types.is_string_view(kind) else kind
