"""Item texts: cleaned values put into a template.

    "{title} ({year}); {genres}"  ->  Toy Story (1995); Animation, Comedy

The first column of a template counts as the title: where an item has none, `MISSING_TITLE` stands in its place.
Semicolons cut a template into parts. A part whose columns are all empty is left out; where only some are, empty
brackets and dangling separators go. An item without any value has no text at all.

Training and scoring import this file: it needs neither polars nor msgspec, which only making prepared folders does.
`sources/item_frames.py` puts the columns of an item file through these rules.
"""

from __future__ import annotations

import html
import math
import numbers
import re
import string
from collections.abc import Collection, Mapping
from datetime import UTC, date, datetime, time, timezone
from decimal import Decimal
from typing import Any

import numpy as np

from dti_model.data.errors import DataError
from dti_model.shown import shown

MISSING_TITLE = "Unknown title"
TEMPLATE = "{title}; {genres}"  # of sources that name no other
MAX_CHARS = 200  # default length of one value: a window holds 20 items, and some titles are whole pages
FINISHED = "text"  # of an item that is given as its finished text, and so no column of a template
_TAG = re.compile(r"</?[a-zA-Z!][^<>]*>")
_EMPTY_BRACKETS = re.compile(r"\(\s*\)|\[\s*\]")
_DANGLING = " ,:|/-"
_MOST_DIGITS = 38  # digits of an Arrow decimal


def clean_text(value: str) -> str:
    """A value as plain text: no HTML entities (escaped up to three times), no tags, blanks squeezed.

    Example:
        >>> clean_text(" Rainforest Caf&eacute;  <b>Gift</b>\\n Card &amp;amp; more")
        'Rainforest Café Gift Card & more'
    """
    for _ in range(3):
        if "&" not in value:
            break
        value = html.unescape(value)
    if "<" in value:
        value = _TAG.sub(" ", value)
    return " ".join(value.replace("\0", " ").split())


def shorten(value: str, max_chars: int) -> str:
    """`value`, cut at a word so that it has at most `max_chars` characters."""
    if len(value) <= max_chars:
        return value
    cut = value[: max_chars + 1]
    return (cut[: cut.rfind(" ")] if " " in cut else cut[:max_chars]).rstrip()


class Template:
    """A text with column names in braces, checked."""

    def __init__(self, template: str, missing_title: str | None = MISSING_TITLE) -> None:
        """Parse a template.

        Args:
            template: the text.
            missing_title: what stands in the place of the first column where it is empty; None: the first column is like the others.

        Raises:
            ValueError: a brace without its pair, a format after a name, or no column at all.
        """
        self.template, self._missing_title = template, missing_title
        way_out = 'Write column names in braces, for example "{title}; {genres}".'
        try:
            pieces = list(string.Formatter().parse(template))
        except ValueError as error:
            raise ValueError(f"text template {template!r}: {error}. {way_out}") from error
        # Every part's text, with %s in the place of each column, and its columns.
        forms, columns = [""], [list[str]()]
        for literal, column, form, conversion in pieces:
            if column == "" or form or conversion:
                raise ValueError(f"text template {template!r}: only plain column names fit. {way_out}")
            first, *others = literal.replace("%", "%%").split(";")
            forms[-1] += first
            forms += others
            columns += [[] for _ in others]
            if column is not None:
                forms[-1] += "%s"
                columns[-1].append(column)
        self._parts = list(zip(forms, columns))
        self.part_columns = [tuple(dict.fromkeys(names)) for names in columns]  # columns of every part
        self.columns = list(dict.fromkeys(name for names in columns for name in names))
        if not self.columns:
            raise ValueError(f"text template {template!r} names no column. {way_out}")

    def check(self, available: Collection[str], where: str) -> None:
        """Raise a DataError when a column is not among the `available` ones of `where`."""
        missing = [name for name in self.columns if name not in available]
        if missing:
            raise DataError(
                f"text template {self.template!r} names {', '.join(missing)}, but {where} has the columns "
                f"{', '.join(available)}"
            )

    def render(self, values: Mapping[str, str]) -> str:
        """The text of one item.

        Args:
            values: every column of the template as cleaned text, "" where there is none.

        Returns:
            The text, "" where every column is empty.
        """
        if not any(values[name] for name in self.columns):
            return ""
        shown = values
        if self._missing_title is not None:
            title = self.columns[0]
            shown = {**values, title: values[title] or self._missing_title}
        parts = (self.render_part(index, shown) for index in range(len(self._parts)))
        return "; ".join(part for part in parts if part is not None).strip()

    def parts(self, values: Mapping[str, str]) -> list[str]:
        """All parts, "" for those that are left out; `values` as in `render`."""
        return [self.render_part(index, values) or "" for index in range(len(self._parts))]

    def render_part(self, index: int, values: Mapping[str, str]) -> str | None:
        """One part, between two semicolons; None: it is left out.

        Args:
            index: of the part.
            values: its columns (`part_columns`) as cleaned text, "" where there is none.
        """
        form, names = self._parts[index]
        inserted = tuple([values[name] for name in names])
        if names and not any(inserted):
            return None
        text = (form % inserted).strip()
        if not all(inserted):
            text = _EMPTY_BRACKETS.sub("", text).strip(_DANGLING)
        return text if text or names else None


def template_text(template: Template, fields: Mapping[str, Any], max_chars: int) -> str:
    """The text of one item; `item_frames.ItemTexts` makes the same one of columns with these values.

    Raises:
        DataError: a field that the template does not name, a value that no column has, or no value at all.
    """
    if not fields.keys() <= set(template.columns) or not any(map(_is_filled, fields.values())):
        raise DataError(
            f"an item here has the fields {', '.join(template.columns)} (text template {template.template!r}), or the one field "
            f"text; got {shown(fields)}"
        )
    return template.render({name: field_text(name, fields.get(name), max_chars) for name in template.columns})


def field_text(name: str, value: Any, max_chars: int) -> str:
    """One field as the clean text that a column with this value has, "" for none.

    Raises:
        DataError: a value that no column has.
    """
    return shorten(clean_text(_value_text(name, value) or ""), max_chars)


def _is_filled(value: Any) -> bool:
    return value is not None and not (isinstance(value, (str, list, tuple)) and len(value) == 0)


def _value_text(name: str, value: Any) -> str | None:
    """The text of a field; lists are joined by commas, without what is null in them."""
    if isinstance(value, (list, tuple)):
        parts = [_scalar_text(f"an entry of the field {name}", part) for part in value]
        return ", ".join(part for part in parts if part is not None)
    return _scalar_text(f"the field {name}", value)


def _scalar_text(place: str, value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    try:
        if isinstance(value, bool):
            return str(value).lower()
        if isinstance(value, numbers.Integral):
            number = int(value)
            if -(2**127) <= number < 2**128:
                return str(number)
        elif isinstance(value, Decimal):
            if value.is_finite():
                return _decimal_text(value)
        elif isinstance(value, numbers.Real):
            return _float_text(value)
        elif isinstance(value, (date, time)):  # a datetime is a date
            return _moment_text(value)
    except (OverflowError, ValueError):
        pass  # beyond what a column holds
    raise DataError(
        f"{place} must be a text or a number that a column can hold, or a list of them, but is {shown(value)}"
    )


def _decimal_text(value: Decimal) -> str:
    """The shortest text, without an exponent."""
    _, digits, exponent = value.as_tuple()
    assert isinstance(exponent, int)  # of a finite one
    if max(len(digits) + exponent, len(digits), -exponent) > _MOST_DIGITS:
        raise OverflowError
    text = f"{value:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _float_text(value: numbers.Real) -> str | None:
    """Whole numbers of 64 bits without a decimal point; of others the digits that tell them apart, tiny ones with an exponent."""
    number = value if isinstance(value, np.floating) else float(value)
    if number != number:
        return None
    if abs(number) < 2**63 and number == int(number):
        return str(int(number))
    if 1e-5 <= abs(number) < 1e16 or number in (math.inf, -math.inf):
        return np.format_float_positional(number, trim="-")
    return np.format_float_scientific(number, trim="-", exp_digits=1)


def _moment_text(value: date | time) -> str:
    """ISO 8601, of a time of day to the second; times of a fixed offset to UTC are given as UTC."""
    if isinstance(value, time):
        return value.replace(tzinfo=None).isoformat(timespec="seconds")
    if not isinstance(value, datetime):
        return value.isoformat()
    moment = value.astimezone(UTC) if isinstance(value.tzinfo, timezone) else value
    return moment.isoformat(sep=" ", timespec="microseconds")
