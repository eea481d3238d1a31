"""Contexts of interactions and profiles of users, as a caller gives them, as token ids.

    {"device": "phone", "timestamp": 978300760}      columns of the log by name; from the time stamp, in the unit of the data, come
                                                     {hour}, {weekday} and, beside that of the interaction before, {gap}
    {"text": ["Friday, 20", "minutes later"]}        the finished parts, as `history_of` gives them

Rates come from what is known: {user_rate} from the history that is given, {item_rate} from all interactions of the prepared data, or
"new" where the item is not there; so do {user_ctr} and {item_ctr}. {affinity} comes from the whole history that is given and the rates of its
items in all of the data. What needs prepared data is asked for where there is none. Every fact may also be given by its name, as a text
that prompts have (`contexts.py` of the data), a rate as (clicks, interactions), a gap in seconds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Real
from typing import Any

import numpy as np

from dti_model.data import (
    CLICK_UNITS,
    FINISHED,
    FIRST,
    MAX_CHARS,
    DataError,
    PreparedData,
    Template,
    TextEncoder,
    affinity_text,
    ctr_text,
    expected_rates,
    field_text,
    gap_text,
    is_value,
    moment_texts,
    rate_text,
)
from dti_model.prompts import IntArray, context_text, profile_text
from dti_model.scorer.items import ItemError, check_text, check_texts
from dti_model.shown import shown

TIMESTAMP = "timestamp"
_RATE_TEXT = {"item_rate": rate_text, "user_rate": rate_text, "item_ctr": ctr_text, "user_ctr": ctr_text}
_CTR = "(clicks, interactions), or 'new' or a text of 0 to 100 in steps of 2, such as '72'"
_RATE = f"(clicks, interactions), or a text such as {rate_text(7, 10)!r}"
# What a built-in fact may be given as.
_WAYS = {
    "hour": "0 to 23",
    "weekday": "Monday to Sunday",
    "gap": f"seconds, or words such as {gap_text(60)!r}",
    **{"item_rate": _RATE, "user_rate": _RATE, "item_ctr": _CTR, "user_ctr": _CTR},
    "affinity": "'new' or a text of -100 to +100 in steps of 2 with its sign, such as '+12'",
}
_MOST_CHARS = 4096  # of a finished part
_MOST_COUNT = 2**31
_CATEGORY_BYTES = 192  # an entry of a dictionary beside the letters of its name
_MOST_CACHED = 1 << 16  # parts whose tokens are kept


# Of clicks over expected ones, in `CLICK_UNITS`, and how many interactions that are.
Surplus = tuple[int, int]


@dataclass(frozen=True)
class Facts:
    """What is known of a user before an interaction.

    Attributes:
        clicks: among the interactions before.
        interactions: before.
        timestamp: of the last one; None: not known.
        of_last: clicks and interactions that have this time stamp.
        categories: per category the surplus of clicks, and the interactions before (`affinities.py` of the data); empty where
            no context asks for them.
        categories_of_last: the same of those that have this time stamp.
    """

    clicks: int = 0
    interactions: int = 0
    timestamp: int | None = None
    of_last: tuple[int, int] = (0, 0)
    categories: dict[str, Surplus] = field(default_factory=dict)
    categories_of_last: dict[str, Surplus] = field(default_factory=dict)

    def after(
        self,
        label: int,
        timestamp: int | None,
        categories: Sequence[str] = (),
        expected: int = 0,
        in_place: bool = False,
    ) -> Facts:
        """After one more interaction.

        Args:
            label: its label.
            timestamp: its time stamp; None: not known.
            categories: of its item.
            expected: rate of its item, in `CLICK_UNITS`.
            in_place: nobody needs these facts any more, nor others that share their sums, so that these need not be copied.
        """
        same = timestamp is not None and timestamp == self.timestamp
        clicks, interactions = self.of_last if same else (0, 0)
        surplus = int(label) * CLICK_UNITS - expected
        return Facts(
            self.clicks + int(label),
            self.interactions + 1,
            timestamp,
            (clicks + int(label), interactions + 1),
            _with_one_more(self.categories, categories, surplus, in_place),
            _with_one_more(self.categories_of_last if same else {}, categories, surplus, in_place),
        )

    def counts(self, timestamp: int | None) -> tuple[int, int]:
        """Clicks and interactions of earlier time stamps than this one; None: of all that came before."""
        if timestamp is None or timestamp != self.timestamp:
            return self.clicks, self.interactions
        return self.clicks - self.of_last[0], self.interactions - self.of_last[1]

    @property
    def num_bytes(self) -> int:
        """About the bytes of what is known by category."""
        names = [*self.categories, *self.categories_of_last]
        return sum(_CATEGORY_BYTES + len(name) for name in names)

    def surplus(self, categories: Sequence[str], timestamp: int | None) -> Surplus:
        """Summed over categories, of earlier time stamps than this one; None: of all that came before."""
        last = self.categories_of_last if timestamp is not None and timestamp == self.timestamp else {}
        surplus, shown = 0, 0
        for name in categories:
            more, less = self.categories.get(name, (0, 0)), last.get(name, (0, 0))
            surplus, shown = surplus + more[0] - less[0], shown + more[1] - less[1]
        return surplus, shown


def _with_one_more(
    sums: dict[str, Surplus], categories: Sequence[str], surplus: int, in_place: bool
) -> dict[str, Surplus]:
    if not categories:
        return sums
    found = sums if in_place else dict(sums)
    for name in categories:
        before = found.get(name, (0, 0))
        found[name] = before[0] + surplus, before[1] + 1
    return found


@dataclass(frozen=True)
class _Known:
    """What the context of an interaction may follow from."""

    facts: Facts
    item: int | None
    timestamp: int | None
    categories: Sequence[str]


class ContextTokens:
    """Token ids of contexts, by the rule of the prepared data."""

    def __init__(self, rule: Mapping[str, Any], encoder: TextEncoder, data: PreparedData | None) -> None:
        """Read contexts.

        Args:
            rule: `PreparedData.context_rule`.
            encoder: of the model's tokenizer.
            data: prepared data that item rates are looked up in; None: there is none.
        """
        self._rule, self._encoder, self._data = rule, encoder, data
        self._template = Template(rule["text"], missing_title=None)
        self._built_in = frozenset(rule["built_in"])
        self._cache: dict[str, list[int]] = {}

    @property
    def compares_categories(self) -> bool:
        """Whether contexts follow from the categories of items, and from their rates in prepared data."""
        return "affinity" in self._built_in and self._data is not None

    def expected_rate(self, item: int | None) -> int:
        """Of the item with this index, in `CLICK_UNITS`; None: a new item."""
        clicks, shown = self._counts(item)
        return int(expected_rates(np.array(clicks), np.array(shown)))

    def _counts(self, item: int | None) -> tuple[int, int]:
        """Clicks and interactions of an item in the prepared data."""
        if item is None:
            return 0, 0
        clicks, shown = self._item_counts[:, item].tolist()
        return clicks, shown

    def tokens(
        self, context: Any, facts: Facts, item: int | None, categories: Sequence[str] = ()
    ) -> tuple[IntArray, int | None]:
        """`(n,)` int64, n >= 0, and the time stamp that the context says.

        Args:
            context: fields by name, or finished parts; None: no fields.
            facts: of the user before the interaction.
            item: index of the item in the prepared data; None: it is not there.
            categories: of the item, where contexts follow from them.

        Raises:
            ItemError: a field is missing, unknown, or of another type; the message names it.
        """
        fields = {} if context is None else context
        if not isinstance(fields, Mapping):
            raise ItemError(f"context must be fields by name, got {shown(context)}")
        timestamp = _timestamp(fields)
        if timestamp is not None and facts.timestamp is not None and timestamp < facts.timestamp:
            raise ItemError(
                f"context {TIMESTAMP} {timestamp} is earlier than that of the interaction before, {facts.timestamp}"
            )
        if FINISHED in fields:
            if others := fields.keys() - {FINISHED, TIMESTAMP}:
                raise ItemError(
                    f"context has finished parts, {FINISHED}, and also {shown(min(others))}: give one of them"
                )
            parts = self._finished(fields[FINISHED])
        else:
            known = _Known(facts, item, timestamp, categories)
            parts = self._template.parts(self._values(fields, known))
        return np.asarray([token for part in parts for token in self._encoded(part)], np.int64), timestamp

    def _finished(self, parts: Any) -> Sequence[str]:
        count = len(self._template.part_columns)
        if (
            isinstance(parts, str)
            or not isinstance(parts, Sequence)
            or len(parts) != count
            or not all(isinstance(part, str) for part in parts)
        ):
            raise ItemError(f"context text must be a list of {count} texts, got {shown(parts)}")
        for part in parts:
            check_text(part)
            if len(part) > _MOST_CHARS:
                raise ItemError(
                    f"a part of a context has at most {_MOST_CHARS:,} characters, got {shown(part)}"
                )
        return parts

    def _values(self, fields: Mapping[str, Any], known: _Known) -> dict[str, str]:
        """The text of every column of the template."""
        names = {*self._template.columns, TIMESTAMP}
        if unknown := fields.keys() - names:
            raise ItemError(
                f"context has a field {shown(min(unknown))}, which no template names: there are {', '.join(sorted(names))}"
            )
        values = {}
        for name in self._template.columns:
            if name in fields:
                values[name] = self._said(name, fields[name])
            elif name in self._built_in:
                values[name] = self._implied(name, known)
            else:
                raise ItemError(
                    f"context lacks {name}: the context of an interaction here is {self._template.template!r}"
                )
        return values

    def _said(self, name: str, value: Any) -> str:
        if name in self._built_in:
            return _fact(name, value)
        check_texts({name: value})
        try:
            return field_text(name, value, self._rule.get("max_chars", MAX_CHARS))
        except DataError as error:
            raise ItemError(f"context: {error}") from None

    def _implied(self, name: str, known: _Known) -> str:
        """A built-in fact that nobody gave."""
        facts, item, timestamp = known.facts, known.item, known.timestamp
        if name in ("user_rate", "user_ctr"):
            return _RATE_TEXT[name](*facts.counts(timestamp))
        if name in ("item_rate", "item_ctr", "affinity") and self._data is None:
            raise ItemError(
                f"context lacks {name}, which follows from prepared data: load the model with data=, or give {_WAYS[name]}"
            )
        if name == "affinity":
            return affinity_text(*facts.surplus(known.categories, timestamp))
        if name in ("item_rate", "item_ctr"):
            return _RATE_TEXT[name](*self._counts(item))
        if name == "gap" and not facts.interactions:
            return FIRST
        if timestamp is None or (name == "gap" and facts.timestamp is None):
            whose = " (and of the interaction before)" if name == "gap" else ""
            raise ItemError(
                f"context lacks {name}, or a {TIMESTAMP}{whose} that it follows from; the context of an interaction here is "
                f"{self._rule['text']!r}"
            )
        if name == "gap":
            assert facts.timestamp is not None
            return gap_text(self._seconds(timestamp) - self._seconds(facts.timestamp))
        return moment_texts(self._seconds(timestamp), self._rule["timezone"])[name]

    def _seconds(self, timestamp: int) -> int:
        per_second: int = self._rule["per_second"]
        seconds = timestamp // per_second
        if not 0 <= seconds < 2**35:
            raise ItemError(
                f"context timestamp {timestamp} is not of the years 1970 to 3058, with {per_second:,} to a second as in the data"
            )
        return seconds

    @cached_property
    def _item_counts(self) -> IntArray:
        """Clicks and interactions of every item of the prepared data, `(2, N)`."""
        data = self._data
        assert data is not None  # there was an index
        clicks = np.bincount(data.item, data.label, data.num_items)
        return np.stack([clicks.astype(np.int64), np.bincount(data.item, minlength=data.num_items)])

    def _encoded(self, part: str) -> list[int]:
        text = context_text(part)
        if text not in self._cache:
            if len(self._cache) >= _MOST_CACHED:
                self._cache.clear()
            self._cache[text] = self._encoder.encode(text) if text else []
        return self._cache[text]


class ProfileTokens:
    """Token ids of users' profiles, by the rule of the prepared data."""

    def __init__(self, rule: Mapping[str, Any], encoder: TextEncoder, data: PreparedData | None) -> None:
        """Read profiles; arguments as of `ContextTokens`, `rule` is `PreparedData.profile_rule`."""
        self._rule, self._encoder, self._data = rule, encoder, data
        self._template = Template(rule["text"], missing_title=None)

    def of_fields(self, profile: Any) -> IntArray:
        """`(n,)` int64 of a profile given by fields; fields that are left out are empty.

        Raises:
            ItemError: a field is unknown or of another type.
        """
        if not isinstance(profile, Mapping):
            raise ItemError(f"profile must be fields by name, got {shown(profile)}")
        if unknown := profile.keys() - set(self._template.columns):
            raise ItemError(
                f"profile has a field {shown(min(unknown))}, but a profile here is {self._template.template!r}"
            )
        check_texts(profile)
        limit = self._rule.get("max_chars", MAX_CHARS)
        try:
            values = {name: field_text(name, profile.get(name), limit) for name in self._template.columns}
        except DataError as error:
            raise ItemError(f"profile: {error}") from None
        return self._encoded(self._template.parts(values))

    def of_user(self, index: int | None) -> IntArray:
        """`(n,)` int64 of a user of the prepared data; a user who is not there (None) has none."""
        if index is None or self._data is None or self._data.profiles is None:
            return np.empty(0, np.int64)
        return self._encoded(self._data.profiles.of_row(index))

    def _encoded(self, parts: Sequence[str]) -> IntArray:
        texts = [profile_text(part) for part in parts if part]
        return np.asarray([token for text in texts for token in self._encoder.encode(text)], np.int64)


def _timestamp(fields: Mapping[str, Any]) -> int | None:
    value = fields.get(TIMESTAMP)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise ItemError(f"context {TIMESTAMP} must be an integer in the unit of the data, got {shown(value)}")
    return int(value)


def _fact(name: str, value: Any) -> str:
    """The text of a built-in fact that was given."""
    number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if name == "gap" and number and value >= 0:
        return gap_text(float(value))
    if name == "hour" and isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        value = str(value)
    if name in _RATE_TEXT and isinstance(value, (list, tuple)):
        counts = value if len(value) == 2 and all(isinstance(x, (int, np.integer)) for x in value) else (1, 0)
        if not 0 <= counts[0] <= counts[1] < _MOST_COUNT:
            raise ItemError(f"context {name} must be (clicks, interactions) or a text, got {shown(value)}")
        return _RATE_TEXT[name](int(counts[0]), int(counts[1]))
    if not isinstance(value, str) or not is_value(name, value):
        raise ItemError(f"context {name} must be {_WAYS[name]}, got {shown(value)}")
    return value
