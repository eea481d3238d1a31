"""Texts of many rows, each distinct text once: contexts of interactions, profiles of users.

    codes[part][row]  ->  texts[code]

A template's parts are kept apart: of "{weekday}, {hour}; {device}" 168 texts and one for every device are stored and tokenised, and not
one for every combination.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dti_model.data.arrow_file import as_numpy, read_table, write_table
from dti_model.data.errors import DataError
from dti_model.data.folder import AGAIN
from dti_model.data.texts import Template

Codes = npt.NDArray[np.int32]
_MOST_COMBINATIONS = 2**62  # combinations of values are numbered in 64 bits
_CHUNK = 1 << 20  # rows that are looked at at once


@dataclass(frozen=True, eq=False)
class CodedTexts:
    """Texts of N rows.

    Attributes:
        codes: for each part of the template `(N,)` int32, indices into `texts`.
        texts: the distinct texts; the first one is "", of a part that is left out.
    """

    codes: tuple[Codes, ...]
    texts: list[str]

    def of_row(self, row: int) -> list[str]:
        """The texts of one row, part by part."""
        return [self.texts[codes[row]] for codes in self.codes]

    def by_frequency(self, total: int, most: int) -> list[str]:
        """Texts as often as rows have them, for a tokenizer to learn: what all rows have becomes few tokens.

        Args:
            total: about so many for each part, if the rows were as many; but each text once at least.
            most: the most frequent so many are taken.
        """
        counts = np.zeros(len(self.texts), np.int64)
        for codes in self.codes:
            counts += np.bincount(codes, minlength=len(self.texts))
        counts[0] = 0  # the text of a part that is left out
        taken = np.argsort(-counts, kind="stable")[: min(most, int((counts > 0).sum()))]
        times = np.ceil(counts[taken] * (total / max(1, len(self.codes[0])))).astype(np.int64)
        return [
            self.texts[code] for code, number in zip(taken.tolist(), times.tolist()) for _ in range(number)
        ]

    def write(self, folder: Path, name: str) -> None:
        """Two files of a prepared folder, `files_of(name)`."""
        texts, codes = files_of(name)
        write_table(pa.table({"text": pa.array(self.texts, pa.string())}), folder / texts)
        columns = {f"part_{part}": pa.array(column, pa.int32()) for part, column in enumerate(self.codes)}
        write_table(pa.table(columns), folder / codes)

    @staticmethod
    def read(folder: Path, name: str, num_parts: int, num_rows: int) -> CodedTexts:
        """Map what `write` wrote.

        Raises:
            DataError: the files are not those of so many parts and rows.
        """
        texts_file, codes_file = files_of(name)
        texts = read_table(folder / texts_file, {"text": pa.string()}).column("text").to_pylist()
        table = read_table(folder / codes_file, {f"part_{part}": pa.int32() for part in range(num_parts)})
        if table.num_rows != num_rows:
            raise DataError(
                f"{folder / codes_file}: {table.num_rows:,} rows instead of {num_rows:,}. {AGAIN}"
            )
        codes = tuple(as_numpy(table.column(f"part_{part}")) for part in range(num_parts))
        return CodedTexts(codes, [str(text) for text in texts])


def files_of(name: str) -> tuple[str, str]:
    """The files of the texts and of the codes."""
    return f"{name}.arrow", f"{name}_codes.arrow"


@dataclass(frozen=True, eq=False)
class Column:
    """A column of few distinct values: `(N,)` int32 `codes` into `values`."""

    codes: Codes
    values: Sequence[str]


def coded_texts(template: Template, columns: dict[str, Column], num_rows: int) -> CodedTexts:
    """Put columns into the parts of a template.

    Args:
        template: what the texts are made of.
        columns: by name, all of the template's, with clean values.
        num_rows: N.

    Cost: O(N) time; memory of the distinct texts, and 4 bytes a row and part.
    """
    known: dict[str, int] = {"": 0}
    codes = []
    for part, names in enumerate(template.part_columns):

        def code_of(values: Sequence[str], part: int = part, names: tuple[str, ...] = names) -> int:
            text = template.render_part(part, dict(zip(names, values)))
            return known.setdefault(text or "", len(known))

        codes.append(_codes_of_part([columns[name] for name in names], code_of, num_rows))
    return CodedTexts(tuple(codes), list(known))


def _codes_of_part(columns: list[Column], code_of: Callable[[Sequence[str]], int], num_rows: int) -> Codes:
    """Every combination of values that occurs is rendered once."""
    if math.prod(len(column.values) for column in columns) >= _MOST_COMBINATIONS:
        raise DataError(
            "a part of the text template joins columns of too many values: put a semicolon between them"
        )
    found: dict[int, int] = {}
    result = np.empty(num_rows, np.int32)
    for start in range(0, num_rows, _CHUNK):
        rows = slice(start, min(start + _CHUNK, num_rows))
        keys = np.zeros(rows.stop - start, np.int64)
        for column in columns:
            keys *= len(column.values)
            keys += column.codes[rows]
        distinct, places = np.unique(keys, return_inverse=True)
        codes = np.empty(len(distinct), np.int32)
        for place, key in enumerate(distinct.tolist()):
            if key not in found:
                found[key] = code_of(_values_of(key, columns))
            codes[place] = found[key]
        result[rows] = codes[places]
    return result


def _values_of(key: int, columns: list[Column]) -> list[str]:
    values = []
    for column in reversed(columns):
        key, code = divmod(key, len(column.values))
        values.append(column.values[code])
    return values[::-1]
