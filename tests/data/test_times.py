"""Time stamps as moments: units told by size, units that are said, and dates beside time stamps."""

from __future__ import annotations

import datetime

import numpy as np
import pytest

from dti_model.data import DataError
from dti_model.data.times import MILLIONTHS, OF_FILE, UNITS, Clock, Moment, parsed_moment, seconds_of

NEW_YEAR = 1_577_836_800  # 2020-01-01 00:00 UTC


def stamp(clock: Clock, moment: Moment) -> int:
    return clock.stamp(parsed_moment(moment, "val_from"))


@pytest.mark.parametrize("unit", UNITS)
def test_units_are_told_by_size(unit: str) -> None:
    steps = UNITS[unit]
    for said in (OF_FILE, unit):
        clock = Clock(said, NEW_YEAR * steps, (NEW_YEAR + 60) * steps)
        assert (clock.file_unit(), clock.per_second()) == (unit, steps)
        assert stamp(clock, "2020-01-01T00:00:30Z") == (NEW_YEAR + 30) * steps
        assert clock.tick == ("second" if unit == "seconds" else "time stamp")
        assert clock.shown((NEW_YEAR + 61) * steps - 1) == "2020-01-01 00:01:00 UTC"
    found = seconds_of(np.array([NEW_YEAR * steps, (NEW_YEAR + 61) * steps - 1]), OF_FILE)
    assert found.tolist() == [NEW_YEAR, NEW_YEAR + 60]


def test_fractions_are_kept_in_millionths() -> None:
    """1577836800.25 seconds are kept as 1577836800250000 millionths; a number still counts seconds."""
    first = NEW_YEAR * 10**6 + 250_000
    clock = Clock(MILLIONTHS + OF_FILE, first, first + 10**6)
    assert (clock.file_unit(), clock.per_second()) == ("seconds", 10**6)
    assert stamp(clock, "1577836800.5") == NEW_YEAR * 10**6 + 500_000
    assert stamp(clock, "2020-01-01 00:00:00.5") == NEW_YEAR * 10**6 + 500_000
    assert seconds_of(np.array([first, first + 10**6]), MILLIONTHS + "seconds").tolist() == [
        NEW_YEAR,
        NEW_YEAR + 1,
    ]


MOMENTS: dict[str, tuple[Moment, int]] = {
    "a date": ("2020-01-01", 0),
    "a date of class": (datetime.date(2020, 1, 2), 86_400),
    "a date-time of class": (datetime.datetime(2020, 1, 1, 1), 3600),
    "a time with an offset": ("2020-01-01T01:00:00+02:00", -3600),
    "a blank between": (" 2020-01-01 00:00 ", 0),
    "a fraction, which no second before it has": ("2020-01-01T00:00:00.1Z", 1),
    "a number": (NEW_YEAR + 7, 7),
    "a fraction of a number": (f"{NEW_YEAR}.5", 1),
    "an exponent": ("1.577836805e9", 5),
}


@pytest.mark.parametrize("case", MOMENTS)
def test_moments_beside_seconds(case: str) -> None:
    moment, seconds = MOMENTS[case]
    assert stamp(Clock("seconds", NEW_YEAR, NEW_YEAR + 5), moment) == NEW_YEAR + seconds


@pytest.mark.parametrize(
    "moment", ["", "soon", "2020-13-01", "01.05.2020", "nan", "inf", "1e999999999", "1e-999999999", "1/2"]
)
def test_what_is_no_moment(moment: str) -> None:
    with pytest.raises(
        ValueError, match=rf"val_from must be a date or date-time .*, but is {moment or 'empty'}$"
    ):
        parsed_moment(moment, "val_from")


def test_times_of_no_known_unit_are_no_dates() -> None:
    """Small integers may be days, or only an order; a number stays one."""
    clock = Clock(OF_FILE, 3, 47, "log.csv")
    assert (stamp(clock, "12"), clock.shown(12_000)) == (12, "12,000")
    with pytest.raises(
        DataError, match=r"log\.csv: the time stamps, 3 to 47, are .* neither as .*--timestamp-unit"
    ):
        stamp(clock, "2020-01-01")
    assert clock.tick == "time stamp"
    with pytest.raises(DataError, match="3 to 1577836800, are of 1980 to 2100 neither"):
        Clock(OF_FILE, 3, NEW_YEAR).per_second()  # one 0 among times is none


def test_milliseconds_where_seconds_are_said() -> None:
    clock = Clock("seconds", NEW_YEAR * 1000, NEW_YEAR * 1000 + 5, "log.csv")
    message = (
        r"log\.csv: the time stamps, 1577836800000 to 1577836800005, are milliseconds, not seconds: as seconds the last would be of "
        r"the year 51969\. Say timestamp_unit = milliseconds of a log"
    )
    with pytest.raises(DataError, match=message):
        stamp(clock, "2020-01-01")
    with pytest.raises(DataError, match=r"are seconds, not milliseconds: .* of the year 1970\."):
        Clock("milliseconds", NEW_YEAR, NEW_YEAR).check_said()


def test_years_that_no_date_has() -> None:
    """Said units are believed where no other one fits better, but a date has a year of four digits."""
    assert stamp(Clock("seconds", 3, 47), "1970-01-01T00:00:20") == 20
    with pytest.raises(DataError, match="not of the years 1 to 9999 as seconds"):
        Clock("seconds", 0, 2**62).per_second()
    assert Clock("seconds", 0, 2**62).shown(2**62) == f"{2**62:,}"
