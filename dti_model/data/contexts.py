"""What a context template may name besides columns of the log: facts of an interaction that its log implies.

    {hour} {weekday}     of the time stamp, in the time zone of `prepare`                            20, Friday
    {gap}                time since the user's interaction before, in about ten steps                minutes later
    {item_rate}          clicks among all earlier interactions of the item, by any user              72% of 300
    {user_rate}          clicks among all earlier interactions of the user                           64% of 150
    {item_ctr}, {user_ctr}
                         the same, smoothed and in percent, without the number: one token            72
    {affinity}           clicks beyond the items' rates, in percent, among the user's earlier
                         interactions with items that share a category with this one                 +12

`rates.py` and `affinities.py` say what counts as earlier.
"""

from __future__ import annotations

import datetime
from collections.abc import Collection, Mapping
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import numpy.typing as npt

from dti_model.data.affinities import AFFINITY_TEXTS, affinities
from dti_model.data.coded_texts import Column
from dti_model.data.errors import DataError
from dti_model.data.rates import CTR_TEXTS, RATE_TEXTS, item_ctrs, item_rates, user_ctrs, user_rates
from dti_model.data.row_facts import RowFacts, Rows

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


BUILT_IN = {
    "hour": hours,
    "weekday": weekdays,
    "gap": gaps,
    "item_rate": item_rates,
    "user_rate": user_rates,
    "item_ctr": item_ctrs,
    "user_ctr": user_ctrs,
    "affinity": affinities,
}

OF_TIME = frozenset(("hour", "weekday", "gap"))  # which need time stamps that are dates


def is_value(name: str, text: str) -> bool:
    """Whether a built-in fact has this text in some prompt."""
    values: Mapping[str, Collection[str]] = {
        "hour": HOURS,
        "weekday": WEEKDAYS,
        "gap": _GAP_TEXTS,
        "item_ctr": CTR_TEXTS,
        "user_ctr": CTR_TEXTS,
        "affinity": AFFINITY_TEXTS,
    }
    return text in values.get(name, RATE_TEXTS)


def gap_text(seconds: float) -> str:
    """`{gap}` of a request.

    Example:
        >>> gap_text(75)
        'minutes later'
    """
    return _GAP_TEXTS[np.searchsorted(_GAP_STEPS, seconds, side="right")]


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
