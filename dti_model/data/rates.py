"""How often earlier interactions were clicked: of an item, and of a user.

Interactions of an earlier time stamp count, not of the same one: nothing looks ahead, and what shares a second was not known. Rates that
training reads, up to a user's last training target, count no validation or test target, of which some are earlier where the split is not
by time. Rates are rounded to 2 %, counts down to some six steps a factor of ten, so that few distinct texts stand for all.

    rate    72% of 300      clicks / interactions, and how many
    ctr     72              (clicks + 2) / (interactions + 4) in percent: pulled to one half where little is known, and no number beside it
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dti_model.data.coded_texts import Codes, Column
from dti_model.data.row_facts import RowFacts, Rows

NEW = "new"  # of what has no earlier interaction
PERCENT = 2  # steps of a rate
COUNTS = np.array(
    [
        round(step * 10**power)
        for power in range(7)
        for step in (1, 1.5, 2, 3, 5, 7)
        if step * 10**power % 1 == 0
    ]
)
_PRIOR = 2  # clicks, and as many interactions without one, that a smoothed rate begins with
_CHUNK = 1 << 20  # rows that are looked at at once


def item_rates(facts: RowFacts) -> Column:
    """Clicks among the item's earlier interactions, and how many these are."""
    return _rates(facts.item, facts, _rate_codes, RATE_TEXTS)


def user_rates(facts: RowFacts) -> Column:
    """Clicks among the user's earlier interactions, and how many these are."""
    return _rates(facts.user(), facts, _rate_codes, RATE_TEXTS)


def item_ctrs(facts: RowFacts) -> Column:
    """Smoothed rate of clicks among the item's earlier interactions."""
    return _rates(facts.item, facts, _ctr_codes, CTR_TEXTS)


def user_ctrs(facts: RowFacts) -> Column:
    """Smoothed rate of clicks among the user's earlier interactions."""
    return _rates(facts.user(), facts, _ctr_codes, CTR_TEXTS)


def rate_text(clicks: int, shown: int) -> str:
    """`{item_rate}` or `{user_rate}` of a request.

    Example:
        >>> rate_text(223, 312), rate_text(0, 0)
        ('72% of 300', 'new')
    """
    return RATE_TEXTS[int(_rate_codes(np.array([clicks]), np.array([shown]))[0])]


def ctr_text(clicks: int, shown: int) -> str:
    """`{item_ctr}` or `{user_ctr}` of a request.

    Example:
        >>> ctr_text(223, 312), ctr_text(1, 1), ctr_text(0, 0)
        ('72', '60', 'new')
    """
    return CTR_TEXTS[int(_ctr_codes(np.array([clicks]), np.array([shown]))[0])]


def _rates(
    key: npt.NDArray[Any], facts: RowFacts, codes_of: Callable[[Rows, Rows], Codes], texts: Sequence[str]
) -> Column:
    """Of rows with the same key and an earlier time stamp."""
    return Column(facts.codes_as_read(lambda counted: codes_of_earlier(counted, key, facts, codes_of)), texts)


def codes_of_earlier(
    counted: npt.NDArray[np.bool_],
    key: npt.NDArray[Any],
    facts: RowFacts,
    codes_of: Callable[[Rows, Rows], Codes],
) -> Codes:
    """(I,) int32 `codes_of(clicks, interactions)` among the `counted` rows of the same key and an earlier time stamp.

    Memory: O(keys + chunk) besides the codes.
    """
    codes = np.empty(len(key), np.int32)
    clicks = np.zeros(int(key.max()) + 1, np.int64)
    shown = np.zeros_like(clicks)
    start = 0
    while start < len(key):
        # A chunk ends where a time stamp does.
        rows = facts.by_time[start : start + _CHUNK]
        last = facts.timestamp[rows[-1]]
        while start + len(rows) < len(key) and facts.timestamp[facts.by_time[start + len(rows)]] == last:
            rows = facts.by_time[start : start + 2 * len(rows)]
            rows = rows[facts.timestamp[rows] <= last]
        start += len(rows)
        grouped = rows[np.argsort(key[rows], kind="stable")]
        of, is_counted = key[grouped].astype(np.int64), counted[grouped].astype(np.int64)
        value = facts.label[grouped] * is_counted
        earlier = sums_of_earlier(of, facts.timestamp[grouped], value, is_counted)
        codes[grouped] = codes_of(earlier[0] + clicks[of], earlier[1] + shown[of])
        clicks += np.bincount(of, value, len(clicks)).astype(np.int64)
        shown += np.bincount(of, is_counted, len(shown)).astype(np.int64)
    return codes


def sums_of_earlier(key: Rows, timestamp: Rows, *values: Rows) -> list[Rows]:
    """For each of the values (E,) its sums over the entries of the same key and an earlier time stamp; keys ascend, and times in a key."""
    new_key = np.diff(key, prepend=-1) != 0
    new_time = new_key | (np.diff(timestamp, prepend=0) != 0)
    # Sums before each entry, since its key began, as they were where its time stamp began.
    places = np.arange(len(key))
    key_began = np.maximum.accumulate(np.where(new_key, places, 0))
    time_began = np.maximum.accumulate(np.where(new_time, places, 0))
    sums = [np.cumsum(x) - x for x in values]
    return [x[time_began] - x[key_began] for x in sums]


def count_steps(shown: Rows) -> Codes:
    """Index into `COUNTS` of each number, rounded down; -1 for 0."""
    return (np.searchsorted(COUNTS, shown, side="right") - 1).astype(np.int32)


def _rate_codes(clicks: Rows, shown: Rows) -> Codes:
    """0 for `NEW`, then rate by rate, count by count."""
    percent = np.round(100 / PERCENT * clicks / np.maximum(shown, 1)).astype(np.int32)
    codes = 1 + percent * len(COUNTS) + count_steps(shown)
    return np.where(shown > 0, codes, 0).astype(np.int32)


def _ctr_codes(clicks: Rows, shown: Rows) -> Codes:
    """0 for `NEW`, then rate by rate."""
    steps = np.rint(100 / PERCENT * (clicks + _PRIOR) / (shown + 2 * _PRIOR)).astype(np.int32)
    return np.where(shown > 0, 1 + steps, 0).astype(np.int32)


RATE_TEXTS = [
    NEW,
    *(f"{percent}% of {count}" for percent in range(0, 101, PERCENT) for count in COUNTS.tolist()),
]
CTR_TEXTS = [NEW, *(f"{percent}" for percent in range(0, 101, PERCENT))]
