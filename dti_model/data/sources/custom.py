"""Your own log: an interaction file and an item file, CSV, TSV or Parquet.

    interactions   user, item, timestamp, and a label (0 or 1) or a rating with a threshold
    items          item, and the columns that the text template names

Times may be integers, numbers or ISO date-times (UTC where they name no zone); what the first rows hold decides.
Numbers are kept in millionths of their unit and date-times in microseconds, so no two times fall together.
A column may say of each row whether it is train, val or test, as published splits do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import polars as pl

from dti_model.data.errors import DataError
from dti_model.data.sources.csv_parquet import LINE, Table, open_table
from dti_model.data.sources.item_frames import ItemTexts, as_text
from dti_model.data.sources.rows import MAX_REJECTED, Interactions, check_limits
from dti_model.data.sources.source import RawData
from dti_model.data.sources.user_frames import read_users
from dti_model.data.split import SPLIT_WORDS
from dti_model.data.texts import FINISHED, MAX_CHARS, Template
from dti_model.data.times import MILLIONTHS, OF_FILE, UNITS, Clock

INTEGERS, NUMBERS, DATES = OF_FILE, MILLIONTHS + OF_FILE, "microseconds"
_TIME_RULES: dict[str | None, str] = {INTEGERS: "an integer", NUMBERS: "a number", DATES: "an ISO date-time"}
_TIME_RULES[None] = "an integer, a number or an ISO date-time"
_DATE_FORMATS = ("%Y-%m-%dT%H:%M:%S%.f", "%Y-%m-%dT%H:%M", "%Y-%m-%d")
_ZONED_FORMATS = ("%Y-%m-%dT%H:%M:%S%.f%#z", "%Y-%m-%dT%H:%M%#z")  # +05:30, +0530 or +05
_LABELS = {"true": 1.0, "false": 0.0, "yes": 1.0, "no": 0.0}
MAX_NUMBER = 9e12  # in millionths it still fits 64 bits
MAX_THRESHOLD = (
    1e9  # ratings are 32-bit floats: far above, neighbours are further apart than any scale has steps
)


@dataclass(frozen=True)
class CustomFiles:
    """Files of one's own and what their columns mean.

    Attributes:
        interactions: one row an interaction; the name ends with .csv, .tsv (both also .gz), .parquet or .pq.
        items: one row an item.
        text: template of an item's text, column names in braces: "{title}; {genres}". The first is the title; none is called `text`.
        label: column with 0 or 1 (or true and false, yes and no). Either this or `rating`.
        rating: column with numbers; one above `threshold` is a click.
        threshold: goes with `rating`.
        user, item, timestamp: columns of `interactions`.
        timestamp_unit: what integers or numbers in `timestamp` count since 1970, a name of `UNITS` in times.py; None: it is not said, and told
            by their size where dates are asked for.
        split_column: column with train, val (valid, validation, dev) or test, in any case; a row without is context only.
        items_key: the column of `items` with the item; None: named as in `interactions`.
        max_rejected: largest share of a file's rows that may be unusable.
        max_chars: longest value of a column in a text; longer ones are cut at a word.
        users: one row a user; None: users have no profiles.
        user_text: template of a user's profile, columns of `users` in braces; goes with `users`.
        users_key: the column of `users` with the user; None: named as in `interactions`.
        name: of the source in stats.json.

    Raises:
        ValueError: the fields contradict each other, or the template is malformed.
    """

    ratings: ClassVar[tuple[float, float] | None] = None

    interactions: Path
    items: Path
    text: str
    label: str | None = None
    rating: str | None = None
    threshold: float | None = None
    user: str = "user"
    item: str = "item"
    timestamp: str = "timestamp"
    timestamp_unit: str | None = None
    split_column: str | None = None
    items_key: str | None = None
    max_rejected: float = MAX_REJECTED
    max_chars: int = MAX_CHARS
    users: Path | None = None
    user_text: str | None = None
    users_key: str | None = None
    name: str = "custom"

    def __post_init__(self) -> None:
        if (self.label is None) == (self.rating is None):
            raise ValueError("name the column of the click: either label (0 or 1) or rating with a threshold")
        if (self.rating is None) != (self.threshold is None):
            missing = "threshold" if self.threshold is None else "rating"
            raise ValueError(
                f"threshold goes with rating, and {missing} is not given: a rating above the threshold is a click; a label needs none"
            )
        if (
            self.threshold is not None and not -MAX_THRESHOLD <= self.threshold <= MAX_THRESHOLD
        ):  # NaN is neither
            raise ValueError(
                f"threshold must be a number from {-MAX_THRESHOLD:g} to {MAX_THRESHOLD:g}, but is {self.threshold}"
            )
        columns = self._columns
        if len(set(columns)) < len(columns):
            raise ValueError(f"four different columns are needed, but they are {', '.join(columns)}")
        if (self.users is None) != (self.user_text is None):
            missing = "user_text" if self.user_text is None else "users"
            raise ValueError(
                f"users goes with user_text, and {missing} is not given: a file with one row a user, and the text made of its columns"
            )
        if self.user_text is not None:
            Template(self.user_text, missing_title=None)
        if self.split_column in columns:
            raise ValueError(
                f"split_column must be a column of its own, but {self.split_column} has another meaning"
            )
        if self.timestamp_unit not in (None, *UNITS):
            raise ValueError(
                f"timestamp_unit must be one of {', '.join(UNITS)}, but is {self.timestamp_unit!r}"
            )
        check_limits(self.max_rejected, self.max_chars)
        if FINISHED in Template(self.text).columns:
            raise ValueError(
                f'text template {self.text!r} names a column {FINISHED}, but {{"{FINISHED}": ...}} is a finished item text where items '
                "are scored: rename that column in the item file and in the template"
            )

    @property
    def _columns(self) -> list[str]:
        return [self.user, self.item, self.timestamp, self.label or self.rating or ""]

    def load(self, columns: Sequence[str] = ()) -> RawData:
        """Read the files.

        Args:
            columns: further columns of the interactions; those that are not there are left out.

        Raises:
            DataError: a file cannot be read, lacks a column, or has more unusable rows than `max_rejected`; or a further column is the
                click itself.
        """
        click = self.label or self.rating
        if click in columns:
            raise DataError(
                f"context_text names {click}, the column of the click itself: no context may hold what is to be predicted"
            )
        if self.split_column in columns:
            raise DataError(
                f"context_text names {self.split_column}, the column of splits, which no request knows"
            )
        template = Template(self.text)
        catalogue = open_table(Path(self.items), multiline=True)
        template.check(catalogue.columns, str(self.items))
        table = open_table(Path(self.interactions), multiline=False)
        extra = [name for name in columns if name in table.columns]
        extra += [] if self.split_column is None else [self.split_column]
        interactions, unit = self._read_interactions(table, extra)
        table.rejected.check(table.num_rows, self.max_rejected)
        items = ItemTexts(interactions.items.names(), template, self.max_chars)
        self._read_items(catalogue, template, items)
        catalogue.rejected.check(catalogue.num_rows, self.max_rejected)
        profiles = None
        if self.users is not None and self.user_text is not None:
            profiles = read_users(
                Path(self.users), self.users_key or self.user, self.user_text, self.max_chars
            )
        raw = RawData(
            interactions,
            items,
            (table.rejected, catalogue.rejected),
            table.num_rows,
            catalogue.num_rows,
            threshold=0.5 if self.threshold is None else float(self.threshold),
            min_item_count=1,
            click=f"{self.label} = 1" if self.rating is None else f"{self.rating} > {{threshold:g}}",
            timestamp_unit=self._said(unit),
            split_column=self.split_column,
            text_rule={"text": self.text, "max_chars": self.max_chars},
            profiles=profiles,
        )
        if self.timestamp_unit is not None and (times := raw.interactions["timestamp"]).len():
            first, last = int(times.min()), int(times.max())  # type: ignore[arg-type]
            Clock(raw.timestamp_unit, first, last, str(self.interactions)).check_said()
        return raw

    def _said(self, unit: str) -> str:
        """The unit of the time stamps: of what was found in the file, that which was said."""
        if self.timestamp_unit is None:
            return unit
        if unit == DATES:
            raise DataError(
                f"{self.interactions}: column {self.timestamp} holds dates, which have no unit: leave timestamp_unit out"
            )
        return unit.replace(OF_FILE, self.timestamp_unit)

    def _read_interactions(self, table: Table, extra: Sequence[str]) -> tuple[Interactions, str]:
        interactions, unit = Interactions(), None
        user, item, time, value = (f"={name}" for name in self._columns)
        for batch in table.batches(list(dict.fromkeys([*self._columns, *extra]))):
            batch = batch.with_columns(_one_value(batch[name]) for name in (time, value))
            times, unit = parsed_times(batch[time], unit)
            rows = pl.DataFrame(
                {
                    "user": _ids(batch[user]),
                    "item": _ids(batch[item]),
                    "time": times,
                    "value": _numbers(batch[value]) if self.label is None else _labels(batch[value]),
                }
            ).with_columns(batch[LINE])
            value_rule = "a number" if self.label is None else "0 or 1 (or true, false, yes, no)"
            problem = pl.coalesce(
                _problem("user", self.user, "must not be empty"),
                _problem("item", self.item, "must not be empty"),
                _problem("time", self.timestamp, f"must be {_TIME_RULES[unit]}", batch[time]),
                _problem("value", self._columns[3], f"must be {value_rule}", batch[value]),
                *([] if self.split_column is None else [_split_problem(self.split_column, batch)]),
            )
            rows = rows.with_columns(problem=problem)
            for line, reason in rows.select(LINE, "problem").drop_nulls().iter_rows():
                table.rejected.add(line, reason)
            is_good = rows["problem"].is_null()
            good = rows.filter(is_good)
            texts = {name: as_text(batch[f"={name}"]).filter(is_good) for name in extra}
            interactions.add(
                good["user"].to_list(), good["item"].to_list(), good["time"], good["value"], texts
            )
        return interactions, unit or INTEGERS

    def _read_items(self, table: Table, template: Template, items: ItemTexts) -> None:
        key = self.items_key or self.item
        for batch in table.batches(list(dict.fromkeys([key, *template.columns]))):
            ids = _ids(batch[f"={key}"])
            for line in batch[LINE].filter(ids.is_null()):
                table.rejected.add(line, f"{key} must not be empty")
            known = batch.filter(ids.is_not_null())
            items.add(ids.drop_nulls(), {name: as_text(known[f"={name}"]) for name in template.columns})


def parsed_times(values: pl.Series, unit: str | None) -> tuple[pl.Series, str | None]:
    """Times as Int64, null where there is none, and their unit; None lets the values decide, and remains where none is a time.

    Example:
        >>> parsed_times(pl.Series(["1970-01-01T00:00:01Z", "soon"]), None)[0].to_list()
        [1000000, None]
    """
    if values.dtype.is_temporal():
        return values.cast(pl.Datetime("us")).cast(pl.Int64), unit or DATES
    if values.dtype == pl.String:
        values = values.str.strip_chars()
    if unit is None:
        # The first of integers, numbers, dates that reads the most values.
        nulls = {kind: read(values).null_count() for kind, read in _READERS.items()}
        kind = min(nulls, key=lambda kind: nulls[kind])
        unit = kind if nulls[kind] < len(values) else None
    return _READERS[unit or INTEGERS](values), unit


def _whole(values: pl.Series) -> pl.Series:
    if values.dtype.is_float():
        return pl.repeat(None, len(values), dtype=pl.Int64, eager=True)
    return values.cast(pl.Int64, strict=False)


def _millionths(values: pl.Series) -> pl.Series:
    numbers = values.cast(pl.Float64, strict=False)
    in_range = (numbers.abs() <= MAX_NUMBER).fill_null(False)
    return (numbers.set(~in_range, None) * 1e6).round().cast(pl.Int64)


def _dates(values: pl.Series) -> pl.Series:
    """ISO date-times as microseconds since 1970 (UTC), null where there is none."""
    if values.dtype != pl.String or not (is_date := values.str.contains(r"^\d{4}-\d\d-\d\d")).any():
        return pl.repeat(None, len(values), dtype=pl.Int64, eager=True)
    texts = values.set(~is_date, None).str.replace(" ", "T", literal=True).str.replace("Z$", "+00:00")
    found = _moments(texts)
    missed = is_date & found.is_null()
    if missed.any():  # spellings of databases, which take longer to look for
        rare = values.set(~missed, None).str.replace("^(.{10})[ t]", "${1}T")
        rare = rare.str.replace(" ?(UTC|GMT|[Zz])$", "+00:00")
        found = found.zip_with(~missed, _moments(rare.str.replace(" ([+-][0-9:]+)$", "${1}")))
    return found


def _moments(texts: pl.Series) -> pl.Series:
    column = pl.lit(texts)
    plain = [column.str.to_datetime(form, strict=False, time_unit="us") for form in _DATE_FORMATS]
    zoned = [
        column.str.to_datetime(form, strict=False, time_unit="us", time_zone="UTC").dt.replace_time_zone(None)
        for form in _ZONED_FORMATS
    ]
    return pl.select(pl.coalesce(*plain, *zoned).cast(pl.Int64)).to_series()


_READERS = {INTEGERS: _whole, NUMBERS: _millionths, DATES: _dates}


def _problem(column: str, name: str, rule: str, values: pl.Series | None = None) -> pl.Expr:
    """The problem of the rows where `column` is null; `values` are shown."""
    text = pl.lit(f"{name} {rule}")
    if values is not None:
        nothing = "empty, or not of the years 1 to 9999" if values.dtype.is_temporal() else "empty"
        text = pl.concat_str(text, pl.lit(", but is "), pl.lit(as_text(values).fill_null(nothing)))
    return pl.when(pl.col(column).is_null()).then(text)


def _split_problem(name: str, batch: pl.DataFrame) -> pl.Expr:
    """The problem of the rows whose split is a word that is none."""
    words = _texts(batch[f"={name}"])
    rule = pl.lit(f"{name} must be train, val (valid, validation, dev), test or empty, but is ")
    is_word = words.str.to_lowercase().is_in(list(SPLIT_WORDS))
    return pl.when(pl.lit(~is_word)).then(pl.concat_str(rule, pl.lit(words)))


def _one_value(values: pl.Series) -> pl.Series:
    """A column of lists as text, since neither a number nor a time is a list; other columns as they are."""
    return as_text(values).alias(values.name) if isinstance(values.dtype, pl.List) else values


def _texts(values: pl.Series) -> pl.Series:
    """Values as text without blanks around them, "" where there is none."""
    return as_text(values).fill_null("").str.strip_chars()


def _ids(values: pl.Series) -> pl.Series:
    """Ids as text without blanks around them; null where there is none."""
    texts = _texts(values)
    return texts.set(texts == "", None)


def _numbers(values: pl.Series) -> pl.Series:
    """Numbers as Float32, null where there is none or it is too large."""
    if values.dtype.is_temporal():
        return pl.repeat(None, len(values), dtype=pl.Float32, eager=True)
    if values.dtype == pl.String:
        values = values.str.strip_chars()
    numbers = values.cast(pl.Float64, strict=False).cast(pl.Float32, strict=False)
    return numbers.set(~numbers.is_finite().fill_null(False), None)


def _labels(values: pl.Series) -> pl.Series:
    """Labels as Float32 0 and 1, null where there is neither."""
    numbers = _numbers(values)
    if values.dtype == pl.String:
        words = values.str.strip_chars().str.to_lowercase()
        numbers = numbers.fill_null(words.replace_strict(_LABELS, default=None, return_dtype=pl.Float32))
    return numbers.set(~numbers.is_in([0.0, 1.0]).fill_null(False), None)
