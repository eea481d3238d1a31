"""Categories of items: all parts of an item text behind its first semicolon, cut at ";" and ",".

What a template puts there counts: genres and brands, but also a year or a word of a title that holds a semicolon.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dti_model.data.ranges import ranges
from dti_model.data.texts import MAX_CHARS, shorten

_MOST_OF_ITEM = 8  # of an item its first ones count

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class ItemCategories:
    """Of `num` categories, item i has `ids[offsets[i] : offsets[i] + lengths[i]]`; arrays are int64."""

    num: int
    offsets: Ids
    lengths: Ids
    ids: Ids

    @staticmethod
    def of(categories: Iterable[list[str]], kept: Iterable[str] | None = None) -> ItemCategories:
        """Number them.

        Args:
            categories: of every item.
            kept: the ones that count, numbered in this order; None: all. Of an item the first eight of those that count are taken.
        """
        index = {name: number for number, name in enumerate(kept or ())}
        ids, lengths = [], []
        for of_item in categories:
            counted = of_item if kept is None else [name for name in of_item if name in index]
            numbers = [index.setdefault(name, len(index)) for name in counted[:_MOST_OF_ITEM]]
            ids += numbers
            lengths.append(len(numbers))
        counts = np.array(lengths, np.int64)
        return ItemCategories(len(index), np.cumsum(counts) - counts, counts, np.array(ids, np.int64))

    def of_rows(self, item: npt.NDArray[np.integer]) -> tuple[Ids, Ids]:
        """The categories of rows with these items, as pairs: (E,) places among the rows, ascending, and (E,) numbers of categories."""
        lengths = self.lengths[item]
        return np.repeat(np.arange(item.size), lengths), self.ids[ranges(self.offsets[item], lengths)]


def categories_of(text: str) -> list[str]:
    """Categories of an item text, each once, as long as a value of a column may be.

    Example:
        >>> categories_of("Toy Story (1995); Animation, Comedy")
        ['Animation', 'Comedy']
    """
    behind = text.split(";")[1:]
    parts = (shorten(part.strip(), MAX_CHARS) for piece in behind for part in piece.split(","))
    return list(dict.fromkeys(part for part in parts if part))


def counted_categories(text: str) -> list[str]:
    """The first eight of them, as `ItemCategories.of` takes them."""
    return categories_of(text)[:_MOST_OF_ITEM]
