"""Columns of an item file as text, and item texts of them.

What a text is made of, and how, is `texts.py`'s.
"""

from __future__ import annotations

from typing import Any

import polars as pl

from dti_model.data.source import ITEM_SCHEMA
from dti_model.data.texts import Template, clean_text, shorten


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
    cut, cleaned = 0, []
    for name in template.columns:
        texts = [clean_text(value) for value in values[name].fill_null("")]
        cut += sum(len(text) > max_chars for text in texts)
        cleaned.append([shorten(text, max_chars) for text in texts])
    rendered = [template.render(dict(zip(template.columns, row))) for row in zip(*cleaned)]
    frame = pl.DataFrame(
        {"item": ids, "text": rendered, "titled": [title != "" for title in cleaned[0]]},
        schema=ITEM_SCHEMA,
    )
    first = frame.sort("titled", descending=True, maintain_order=True)
    first = first.unique("item", keep="first", maintain_order=True)
    return first, frame.height - first.height, cut
