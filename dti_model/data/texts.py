"""Item texts: cleaned values put into a template.

    "{title} ({year}); {genres}"  ->  Toy Story (1995); Animation, Comedy

The first column of a template counts as the title: where an item has none, `MISSING_TITLE` stands in its place.
Semicolons cut a template into parts. A part whose columns are all empty is left out; where only some are, empty
brackets and dangling separators go. An item without any value has no text at all.
"""

from __future__ import annotations

import html
import numbers
import re
import string
from collections.abc import Collection, Mapping
from datetime import date, time
from decimal import Decimal
from typing import Any

import polars as pl

from dti_model.data.errors import DataError

MISSING_TITLE = "Unknown title"
MAX_CHARS = 200  # default length of one value: a window holds 20 items, and some titles are whole pages
FINISHED = "text"  # of an item that is given as its finished text, and so no column of a template
_TAG = re.compile(r"</?[a-zA-Z!][^<>]*>")
_DANGLING = " ,:|/-"


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

    def __init__(self, template: str) -> None:
        """Parse a template.

        Raises:
            ValueError: a brace without its pair, a format after a name, or no column at all.
        """
        self.template = template
        way_out = 'Write column names in braces, for example "{title}; {genres}".'
        try:
            pieces = list(string.Formatter().parse(template))
        except ValueError as error:
            raise ValueError(f"text template {template!r}: {error}. {way_out}") from error
        self._parts: list[list[tuple[str, str | None]]] = [[]]
        for literal, column, form, conversion in pieces:
            if column == "" or form or conversion:
                raise ValueError(f"text template {template!r}: only plain column names fit. {way_out}")
            first, *others = literal.split(";")
            self._parts[-1].append((first, None))
            self._parts += [[(other, None)] for other in others]
            if column is not None:
                self._parts[-1].append(("", column))
        self.columns = list(dict.fromkeys(name for part in self._parts for _, name in part if name))
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

    def render(self, items: pl.DataFrame) -> pl.DataFrame:
        """Texts of items.

        Args:
            items: every column of the template as text without null.

        Returns:
            text ("" where every column is empty) and titled (whether the first column has a value).
        """
        title, *others = (pl.col(name) for name in self.columns)
        shown = items.select(
            pl.all_horizontal(title == "", *(other == "" for other in others)).alias("nothing"),
            (title != "").alias("titled"),
            pl.when(title == "").then(pl.lit(MISSING_TITLE)).otherwise(title).alias(f"={self.columns[0]}"),
            *(pl.col(name).alias(f"={name}") for name in self.columns[1:]),
        )
        parts = [self._part(part) for part in self._parts]
        text = pl.concat_list(parts).list.drop_nulls().list.join("; ")
        return shown.select(
            text=pl.when("nothing").then(pl.lit("")).otherwise(text.str.strip_chars()), titled="titled"
        )

    @staticmethod
    def _part(part: list[tuple[str, str | None]]) -> pl.Expr:
        pieces = [pl.lit(literal) if name is None else pl.col(f"={name}") for literal, name in part]
        value = pl.concat_str(pieces).str.strip_chars()
        names = [f"={name}" for _, name in part if name is not None]
        if not names:
            return pl.when(value != "").then(value)
        empty = [pl.col(name) == "" for name in names]
        tidy = value.str.replace_all(r"\(\s*\)|\[\s*\]", "").str.strip_chars(_DANGLING)
        return pl.when(~pl.all_horizontal(empty)).then(
            pl.when(pl.any_horizontal(empty)).then(tidy).otherwise(value)
        )


def template_text(template: Template, fields: Mapping[str, Any], max_chars: int) -> str:
    """The text of one item, as `items_with_text` makes it of a column with such values.

    Raises:
        DataError: a field that the template does not name, a value that no column has, or no value at all.
    """
    unknown = sorted(fields.keys() - set(template.columns))
    if unknown or not any(value not in (None, "", [], ()) for value in fields.values()):
        raise DataError(
            f"an item here has the fields {', '.join(template.columns)} (text template {template.template!r}), or the one field "
            f"text; got {dict(fields)}"
        )
    values = {name: [_value_text(name, fields.get(name))] for name in template.columns}
    frame, _, _ = items_with_text(
        pl.Series(["item"]),
        pl.DataFrame(values, schema=dict.fromkeys(values, pl.String)),
        template,
        max_chars,
    )
    text: str = frame["text"][0]
    return text


def _value_text(name: str, value: Any) -> str | None:
    """The text of a field; lists are joined by commas, without what is null in them."""
    if isinstance(value, (list, tuple)):
        parts = [_scalar_text(f"an entry of the field {name}", part) for part in value]
        return ", ".join(part for part in parts if part is not None)
    return _scalar_text(f"the field {name}", value)


def _scalar_text(place: str, value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, (numbers.Real, Decimal, date, time)):  # a bool is a number, a datetime a date
        try:
            text: str | None = as_text(pl.Series([value]))[0]
            return text
        except (pl.exceptions.PolarsError, OverflowError, TypeError, ValueError):
            pass  # beyond what a column holds
    raise DataError(
        f"{place} must be a text or a number that a column can hold, or a list of them, but is {value!r:.200}"
    )


def as_text(values: pl.Series) -> pl.Series:
    """A column as text: whole numbers without a decimal point, lists joined by commas, NaN as null."""
    frame = values.to_frame("value")
    if isinstance(values.dtype, pl.List):
        parts = pl.col("value").list.eval(_text(pl.element(), values.dtype.inner))
        return frame.select(parts.list.drop_nulls().list.join(", ")).to_series()
    return frame.select(_text(pl.col("value"), values.dtype)).to_series()


def _text(values: pl.Expr, dtype: Any) -> pl.Expr:
    if not dtype.is_float():
        return values.cast(pl.String)
    whole = values.cast(pl.Int64, strict=False)
    return (
        pl.when(whole == values).then(whole.cast(pl.String)).otherwise(values.fill_nan(None).cast(pl.String))
    )


def items_with_text(
    ids: pl.Series, values: pl.DataFrame, template: Template, max_chars: int
) -> tuple[pl.DataFrame, int, int]:
    """Item texts from raw values, one row an item.

    Args:
        ids: the item of every row; of the rows of one item the first with a title is used, or else the first.
        values: the template's columns of the same rows, as text or null.
        template: what a text is made of.
        max_chars: longest value of a column; longer ones are cut at a word.

    Returns:
        A frame of `ITEM_SCHEMA`, the number of rows that repeat an item, and the number of values cut.
    """
    cut, cleaned = 0, {}
    for name in template.columns:
        texts = [clean_text(value) for value in values[name].fill_null("")]
        cut += sum(len(text) > max_chars for text in texts)
        cleaned[name] = pl.Series([shorten(text, max_chars) for text in texts], dtype=pl.String)
    frame = template.render(pl.DataFrame(cleaned)).insert_column(0, ids.alias("item"))
    first = frame.sort("titled", descending=True, maintain_order=True)
    first = first.unique("item", keep="first", maintain_order=True)
    return first, frame.height - first.height, cut
