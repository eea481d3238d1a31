"""How much more often a user clicks items of this kind than others do: `{affinity}`.

    surplus = sum of (label - expected) / (number + 3)        +12% of 20

Both run over the user's earlier interactions with items that share a category with this one (`categories.py`), once for each category
that they share; what is expected is the rate of the earlier item before its own interaction, (clicks + 1) / (interactions + 2). What counts as
earlier, and the steps of the text, are those of `rates.py`. Sums are of integers, 2^-30 each, so that no order of adding matters.

On half of MovieLens-1M, gradient boosting on item rates and the last 20 interactions has a validation AUC of .789; with this one number
beside them .797, and .799 with all that its baseline counts (benchmarks/LOG.md).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from dti_model.data.categories import ItemCategories, categories_of
from dti_model.data.coded_texts import Codes, Column
from dti_model.data.errors import DataError
from dti_model.data.rates import COUNTS, NEW, PERCENT, codes_of_earlier, count_steps, sums_of_earlier
from dti_model.data.row_facts import RowFacts, Rows

ONE = 2**30  # a click, in integers
_PRIOR = 3
_CHUNK = 1 << 20  # rows that are looked at at once


def affinities(facts: RowFacts) -> Column:
    """The user's surplus of clicks among earlier interactions of the item's categories, and how many these are.

    Cost: memory O(chunk + rows of a user) times the categories of an item, and 8 bytes a row.

    Raises:
        DataError: no item has a category.
    """
    categories = ItemCategories.of(map(categories_of, facts.item_texts))
    if not categories.num:
        raise DataError(
            f"{facts.place}: {{affinity}} compares categories of items, which are what stands behind a semicolon in their texts, as in "
            "'Toy Story (1995); Animation, Comedy', and no item has any. Name a column of categories in the template of item texts, "
            "or leave {affinity} out"
        )
    return Column(
        facts.codes_as_read(lambda counted: _affinities_among(counted, categories, facts)), AFFINITY_TEXTS
    )


def affinity_text(surplus: int, shown: int) -> str:
    """`{affinity}` of a request.

    Args:
        surplus: sum of labels less expected rates, in 2^-30.
        shown: number of interactions.

    Example:
        >>> affinity_text(3 * ONE, 21), affinity_text(-ONE // 2, 2), affinity_text(0, 0)
        ('+12% of 20', '-10% of 2', 'new')
    """
    return AFFINITY_TEXTS[int(_codes(np.array([surplus]), np.array([shown]))[0])]


def expected_rates(clicks: Rows, shown: Rows) -> Codes:
    """Expected rates of items, in 2^-30."""
    return np.rint((clicks + 1) / (shown + 2) * ONE).astype(np.int32)


def _affinities_among(counted: npt.NDArray[np.bool_], categories: ItemCategories, facts: RowFacts) -> Codes:
    expected = codes_of_earlier(counted, facts.item, facts, expected_rates)
    codes = np.empty(len(facts.item), np.int32)
    for users, rows in _chunks(facts.offsets):
        item = facts.item[rows]
        row, category = categories.of_rows(item)
        key = (
            np.repeat(users, np.diff(facts.offsets[users.start : users.stop + 1]))[row] * categories.num
            + category
        )
        order = np.argsort(key, kind="stable")
        is_counted = counted[rows].astype(np.int64)
        surplus = (facts.label[rows].astype(np.int64) * ONE - expected[rows]) * is_counted
        found = sums_of_earlier(
            key[order],
            facts.timestamp[rows][row[order]],
            surplus[row[order]],
            is_counted[row[order]],
        )
        codes[rows] = _codes(*(_of_rows(sums, order, row, item.size) for sums in found))
    return codes


def _chunks(offsets: Rows) -> Iterator[tuple[range, slice]]:
    """Some users, and their rows."""
    user = 0
    while user < len(offsets) - 1:
        stop = max(user + 1, int(np.searchsorted(offsets, offsets[user] + _CHUNK, side="right")) - 1)
        yield range(user, stop), slice(int(offsets[user]), int(offsets[stop]))
        user = stop


def _of_rows(values: Rows, order: Rows, row: Rows, num_rows: int) -> Rows:
    """(R,) sums over the entries of every row, of values in another order; `row` ascends."""
    sorted_by_row = np.empty_like(values)
    sorted_by_row[order] = values
    sums = np.concatenate([np.zeros(1, np.int64), np.cumsum(sorted_by_row)])
    ends = np.searchsorted(row, np.arange(num_rows + 1))
    return np.diff(sums[ends])


def _codes(surplus: Rows, shown: Rows) -> Codes:
    """0 for `NEW`, then surplus by surplus, count by count."""
    percent = np.rint(100 / PERCENT * surplus / ((shown + _PRIOR) * ONE)).astype(np.int32)
    codes = 1 + (percent + 100 // PERCENT) * len(COUNTS) + count_steps(shown)
    return np.where(shown > 0, codes, 0).astype(np.int32)


AFFINITY_TEXTS = [
    NEW,
    *(f"{percent:+}% of {count}" for percent in range(-100, 101, PERCENT) for count in COUNTS.tolist()),
]
