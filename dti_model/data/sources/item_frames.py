"""Columns of an item file as text, and item texts of them.

The rules of texts are in `texts.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import polars as pl

from dti_model.data.texts import MAX_CHARS, Template, clean_text, shorten

ITEM_SCHEMA = {"item": pl.String, "text": pl.String, "titled": pl.Boolean}


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


class ItemTexts:
    """The texts of the items that are wanted, such as those with interactions; of the others only their rows are counted.

    Rows come in batches, so that an item file of any size takes the memory of the texts that are needed.

    Attributes:
        num_repeated: rows of those items after their first.
        num_cut: values of those items that were longer than allowed.
    """

    def __init__(self, wanted: pl.Series, template: Template, max_chars: int = MAX_CHARS) -> None:
        """Start without any.

        Args:
            wanted: the ids of the items.
            template: what a text is made of.
            max_chars: longest value of a column; longer ones are cut at a word.
        """
        self._texts: dict[str, tuple[str, bool] | None] = dict.fromkeys(wanted)
        self._template, self._max_chars = template, max_chars
        self.num_repeated = self.num_cut = 0

    def __contains__(self, item: str) -> bool:
        return item in self._texts

    def add(self, ids: Iterable[str], columns: Mapping[str, Iterable[str | None]]) -> None:
        """Take rows: ids, and the template's columns as text or null. The first row of an item that has a title is used, or else the
        first."""
        names = self._template.columns
        for item, *row in zip(ids, *(columns[name] for name in names)):
            if item not in self:
                continue
            texts = [clean_text(value or "") for value in row]
            self.num_cut += sum(len(text) > self._max_chars for text in texts)
            before, titled = self._texts[item], texts[0] != ""
            self.num_repeated += before is not None
            if before is None or (titled and not before[1]):
                short = [shorten(text, self._max_chars) for text in texts]
                self._texts[item] = self._template.render(dict(zip(names, short))), titled

    def frame(self) -> pl.DataFrame:
        """The items found, of `ITEM_SCHEMA`."""
        found = [(item, *text) for item, text in self._texts.items() if text is not None]
        return pl.DataFrame(found, schema=ITEM_SCHEMA, orient="row")
