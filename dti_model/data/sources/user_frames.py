"""Profiles of users: a users' file, CSV, TSV or Parquet, or the one of MovieLens, put into text by a template.

    "{gender}, {age}, {occupation}"  ->  F, 25-34, programmer

Semicolons cut the template into parts, as they do item texts. A user has one row; users without interactions are left out, and users
without a row have no profile.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from dti_model.data.coded_texts import CodedTexts, Column, coded_texts
from dti_model.data.errors import DataError
from dti_model.data.sources.csv_parquet import LINE, open_table
from dti_model.data.sources.delimited import DelimitedFile
from dti_model.data.sources.item_frames import as_text
from dti_model.data.texts import Template, clean_text, shorten

# ML-1M's codes, as its README gives them.
AGES = {1: "under 18", 18: "18-24", 25: "25-34", 35: "35-44", 45: "45-49", 50: "50-55", 56: "56+"}
OCCUPATIONS = (
    *("other", "academic/educator", "artist", "clerical/admin", "college/grad student", "customer service"),
    *("doctor/health care", "executive/managerial", "farmer", "homemaker", "K-12 student", "lawyer"),
    *("programmer", "retired", "sales/marketing", "scientist", "self-employed", "technician/engineer"),
    *("tradesman/craftsman", "unemployed", "writer"),
)
MOVIELENS_TEXT = "{gender}; {age}; {occupation}"


@dataclass
class UserTexts:
    """Profiles by user.

    Attributes:
        template: of a profile.
        max_chars: longest value; longer ones are cut at a word.
        path: the file that they were read from.
        values: of each user the values of the template's columns.
    """

    template: Template
    max_chars: int
    path: Path
    values: dict[str, tuple[str, ...]] = field(default_factory=dict)
    _lines: dict[str, int] = field(default_factory=dict)

    def add(
        self, users: Iterable[str], lines: Iterable[int], columns: Mapping[str, Iterable[str | None]]
    ) -> None:
        """Take rows: ids, their lines, and the template's columns as text or null.

        Raises:
            DataError: a user has two rows.
        """
        for user, line, *row in zip(users, lines, *(columns[name] for name in self.template.columns)):
            if user in self._lines:
                raise DataError(
                    f"{self.path}:{line}: a second row of user {user!r}, whose first is in line {self._lines[user]:,}. Keep one row a user"
                )
            self._lines[user] = line
            self.values[user] = tuple(shorten(clean_text(value or ""), self.max_chars) for value in row)

    @property
    def rule(self) -> dict[str, Any]:
        """As stats.json has it."""
        return {"text": self.template.template, "max_chars": self.max_chars}

    def coded(self, users: pl.Series, interactions: Path) -> tuple[CodedTexts, int]:
        """Profiles in the order of `users`, and how many of these have none.

        Raises:
            DataError: no user of the file of `interactions` has one.
        """
        without = sum(user not in self.values for user in users)
        if without == len(users):
            raise DataError(
                f"{self.path}: lists none of the {without:,} users of {interactions}, such as {users[0]!r}. Do the two files belong "
                "together, and are the user columns the right ones?"
            )
        missing = ("",) * len(self.template.columns)
        rows = [self.values.get(user, missing) for user in users]
        columns = {}
        for name, column in zip(self.template.columns, zip(*rows)):
            values, codes = np.unique(np.array(column, object), return_inverse=True)
            columns[name] = Column(codes.astype(np.int32), [str(value) for value in values])
        return coded_texts(self.template, columns, len(rows)), without


def read_users(path: Path, key: str, text: str, max_chars: int) -> UserTexts:
    """A users' file of one's own.

    Args:
        path: one row a user; the name ends with .csv, .tsv (both also .gz), .parquet or .pq.
        key: its column with the user.
        text: template of a profile.
        max_chars: longest value of a column.

    Raises:
        DataError: the file cannot be read, lacks a column, has a row without a user or two rows of one.
    """
    template = Template(text, missing_title=None)
    table = open_table(path, multiline=True)
    template.check(table.columns, str(path))
    found = UserTexts(template, max_chars, path)
    for batch in table.batches(list(dict.fromkeys([key, *template.columns]))):
        users = as_text(batch[f"={key}"]).str.strip_chars()
        empty = batch[LINE].filter(users.is_null() | (users == ""))
        if empty.len():
            raise DataError(f"{path}:{empty[0]}: {key} must not be empty. Mend the row, or leave it out")
        found.add(users, batch[LINE], {name: as_text(batch[f"={name}"]) for name in template.columns})
    table.rejected.check(table.num_rows, 0.0)
    return found


def movielens_users(folder: Path, max_chars: int) -> UserTexts:
    """The users of ML-100K (`u.user`, or RecBole's `ml-100k.user`) or of ML-1M (`users.dat`) in a folder.

    Raises:
        DataError: there is no such file, or a line of it is malformed.
    """
    names = ["user", "age", "gender", "occupation", "zip"]
    recbole = "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token"
    if (folder / "users.dat").is_file():
        file = DelimitedFile(
            folder / "users.dat", ["user", "gender", "age", "occupation", "zip"], "::", "latin-1"
        )
        codes = file.integers("occupation")
        file.require(codes < len(OCCUPATIONS), f"occupation must be at most {len(OCCUPATIONS) - 1}")
        occupations = [OCCUPATIONS[code] for code in codes]
    elif (folder / "u.user").is_file():
        file = DelimitedFile(folder / "u.user", names, "|", "latin-1")
        occupations = file.columns["occupation"].to_list()
    elif (folder / "ml-100k.user").is_file():
        file = DelimitedFile(folder / "ml-100k.user", names, "\t", "utf-8", header=recbole)
        occupations = file.columns["occupation"].to_list()
    else:
        raise DataError(
            f"{folder}: no users' file here: u.user (or ml-100k.user) of ML-100K or users.dat of ML-1M. Add it, or leave the profile out"
        )
    found = UserTexts(Template(MOVIELENS_TEXT, missing_title=None), max_chars, file.path)
    columns: dict[str, Iterable[str]] = {
        "gender": file.columns["gender"],
        "age": map(_age, file.integers("age")),
        "occupation": occupations,
    }
    first = 2 if file.path.name == "ml-100k.user" else 1
    found.add(file.ids("user"), range(first, first + file.lines.len()), columns)
    return found


def _age(age: int) -> str:
    """An age in the brackets of ML-1M, whose codes are their first years."""
    return AGES[max(first for first in AGES if first <= max(age, 1))]
