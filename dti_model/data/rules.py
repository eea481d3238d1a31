"""The rules that a prepared folder was made by, as its stats.json tells them: texts, clicks, times. New rows of it follow the same ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from dti_model.data.errors import DataError
from dti_model.data.row_texts import context_template
from dti_model.data.sources import DATES, CustomFiles, RawData
from dti_model.data.store import PreparedData
from dti_model.data.texts import MAX_CHARS, TEMPLATE
from dti_model.data.times import MILLIONTHS, OF_FILE

_IS_LABEL = " = 1"
_MILLION = 1_000_000
# Seconds since 1970 of this size are of our days; then another size is another unit.
_SURELY_SECONDS, _OTHER_UNIT = 10**8, 100


@dataclass(frozen=True)
class FolderRules:
    """What new rows must have in common with those of a prepared folder.

    Attributes:
        path: the folder.
        text: template of item texts.
        max_chars: longest value in a text.
        column: that a click was made of.
        is_label: the column was a label of 0 and 1, no rating.
        threshold: a rating above it is a click.
        unit: of the timestamps.
        last: the last timestamp.
        user_text: template of users' profiles; None: there are none.
        context_columns: of the log, that interactions' contexts are made of.
    """

    path: Path
    text: str
    max_chars: int
    column: str
    is_label: bool
    threshold: float
    unit: str
    last: int
    user_text: str | None
    context_columns: tuple[str, ...]

    @staticmethod
    def of(data: PreparedData) -> FolderRules:
        """Those of a folder of any source."""
        stats, rule = data.stats, data.text_rule
        click: str = stats["click"]
        column = click.removesuffix(_IS_LABEL) if click.endswith(_IS_LABEL) else click.rpartition(" > ")[0]
        return FolderRules(
            data.path,
            rule.get("text", TEMPLATE),
            rule.get("max_chars", MAX_CHARS),
            column,
            click.endswith(_IS_LABEL),
            float(stats["threshold"]),
            stats["timestamp_unit"],
            int(stats["last_timestamp"]),
            None if data.profile_rule is None else data.profile_rule["text"],
            _columns_of(data.context_rule),
        )

    def files(
        self,
        text: str | None = None,
        label: str | None = None,
        rating: str | None = None,
        threshold: float | None = None,
        max_chars: int | None = None,
        **others: Any,
    ) -> CustomFiles:
        """Files of new rows; what is None follows these rules.

        Raises:
            ValueError: as `CustomFiles`.
        """
        if label is None and rating is None:
            label, rating = (self.column, None) if self.is_label else (None, self.column)
        if threshold is None and rating is not None:
            threshold = self.threshold
        if others.get("users") is not None and others.get("user_text") is None:
            others["user_text"] = self.user_text
        return CustomFiles(
            text=self.text if text is None else text,
            label=label,
            rating=rating,
            threshold=threshold,
            max_chars=self.max_chars if max_chars is None else max_chars,
            **others,
        )

    def check(self, files: CustomFiles) -> None:
        """Raise a DataError where files follow another rule, naming it."""
        if (files.label is not None) != self.is_label:
            made, given = ("label", "rating") if self.is_label else ("rating", "label")
            raise DataError(
                f"{given} is given, but clicks of {self.path} were made of a {made}: name the column of the {made}, or prepare all rows anew"
            )
        if files.users is not None and self.user_text is None:
            raise DataError(
                f"users is given, but {self.path} was prepared without profiles: prepare all rows anew"
            )
        found = {
            "user_text": files.user_text or self.user_text,
            "text": files.text,
            "max_chars": files.max_chars,
            "threshold": files.threshold,
        }
        mine = {
            "user_text": self.user_text,
            "text": self.text,
            "max_chars": self.max_chars,
            "threshold": None if self.is_label else self.threshold,
        }
        for name, value in found.items():
            if value != mine[name]:
                raise DataError(
                    f"{name} must be that of {self.path}, {mine[name]!r}, got {value!r}: leave it out, or prepare all rows anew"
                )

    def check_columns(self, raw: RawData) -> None:
        """Raise a DataError where the new log lacks a column of the contexts."""
        missing = [name for name in self.context_columns if name not in raw.extra]
        if missing:
            raise DataError(
                f"{raw.interactions_path}: there is no column {', '.join(missing)}, of which contexts of {self.path} are made"
            )

    def times(self, raw: RawData) -> pl.Series:
        """The timestamps of new rows in the unit of the folder.

        Raises:
            DataError: they cannot be told in it, or their size says that they are of another one.
        """
        times = raw.interactions["timestamp"]
        (mine, has_fractions), (new, new_fractions) = map(_unit_of, (self.unit, raw.timestamp_unit))
        if mine != new and (DATES in (mine, new) or OF_FILE not in (mine, new)):
            raise DataError(
                f"{raw.interactions_path}: the times are {_in_words(raw.timestamp_unit)}, and those of {self.path} are "
                f"{_in_words(self.unit)}. Write them alike"
            )
        if has_fractions and not new_fractions:
            times = times * _MILLION
        elif new_fractions and not has_fractions:
            if (times % _MILLION != 0).any():
                raise DataError(
                    f"{raw.interactions_path}: the times are numbers with a fraction, and those of {self.path} are integers. Write them alike"
                )
            times = times // _MILLION
        self._check_size(times, raw.interactions_path)
        return times

    def _check_size(self, times: pl.Series, path: Path) -> None:
        middle = times.median() if len(times) else None
        surely = _SURELY_SECONDS * (_MILLION if self.unit.startswith(MILLIONTHS) else 1)
        if not isinstance(middle, float) or self.unit == DATES or self.last < surely:
            return
        if not self.last / _OTHER_UNIT < middle < self.last * _OTHER_UNIT:
            raise DataError(
                f"{path}: the times are about {middle:.0f}, and those of {self.path} end at {self.last}: is one in seconds and the other "
                "in milliseconds? Write them in the same unit"
            )


def _columns_of(rule: Mapping[str, Any] | None) -> tuple[str, ...]:
    """Columns of a log that a rule of contexts names."""
    if rule is None:
        return ()
    return tuple(name for name in context_template(rule["text"]).columns if name not in rule["built_in"])


def _unit_of(unit: str) -> tuple[str, bool]:
    """What the file's numbers count, and whether they are kept in millionths of it."""
    return unit.removeprefix(MILLIONTHS), unit.startswith(MILLIONTHS)


def _in_words(unit: str) -> str:
    said, _ = _unit_of(unit)
    return {DATES: "date-times, or microseconds", OF_FILE: "numbers of a unit that was not said"}.get(
        said, said
    )
