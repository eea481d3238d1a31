"""What a context template may name besides columns of the log: facts of an interaction that its log implies.

    {hour} {weekday}     of the time stamp, in the time zone of `prepare`                            20, Friday
    {gap}                time since the user's interaction before, in about ten steps                minutes later
    {item_rate}          clicks among all earlier interactions of the item, by any user              72% of 300
    {user_rate}          clicks among all earlier interactions of the user                           64% of 150

Rates count interactions of an earlier time stamp, not of the same one: nothing looks ahead, and what shares a second was not known. Rates that
training reads, up to a user's last training target, count no validation or test target, of which some are earlier where the split is not
by time. Rates are rounded to 2 %, counts down to some six steps a factor of ten, so that few distinct texts stand for all.
"""

from __future__ import annotations

import datetime
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import numpy.typing as npt

from dti_model.data.coded_texts import Codes, Column
from dti_model.data.errors import DataError
from dti_model.data.split import TEST, TRAIN, VAL
from dti_model.data.times import seconds_of

Rows = npt.NDArray[np.int64]

HOURS = [str(hour) for hour in range(24)]
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
# Least seconds of each step. A log's clock counts seconds: what shares one was one page.
GAPS = {
    0: "at once",
    1: "seconds later",
    10: "within a minute",
    60: "minutes later",
    600: "within the hour",
    3_600: "hours later",
    86_400: "days later",
    7 * 86_400: "weeks later",
    30 * 86_400: "months later",
    365 * 86_400: "years later",
}
FIRST = "first of all"  # nothing was before
_GAP_TEXTS = (FIRST, *GAPS.values())
_GAP_STEPS = np.array(list(GAPS))
NEW = "new"  # of an item or user without an earlier interaction
_PERCENT = 2  # steps of a rate
_COUNTS = np.array(
    [
        round(step * 10**power)
        for power in range(7)
        for step in (1, 1.5, 2, 3, 5, 7)
        if step * 10**power % 1 == 0
    ]
)
_CHUNK = 1 << 20  # rows that are looked at at once


@dataclass(frozen=True, eq=False)
class RowFacts:
    """The interactions of a data set as contexts are made of them; arrays are (I,), rows user after user, each in time order.

    Attributes:
        offsets: (U + 1,) int64, user u owns rows `offsets[u]:offsets[u + 1]`.
        item: index of the item.
        label: 0 or 1.
        timestamp: in `unit`.
        by_time: the rows in the global order.
        split: codes of `split.py`.
        unit: as stats["timestamp_unit"].
        timezone: name of an IANA time zone.
        place: the file or folder, for messages.
    """

    offsets: Rows
    item: npt.NDArray[np.int32]
    label: npt.NDArray[np.int8]
    timestamp: Rows
    by_time: Rows
    split: npt.NDArray[np.int8]
    unit: str
    timezone: str
    place: str

    def user(self) -> Rows:
        """User index of every row."""
        return np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))

    def seconds(self) -> Rows:
        """Seconds since 1970.

        Raises:
            DataError: the time stamps are no dates.
        """
        seconds: Rows = seconds_of(self.timestamp, self.unit, self.place)
        return seconds


def hours(facts: RowFacts) -> Column:
    """Hour of the day, 0 to 23."""
    return Column(_local(facts.seconds(), facts.timezone) // 3600 % 24, HOURS)


def weekdays(facts: RowFacts) -> Column:
    """Day of the week."""
    days = _local(facts.seconds(), facts.timezone) // 86_400
    return Column((days + 3) % 7, WEEKDAYS)  # 1 January 1970 was a Thursday


def gaps(facts: RowFacts) -> Column:
    """Time since the interaction before, in words."""
    seconds = facts.seconds()
    since = np.diff(seconds, prepend=seconds[:1])
    codes = np.searchsorted(_GAP_STEPS, since, side="right").astype(np.int32)
    codes[facts.offsets[:-1]] = 0
    return Column(codes, _GAP_TEXTS)


def item_rates(facts: RowFacts) -> Column:
    """Clicks among the item's earlier interactions, and how many these are."""
    return _rates(facts.item, facts)


def user_rates(facts: RowFacts) -> Column:
    """Clicks among the user's earlier interactions, and how many these are."""
    return _rates(facts.user(), facts)


BUILT_IN = {
    "hour": hours,
    "weekday": weekdays,
    "gap": gaps,
    "item_rate": item_rates,
    "user_rate": user_rates,
}

OF_TIME = frozenset(("hour", "weekday", "gap"))  # which need time stamps that are dates


def is_value(name: str, text: str) -> bool:
    """Whether a built-in fact has this text in some prompt."""
    values: Mapping[str, Collection[str]] = {
        "hour": HOURS,
        "weekday": WEEKDAYS,
        "gap": _GAP_TEXTS,
    }
    return text in values.get(name, _RATE_TEXTS)


def gap_text(seconds: float) -> str:
    """`{gap}` of a request.

    Example:
        >>> gap_text(75)
        'minutes later'
    """
    return _GAP_TEXTS[np.searchsorted(_GAP_STEPS, seconds, side="right")]


def rate_text(clicks: int, shown: int) -> str:
    """`{item_rate}` or `{user_rate}` of a request.

    Example:
        >>> rate_text(223, 312), rate_text(0, 0)
        ('72% of 300', 'new')
    """
    return _RATE_TEXTS[int(_rate_codes(np.array([clicks]), np.array([shown]))[0])]


def moment_texts(seconds: int, timezone: str) -> Mapping[str, str]:
    """`{hour}` and `{weekday}` of a request.

    Example:
        >>> moment_texts(1_000_000_000, "UTC")
        {'hour': '1', 'weekday': 'Sunday'}
    """
    local = datetime.datetime.fromtimestamp(seconds, ZoneInfo(timezone))
    return {"hour": str(local.hour), "weekday": WEEKDAYS[local.weekday()]}


def check_timezone(name: str) -> None:
    """Raise a ValueError unless there is such a time zone."""
    try:
        ZoneInfo(name)
    except (KeyError, ValueError, OSError, TypeError):
        raise ValueError(
            f"timezone must be the name of an IANA time zone, such as Europe/Berlin or UTC, but is {name!r}"
        ) from None


def _local(seconds: Rows, timezone: str) -> npt.NDArray[Any]:
    """Seconds of the local clock since 1970: UTC's with the offset of the day and the season."""
    zone = ZoneInfo(timezone)
    # No zone changes within a quarter of an hour.
    quarters, places = np.unique(seconds // 900, return_inverse=True)
    offsets = np.empty(len(quarters), np.int64)
    for place, quarter in enumerate(quarters.tolist()):
        try:
            offset = datetime.datetime.fromtimestamp(quarter * 900, zone).utcoffset()
        except (OverflowError, ValueError, OSError):
            raise DataError(
                f"a time stamp, {quarter * 900:,} seconds since 1970, is at the edge of the years 1 to 9999 and has no hour in {timezone}. "
                "Mend it, or leave {hour} and {weekday} out"
            ) from None
        assert offset is not None
        offsets[place] = round(offset.total_seconds())
    return seconds + offsets[places]


def _rates(key: npt.NDArray[Any], facts: RowFacts) -> Column:
    """Rates of rows with the same key and an earlier time stamp."""
    codes = _rates_among(np.ones(len(key), bool), key, facts)
    is_scored, trains, stamps = np.isin(facts.split, (VAL, TEST)), facts.split == TRAIN, facts.timestamp
    # Where the split is by time, no validation or test target is earlier than a training target.
    if is_scored.any() and trains.any() and stamps[is_scored].min() < stamps[trains].max():
        user, rows = facts.user(), np.arange(len(key))
        last = np.full(len(facts.offsets) - 1, -1)
        last[user[trains]] = rows[trains]  # of several the last one is kept
        is_read = rows <= last[user]
        codes = np.where(is_read, _rates_among(~is_scored, key, facts), codes).astype(np.int32)
    return Column(codes, _RATE_TEXTS)


def _rates_among(counted: npt.NDArray[np.bool_], key: npt.NDArray[Any], facts: RowFacts) -> Codes:
    """Codes of rates among the rows that are `counted`; memory O(keys + chunk) besides the codes."""
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
        new_key = np.diff(of, prepend=-1) != 0
        new_time = new_key | (np.diff(facts.timestamp[grouped], prepend=0) != 0)
        # Sums before each row, since its key began, as they were where its time stamp began.
        places = np.arange(len(of))
        key_began = np.maximum.accumulate(np.where(new_key, places, 0))
        time_began = np.maximum.accumulate(np.where(new_time, places, 0))
        sums = [np.cumsum(x) - x for x in (value, is_counted)]
        earlier = [x[time_began] - x[key_began] for x in sums]
        codes[grouped] = _rate_codes(earlier[0] + clicks[of], earlier[1] + shown[of])
        clicks += np.bincount(of, value, len(clicks)).astype(np.int64)
        shown += np.bincount(of, is_counted, len(shown)).astype(np.int64)
    return codes


def _rate_codes(clicks: Rows, shown: Rows) -> npt.NDArray[np.int32]:
    """0 for `NEW`, then rate by rate, count by count."""
    percent = np.round(100 / _PERCENT * clicks / np.maximum(shown, 1)).astype(np.int32)
    count = np.searchsorted(_COUNTS, shown, side="right").astype(np.int32)
    return np.where(shown > 0, 1 + percent * len(_COUNTS) + count - 1, 0).astype(np.int32)


_RATE_TEXTS = [
    NEW,
    *(f"{percent}% of {count}" for percent in range(0, 101, _PERCENT) for count in _COUNTS.tolist()),
]
