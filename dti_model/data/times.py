"""Time stamps as moments: the unit that they count in, and dates beside them.

A source says its unit. Times of a log that only says "integers" or "numbers" are told by their size: a log lies in the years 1980 to
2100, and in no more than one of seconds, milliseconds, microseconds and nanoseconds since 1970 its first and last time both do.
Where none fits, such as counts or 1 to 9, the times are no dates: an error says so, and nothing is guessed. Where a unit is said, an
error names the one that fits if dates are asked for and the said one gives years beyond 9999.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from dti_model.data.errors import DataError

UNITS = {"seconds": 1, "milliseconds": 10**3, "microseconds": 10**6, "nanoseconds": 10**9}
OF_FILE = "the file's"  # a unit that nobody said
MILLIONTHS = "millionths of "  # before a unit: what fractions are kept in
# A date or date-time, of class or as ISO 8601, or a number in the unit of the file.
Moment = str | float | datetime.date

_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
# In seconds since 1970.
_EARLIEST, _LATEST = 315_532_800, 4_102_444_800  # of a log: 1980 and 2100
_YEAR_1, _YEAR_10_000 = -62_135_596_800, 253_402_300_800  # what Python's dates hold
_YEAR = 31_556_952
_MOST_DIGITS = 20  # 64 bits have 19


@dataclass(frozen=True)
class Clock:
    """The time stamps of a data set as moments.

    Attributes:
        unit: as `RawData.timestamp_unit` and stats["timestamp_unit"] say it: a name of `UNITS` or `OF_FILE`, perhaps after `MILLIONTHS`.
        first, last: the earliest and the latest time stamp.
        place: the file or folder, for messages.
    """

    unit: str
    first: int
    last: int
    place: str = ""

    @classmethod
    def of(cls, stats: Mapping[str, Any], place: str = "") -> Clock:
        """Of a prepared folder's stats."""
        return cls(stats["timestamp_unit"], stats["first_timestamp"], stats["last_timestamp"], place)

    @property
    def scale(self) -> int:
        """Time stamps that make one unit of the file."""
        return 10**6 if self.unit.startswith(MILLIONTHS) else 1

    @property
    def said(self) -> str:
        """The unit of the file's numbers as it is said."""
        return self.unit.removeprefix(MILLIONTHS)

    @property
    def likely(self) -> str | None:
        """The unit in which all times are of 1980 to 2100; None: there is none."""
        for name, count in UNITS.items():
            steps = count * self.scale
            if _EARLIEST * steps <= self.first and self.last < _LATEST * steps:
                return name
        return None

    def file_unit(self) -> str:
        """The name in `UNITS` of what the file's numbers count.

        Raises:
            DataError: nobody said it and the times fit none, or as what was said they are of no year that dates have.
        """
        if self.said == OF_FILE:
            if self.likely is None:
                raise DataError(
                    f"{self._prefix}the time stamps, {self._span}, are of 1980 to 2100 neither as seconds nor as "
                    f"{', '.join(list(UNITS)[1:])} since 1970, so they cannot be read as dates. Say their unit with timestamp_unit "
                    "(--timestamp-unit), or give numbers like theirs instead of dates"
                )
            return self.likely
        steps = UNITS[self.said] * self.scale
        if not _YEAR_1 * steps <= self.first <= self.last < _YEAR_10_000 * steps:
            self.check_said()
            raise DataError(
                f"{self._prefix}the time stamps, {self._span}, are not of the years 1 to 9999 as {self.said}, so they cannot be read as "
                "dates. Mend them, or give numbers like theirs instead of dates"
            )
        return self.said

    def check_said(self) -> None:
        """Compare the unit that was said with the one that fits.

        Raises:
            DataError: another one fits.
        """
        if self.likely not in (None, self.said):
            steps = UNITS[self.said] * self.scale
            raise DataError(
                f"{self._prefix}the time stamps, {self._span}, are {self.likely}, not {self.said}: as {self.said} the last would be of "
                f"the year {1970 + self.last // steps // _YEAR}. Say timestamp_unit = {self.likely} of a log of your own, or mend the file"
            )

    def per_second(self) -> int:
        """Time stamps that make a second.

        Raises:
            DataError: as `file_unit`.
        """
        return UNITS[self.file_unit()] * self.scale

    def seconds(self, timestamps: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Whole seconds since 1970 (UTC) of time stamps, rounded down; of the same shape.

        Raises:
            DataError: as `file_unit`.
        """
        per_second = self.per_second()
        return timestamps if per_second == 1 else timestamps // per_second

    def stamp(self, moment: datetime.datetime | Fraction) -> int:
        """The first time stamp that is not before a moment of `parsed_moment`.

        Raises:
            DataError: it is a date, and the unit is not known (see `file_unit`).
        """
        if isinstance(moment, Fraction):
            return _ceil(moment * self.scale)
        microseconds = (moment - _EPOCH) // datetime.timedelta(microseconds=1)
        return _ceil(Fraction(microseconds * self.per_second(), 10**6))

    def shown(self, timestamp: int) -> str:
        """A time stamp as a date and time of UTC, or as a number of the file where it is none."""
        try:
            moment = _EPOCH + datetime.timedelta(seconds=timestamp // self.per_second())
        except (DataError, OverflowError):
            return f"{timestamp / self.scale:,.15g}" if self.scale > 1 else f"{timestamp:,}"
        return f"{moment:%Y-%m-%d %H:%M:%S} UTC"

    @property
    def tick(self) -> str:
        """What one time stamp is, in a word: a second, or a time stamp of any other unit."""
        try:
            return "second" if self.per_second() == 1 else "time stamp"
        except DataError:
            return "time stamp"

    @property
    def _prefix(self) -> str:
        return f"{self.place}: " if self.place else ""

    @property
    def _span(self) -> str:
        return f"{self.first / self.scale:.15g} to {self.last / self.scale:.15g}"


def seconds_of(timestamps: npt.NDArray[np.int64], unit: str, place: str = "") -> npt.NDArray[np.int64]:
    """Whole seconds since 1970 (UTC) of all time stamps of a data set, rounded down.

    Example:
        >>> seconds_of(np.array([1_577_836_800_500]), OF_FILE).tolist()
        [1577836800]

    Raises:
        DataError: they cannot be read as dates.
    """
    if not timestamps.size:
        return timestamps
    return Clock(unit, int(timestamps.min()), int(timestamps.max()), place).seconds(timestamps)


def parsed_moment(moment: Moment, name: str) -> datetime.datetime | Fraction:
    """A date or date-time, midnight and UTC unless it says otherwise, or a number in the unit of the file.

    Raises:
        ValueError: it is neither; the message says so of the argument `name`.
    """
    try:
        if isinstance(moment, datetime.datetime):
            date = moment
        elif isinstance(moment, datetime.date):
            date = datetime.datetime.combine(moment, datetime.time())
        else:
            text = str(moment).strip()
            number = _number(text)
            if number is not None:
                return number
            date = datetime.datetime.fromisoformat(text)
        return date.replace(tzinfo=datetime.UTC) if date.tzinfo is None else date.astimezone(datetime.UTC)
    except (ValueError, OverflowError):
        raise ValueError(
            f"{name} must be a date or date-time of ISO 8601, such as 2024-05-31 or 2024-05-31T18:00+02:00, or a number in the unit of "
            f"the time stamps, but is {moment or 'empty'}"
        ) from None


def _number(text: str) -> Fraction | None:
    try:
        number = Decimal(text)
    except InvalidOperation:
        return None
    is_plain = number.is_finite() and -_MOST_DIGITS < number.adjusted() < _MOST_DIGITS
    return Fraction(number) if is_plain and len(number.as_tuple().digits) <= 2 * _MOST_DIGITS else None


def _ceil(number: Fraction) -> int:
    """Rounded up, within what 64 bits hold."""
    return max(-(2**63), min(-(-number.numerator // number.denominator), 2**63 - 1))
