"""The input of `dti score`: lines of a file that must not change while they are scored, and requests made of them."""

from __future__ import annotations

import codecs
import hashlib
import itertools
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from dti_model.error_lines import reason_of
from dti_model.scorer.items import ItemError, check_text, user_text
from dti_model.scorer.requests import Request
from dti_model.scorer.scorer import Scorer
from dti_model.shown import one_line, shown

JSON_SUFFIXES, PARQUET_SUFFIXES = (".jsonl", ".json", ".ndjson"), (".parquet", ".pq")
FIELDS = {"user", "history", "candidates", "profile", "context"}
MAX_DEPTH = 16  # of a line; a request with nested fields has 5 or so
MAX_LINE_BYTES = 1 << 24  # a hundred thousand candidates with texts
BATCH_ROWS = 64
_BLOCK_BYTES = 1 << 20

MAX_USER_CHARS = 4096  # of an id: it stands in the output, also of a line that cannot be scored
# First bytes of other kinds of files, in which every line would be a bad one.
_OTHER_KINDS = {
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
    b"\x1f\x8b": "compressed (gzip)",
    b"PAR1": "Parquet",
}

Line = bytes | dict[str, Any] | ItemError  # the last in the place of a Parquet row that cannot be read


class InputChangedError(ValueError):
    """The input was written to, replaced or removed while it was scored."""


class InputFile:
    """A file of requests, held open.

    A file that changes in between would give an output of two inputs. So its content is digested first, its stamp (inode, size, time of
    change) is compared before the scores of every chunk are kept, and the digest is compared before the output appears.

    Attributes:
        path: of the file.
        num_lines: JSON lines up to the last that is not blank, or Parquet rows.
        facts: `bytes` and `sha256` of the content.

    Cost: two passes of sha256, about 1.5 GB/s.
    """

    def __init__(self, path: Path) -> None:
        """Open and digest a file.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is no regular file, or not what its name says.
        """
        if not path.exists():
            raise FileNotFoundError(f"{one_line(path)} does not exist")
        if not path.is_file():
            raise ValueError(
                f"{one_line(path)} is no regular file: an interrupted job reads its input again, so write it to a file"
            )
        self.path, self._is_parquet = path, is_parquet(path)
        self._file = path.open("rb")
        try:
            self._stamp = _stamp(os.fstat(self._file.fileno()))
            if not self._is_parquet:
                _check_kind(path, self._file)
            self.facts, num_lines = _digest(self._file)
            self.num_lines = self._num_rows() if self._is_parquet else num_lines
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> InputFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def lines(self, after: int) -> Iterator[tuple[int, Line]]:
        """Lines behind the first `after`, with their numbers: bytes of JSON, or fields of a Parquet row."""
        self._file.seek(0)
        lines: Iterator[Line] = self._rows() if self._is_parquet else self._json_lines()
        return itertools.islice(enumerate(lines, 1), after, self.num_lines)

    def _json_lines(self) -> Iterator[bytes]:
        """Lines; a line that is too long is cut, one byte beyond what is allowed."""
        while line := self._file.readline(MAX_LINE_BYTES + 1):
            yield line
            while len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
                line = self._file.readline(MAX_LINE_BYTES + 1)

    def check_stamp(self) -> None:
        """Raise an InputChangedError where the file was written to, replaced or removed."""
        try:
            same = _stamp(self.path.stat()) == self._stamp
        except FileNotFoundError:
            same = False
        if not same:
            raise InputChangedError(
                f"{one_line(self.path)} changed while it was being scored. Earlier scores are kept: give the same command again with "
                "the file as it was, or score the new one into another --output"
            )

    def has_same_content(self) -> bool:
        """Whether the content is still what it was at the start: some writes leave the time of change as it is."""
        self._file.seek(0)
        return _digest(self._file)[0] == self.facts

    def _num_rows(self) -> int:
        with self._readable_parquet():
            file = pq.ParquetFile(self._file)
            if (twice := _repeated_column(file.schema_arrow)) is not None:
                raise ValueError(
                    f"{one_line(self.path)} has two columns {one_line(twice)}: which one counts is not known, so keep one"
                )
            return int(file.metadata.num_rows)

    def _rows(self) -> Iterator[dict[str, Any] | ItemError]:
        with self._readable_parquet():
            for batch in pq.ParquetFile(self._file).iter_batches(batch_size=BATCH_ROWS):
                try:
                    yield from batch.to_pylist()
                except (ValueError, OverflowError):  # of one of its rows
                    yield from (_row(batch, index) for index in range(batch.num_rows))

    @contextmanager
    def _readable_parquet(self) -> Iterator[None]:
        """Errors of Parquet's reader as one line that names the file."""
        try:
            yield
        except (pa.ArrowException, OSError) as error:
            raise ValueError(
                f"{one_line(self.path)} cannot be read as Parquet ({one_line(reason_of(error))})"
            ) from error


def _row(batch: pa.RecordBatch, index: int) -> dict[str, Any] | ItemError:
    """A row, or why it cannot be read: text that is not UTF-8, or a date that Python does not know."""
    try:
        row: dict[str, Any] = batch.slice(index, 1).to_pylist()[0]
        return row
    except (ValueError, OverflowError) as error:
        return ItemError(f"a value cannot be read ({error})")


def _check_kind(path: Path, file: BinaryIO) -> None:
    head = file.read(max(map(len, _OTHER_KINDS)))
    file.seek(0)
    for start, kind in _OTHER_KINDS.items():
        if head.startswith(start):
            raise ValueError(f"{one_line(path)} is {kind}, not JSON lines in UTF-8: convert it")


def is_parquet(path: Path) -> bool:
    """Whether a file is Parquet, by its suffix, or JSON lines.

    Raises:
        ValueError: the suffix says neither JSON lines nor Parquet.
    """
    if path.suffix in PARQUET_SUFFIXES:
        return True
    if path.suffix in JSON_SUFFIXES:
        return False
    raise ValueError(
        f"{one_line(path)}: the name must end in one of {', '.join(JSON_SUFFIXES + PARQUET_SUFFIXES)}, "
        f"got {one_line(path.suffix) or 'no suffix'}"
    )


def _stamp(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _repeated_column(fields: Iterable[pa.Field]) -> str | None:
    """A name that two columns have, or two fields of a struct in one."""
    fields = list(fields)
    name, count = Counter(field.name for field in fields).most_common(1)[0] if fields else ("", 0)
    if count > 1:
        return str(name)
    return next(filter(None, (_repeated_column(_entries(field.type)) for field in fields)), None)


def _entries(kind: pa.DataType) -> list[pa.Field]:
    """The fields of a struct, or the field that describes a list's entries."""
    if pa.types.is_struct(kind):
        return [kind.field(index) for index in range(kind.num_fields)]
    return [kind.value_field] if pa.types.is_list(kind) or pa.types.is_large_list(kind) else []


def _digest(file: BinaryIO) -> tuple[dict[str, Any], int]:
    """Facts of a file's content, and its lines up to the last that is not blank."""
    digest, size, num_ends, num_lines = hashlib.sha256(), 0, 0, 0
    while block := file.read(_BLOCK_BYTES):
        digest.update(block)
        size += len(block)
        if filled := block.rstrip():
            num_lines = num_ends + filled.count(b"\n") + 1
        num_ends += block.count(b"\n")
    return {"bytes": size, "sha256": digest.hexdigest()}, num_lines


def user_of(fields: Mapping[str, Any]) -> str | None:
    """The user that a line names; None where it names none.

    Raises:
        ItemError: it is no id.
    """
    user = fields.get("user")
    if user is None:
        return None
    text = user_text(user)
    check_text(text)
    if len(text) > MAX_USER_CHARS:
        raise ItemError(f"a user's id has at most {MAX_USER_CHARS:,} characters, got {shown(text)}")
    return text


def fields_of(line: Line) -> Mapping[str, Any]:
    """A line's fields; those that are null are absent.

    Raises:
        ItemError: no JSON, no object, nested without end, or with a field twice, or one that no request has.
    """
    if isinstance(line, ItemError):
        raise line
    value = _parsed(line) if isinstance(line, bytes) else line
    if not isinstance(value, Mapping):
        raise ItemError(f"a line must be an object with {', '.join(sorted(FIELDS))}, got {shown(value)}")
    fields: Mapping[str, Any] = _without_nulls(value, MAX_DEPTH)
    if unknown := fields.keys() - FIELDS:
        raise ItemError(f"unknown field {shown(min(unknown))}: a line has {', '.join(sorted(FIELDS))}")
    return fields


def _parsed(line: bytes) -> Any:
    """The value of a line of JSON; a byte order mark before it is skipped."""
    if len(line) > MAX_LINE_BYTES:
        raise ItemError(
            f"a line of more than {MAX_LINE_BYTES:,} bytes: put its candidates into several lines, each with the history"
        )
    line = line.removeprefix(codecs.BOM_UTF8).rstrip(b"\r\n")
    try:
        return json.loads(line.decode(), object_pairs_hook=_without_repeats)
    except ItemError:
        raise
    except UnicodeDecodeError as error:
        raise ItemError(
            f"not valid UTF-8 ({error.reason}, byte {error.start + 1:,} of {len(line):,})"
        ) from None
    except json.JSONDecodeError as error:
        raise ItemError(
            f"not valid JSON ({error.msg}, character {error.pos + 1:,} of {len(error.doc):,})"
        ) from None
    except ValueError:  # Python's own limit, against the time that it would take
        raise ItemError(f"an integer of more than {sys.get_int_max_str_digits():,} digits") from None
    except RecursionError:
        raise ItemError(f"nested more than {MAX_DEPTH} deep") from None


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object with each key once: of two equal keys, readers disagree on which counts."""
    value = dict(pairs)
    if len(value) < len(pairs):
        (name, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ItemError(f"the field {shown(name)} stands twice in one object")
    return value


def _without_nulls(value: Any, depth: int) -> Any:
    """A value without null fields: Parquet structs have every field in every row."""
    if isinstance(value, (Mapping, list)) and not depth:
        raise ItemError(f"nested more than {MAX_DEPTH} deep")
    if isinstance(value, Mapping):
        return {key: _without_nulls(x, depth - 1) for key, x in value.items() if x is not None}
    return [_without_nulls(x, depth - 1) for x in value] if isinstance(value, list) else value


def request_of(scorer: Scorer, fields: Mapping[str, Any]) -> Request:
    """A line's request.

    Raises:
        ItemError: a field is missing, or names what is not there.
    """
    if "candidates" not in fields:
        raise ItemError("no candidates: give a list of items")
    if "history" not in fields and "user" not in fields:
        raise ItemError("neither a history nor a user of the prepared data")
    history = fields["history"] if "history" in fields else scorer.history_of(fields["user"])
    if isinstance(history, list):
        history = [
            tuple(entry[name] for name in ("item", "label", "context") if name in entry)
            if isinstance(entry, Mapping)
            and {"item", "label"} <= entry.keys() <= {"item", "label", "context"}
            else entry
            for entry in history
        ]
    user, profile, context = (fields.get(name) for name in ("user", "profile", "context"))
    return scorer.request(history, fields["candidates"], user=user, profile=profile, context=context)
