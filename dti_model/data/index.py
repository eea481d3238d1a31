"""Interactions by index: rare items pruned, users and items numbered in id order, rows sorted.

    order = (time, user, item, file); ids compare as numbers when all are integers, otherwise as text

Rows of one user, time and item stay in the order of the source's file. Sorted by an answer, such as the rating, the label of one row
would tell the next one's. Time is compared at the full precision of the source. Columns are processed one by one and freed after use:
`prepare` on review files of .5, 1 and 2 million rows peaked at 222, 254 and 361 MiB, some 110 bytes a row at the end
(benchmarks/LOG.md).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from dti_model.data.errors import DataError
from dti_model.data.sources import RawData


@dataclass(frozen=True)
class Indexed:
    """A data set by index: users and items in id order, rows in (user, time, item, file) order.

    `extra` holds, of every extra column of the log, the number of each row's value, int32, and the values by number, of which some may
    have lost their rows. `duplicate_pairs` counts the (user, item) pairs that occur more than once, `duplicate_interactions` their rows
    after the first; both before pruning.
    """

    users: pl.Series
    items: pl.DataFrame
    offsets: npt.NDArray[np.int64]
    item: npt.NDArray[np.int32]
    timestamp: npt.NDArray[np.int64]
    rating: npt.NDArray[np.float32]
    num_pruned: int
    duplicate_pairs: int
    duplicate_interactions: int
    extra: dict[str, tuple[npt.NDArray[np.int32], pl.Series]] = field(default_factory=dict)


def index_rows(raw: RawData, min_item_count: int) -> Indexed:
    """Prune rare items, number users and items, sort. Takes the rows out of `raw`.

    Raises:
        DataError: no interaction is left.
    """
    columns = raw.take_rows()
    num_rows = columns["user"].size
    duplicates = count_duplicates(columns["user"], columns["item"])
    if min_item_count > 1 and num_rows:
        kept = (np.bincount(columns["item"]) >= min_item_count)[columns["item"]]
        for name in columns:
            columns[name] = columns[name][kept]
    if not columns["user"].size:
        raise DataError(
            f"{raw.interactions_path}: no interaction is left of {num_rows:,} (min_item_count is {min_item_count})."
        )
    users, items, offsets = sort_rows(columns, raw.users, raw.rated)
    extra = {name: (columns.pop(f"={name}"), values) for name, values in raw.extra.items()}
    texts = items.to_frame("item").join(raw.items, on="item", how="left", maintain_order="left")
    if texts["text"].null_count() == texts.height:
        raise DataError(
            f"{raw.items_path}: lists none of the {texts.height:,} items of {raw.interactions_path}, such as "
            f"{items[0]!r}. Do the two files belong together, and are the item columns the right ones?"
        )
    return Indexed(
        users=users,
        items=texts.with_columns(pl.col("text").fill_null(""), pl.col("titled").fill_null(False)),
        offsets=offsets,
        **columns,
        num_pruned=num_rows - columns["item"].size,
        duplicate_pairs=duplicates[0],
        duplicate_interactions=duplicates[1],
        extra=extra,
    )


def sort_rows(
    columns: dict[str, npt.NDArray[Any]], users: pl.Series, items: pl.Series
) -> tuple[pl.Series, pl.Series, npt.NDArray[np.int64]]:
    """Number users and items in id order and sort rows, in place; rows of one user, time and item stay as they stood.

    Args:
        columns: by name, `user` (given up), `item` and `timestamp` among them.
        users: the user ids by number.
        items: the item ids by number.

    Returns:
        The ids of users and of items that occur, by their new numbers, and the (U + 1,) offsets of the users' rows.
    """
    users, columns["user"] = _renumbered(users, columns["user"])
    items, columns["item"] = _renumbered(items, columns["item"])
    order = np.lexsort([columns[name] for name in ("item", "timestamp", "user")])  # stable
    counts = np.bincount(columns.pop("user"), minlength=len(users))
    for name in columns:
        columns[name] = columns[name][order]
    return users, items, np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])


def count_duplicates(user: npt.NDArray[np.int32], item: npt.NDArray[np.int32]) -> tuple[int, int]:
    """Number of (user, item) pairs that occur more than once, and of their rows after the first."""
    pairs = user.astype(np.int64)
    pairs <<= 32
    pairs |= item
    pairs.sort()
    repeats = pairs[1:] == pairs[:-1]
    if not repeats.any():
        return 0, 0
    return int(repeats[0]) + int((repeats[1:] & ~repeats[:-1]).sum()), int(repeats.sum())


def _renumbered(names: pl.Series, codes: npt.NDArray[np.int32]) -> tuple[pl.Series, npt.NDArray[Any]]:
    """The names that occur, in id order, and the codes by that order."""
    present = np.zeros(len(names), dtype=bool)
    present[codes] = True
    found = names.filter(pl.Series(present))
    order = _id_order(found)
    rank = np.empty(len(names), dtype=np.int32)
    rank[np.flatnonzero(present)[order]] = np.arange(order.size, dtype=np.int32)
    return found.gather(order), rank[codes]


def _id_order(ids: pl.Series) -> npt.NDArray[np.int64]:
    """The order of distinct ids: as numbers when all are integers (equal ones by text), otherwise as text."""
    by_text = ids.arg_sort().to_numpy()
    numbers = ids.cast(pl.Int64, strict=False)
    if numbers.null_count():
        return by_text
    return by_text[np.argsort(numbers.to_numpy()[by_text], kind="stable")]
