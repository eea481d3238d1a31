"""How much more often a user clicks items of this kind than others do: `{affinity}`.

    affinity = (sum of (label - expected)) / (number + 3)        0.12, "+12"

Both run over the user's earlier interactions with items that share a category with this one (`categories.py`), once for each category
that they share; what is expected is the rate of the earlier item before its own interaction, (clicks + 1) / (interactions + 2). What counts as
earlier is said in `rates.py`. The text is in percent, in steps of 2, without the number: "+12"; where nothing is shared it is "new". Sums are
of integers, 2^-30 of a click each, so that no order of adding matters.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from dti_model.data.categories import ItemCategories, categories_of
from dti_model.data.coded_texts import Codes, Column
from dti_model.data.errors import DataError
from dti_model.data.rates import NEW, PERCENT, codes_of_earlier, sums_of_earlier
from dti_model.data.row_facts import RowFacts, Rows

CLICK_UNITS = 2**30  # a click, in integers
_PRIOR = 3
_CHUNK = 1 << 17  # rows that are looked at at once: more are slower, since they leave the caches


def affinities(facts: RowFacts) -> Column:
    """Affinities of the users to the items of their interactions.

    Cost: O(N C log N) time in N rows with C categories each; memory 8 bytes a row (three times as many where validation or test targets are
    earlier than training targets), and O(C) for each of the rows that are looked at at once.

    Raises:
        DataError: no item has a category.
    """
    categories = ItemCategories.of(map(categories_of, facts.item_texts))
    if not categories.num:
        raise DataError(
            f"{facts.place}: {{affinity}} compares categories of items, and none of its items has any. Categories are what stands behind "
            "the first semicolon of an item text, as of '{title}; {genres}': name such a column in the template of item texts, or leave "
            "{affinity} out"
        )
    return Column(
        facts.codes_as_read(lambda counted: _affinities_among(counted, categories, facts)), AFFINITY_TEXTS
    )


def affinity_text(surplus: int, number: int) -> str:
    """`{affinity}` of a request.

    Args:
        surplus: sum of labels less expected rates, in `CLICK_UNITS`.
        number: of what is summed.

    Example:
        >>> affinity_text(3 * CLICK_UNITS, 21), affinity_text(-CLICK_UNITS // 2, 2), affinity_text(0, 0)
        ('+12', '-10', 'new')
    """
    return AFFINITY_TEXTS[int(_codes(np.array([surplus]), np.array([number]))[0])]


def expected_rates(clicks: Rows, shown: Rows) -> npt.NDArray[np.int32]:
    """Expected rates of items, in `CLICK_UNITS`."""
    return np.rint((clicks + 1) / (shown + 2) * CLICK_UNITS).astype(np.int32)


def _affinities_among(counted: npt.NDArray[np.bool_], categories: ItemCategories, facts: RowFacts) -> Codes:
    expected = codes_of_earlier(counted, facts.item, facts, expected_rates)
    codes = np.empty(len(facts.item), np.int32)
    for users, rows in _chunks(facts.offsets):
        item = facts.item[rows]
        row, category = categories.of_rows(item)
        user = np.repeat(users, np.diff(facts.offsets[users.start : users.stop + 1]))
        key = user[row] * categories.num + category
        order = np.argsort(key, kind="stable")
        is_counted = counted[rows].astype(np.int64)
        surplus = (facts.label[rows].astype(np.int64) * CLICK_UNITS - expected[rows]) * is_counted
        found = sums_of_earlier(
            key[order],
            facts.timestamp[rows][row[order]],
            surplus[row[order]],
            is_counted[row[order]],
        )
        codes[rows] = _codes(*(_of_rows(sums, order, categories.lengths[item]) for sums in found))
    return codes


def _chunks(offsets: Rows) -> Iterator[tuple[range, slice]]:
    """Some users, and their rows."""
    user = 0
    while user < len(offsets) - 1:
        stop = max(user + 1, int(np.searchsorted(offsets, offsets[user] + _CHUNK, side="right")) - 1)
        yield range(user, stop), slice(int(offsets[user]), int(offsets[stop]))
        user = stop


def _of_rows(values: Rows, order: Rows, lengths: Rows) -> Rows:
    """(R,) sums over the entries of every row, `lengths` of each in turn, of values in another order."""
    by_row = np.empty_like(values)
    by_row[order] = values
    # The running sum may pass 2^63 and wraps then; differences below 2^63 stay exact.
    sums = np.concatenate([np.zeros(1, np.int64), np.cumsum(by_row)])
    ends = np.cumsum(lengths)
    return np.asarray(sums[ends] - sums[ends - lengths])


def _codes(surplus: Rows, number: Rows) -> Codes:
    """0 for `NEW`, then surplus by surplus."""
    steps = np.rint(100 / PERCENT * surplus / ((number + _PRIOR) * CLICK_UNITS)).astype(np.int32)
    return np.where(number > 0, 1 + steps + 100 // PERCENT, 0).astype(np.int32)


AFFINITY_TEXTS = [NEW, *(f"{percent:+}" for percent in range(-100, 101, PERCENT))]
