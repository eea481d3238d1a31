"""Splits by date and by a column of the log, what a split hides, and logs of one class."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from dti_model.data import CONTEXT, TEST, TRAIN, VAL, CustomFiles, DataError, PreparedData, prepare
from dti_model.data.times import Moment
from tests.data.log_files import CATALOGUE, small_log, write_amazon
from tests.data.movielens_files import Rating, some_ratings, write_1m

DAY = 86_400
NEW_YEAR = 1_577_836_800  # 2020-01-01 00:00 UTC
# Ten users who rate an item a day in the first eight days of 2020; user u at second u.
DAYS: list[Rating] = [
    (user, (1, 2, 3, 9, 10, 11, 100, 101)[day], 1 + (user + day) % 5, NEW_YEAR + DAY * day + user)
    for user in range(10)
    for day in range(8)
]


def prepared(tmp_path: Path, **settings: Any) -> tuple[dict[str, Any], PreparedData]:
    raw = write_1m(tmp_path / "raw", [(user + 1, item, r, t) for user, item, r, t in DAYS])
    stats = prepare(
        "ml-1m", tmp_path / "out", raw, subset=True, vocab_size=270, **{"min_context": 2, **settings}
    )
    return stats, PreparedData.open(tmp_path / "out")


BOUNDARIES: dict[str, tuple[Moment, Moment]] = {
    "dates": ("2020-01-05", "2020-01-07"),
    "date-times with offsets": ("2020-01-04T23:00:00-01:00", "2020-01-07 02:00+02:00"),
    "objects": (datetime.date(2020, 1, 5), datetime.datetime(2020, 1, 7)),
    "numbers": (NEW_YEAR + 4 * DAY, str(NEW_YEAR + 6 * DAY)),
    "a date and a number": ("2020-01-05", float(NEW_YEAR + 6 * DAY)),
}


@pytest.mark.parametrize("case", BOUNDARIES)
def test_targets_by_date(tmp_path: Path, case: str) -> None:
    """Seconds on the boundary belong to what begins there: user 0 rates at midnight."""
    val_from, test_from = BOUNDARIES[case]
    stats, data = prepared(tmp_path, val_from=val_from, test_from=test_from)
    assert data.split.reshape(10, 8).tolist() == [[CONTEXT] * 2 + [TRAIN] * 2 + [VAL] * 2 + [TEST] * 2] * 10
    assert stats["split"] == "date"
    assert stats["split_rule"] == {"val_from": NEW_YEAR + 4 * DAY, "test_from": NEW_YEAR + 6 * DAY}
    assert stats["splits"]["train_after_test"] == 0


WRONG_BOUNDARIES = {
    "one alone": ({"val_from": "2020-01-05"}, r"val_from needs test_from \(--test-from\) beside it"),
    "the other alone": ({"test_from": "2020-01-05"}, r"test_from needs val_from \(--val-from\) beside it"),
    "no dates": (
        {"val_from": "5 May", "test_from": "2020-01-05"},
        "val_from must be a date .*, but is 5 May",
    ),
    "equal": ({"val_from": "2020-01-05", "test_from": "2020-01-05T00:00Z"}, "test_from must be later than"),
    "turned round": (
        {"val_from": 5, "test_from": 4},
        "test_from must be later than val_from, but 4 is not later than 5",
    ),
    "turned round, of two kinds": (
        {"val_from": "2020-01-05", "test_from": NEW_YEAR},
        "test_from must be later than val_from",
    ),
    "beside shares": (
        {"val_from": 1, "test_from": 2, "split": "global"},
        r"split \(--split\) and val_from with test_from each divide the targets: keep one of them",
    ),
    "after the data": (
        {"val_from": "2020-02-01", "test_from": "2020-03-01"},
        r"ratings\.dat: no target is val or test\. Validation begins at 2020-02-01 00:00:00 UTC and test at 2020-03-01 00:00:00 UTC, and "
        "interactions are from 2020-01-01 00:00:00 UTC to 2020-01-08 00:00:09 UTC",
    ),
    "beyond all years": (
        {"val_from": 1e15, "test_from": "9e18"},
        "no target is val or test. Validation begins at 1,000,000,000,000,000 and test at 9,000,000,000,000,000,000",
    ),
    "before every target": ({"val_from": "2020-01-02", "test_from": "2020-01-05"}, "no target is train"),
}


@pytest.mark.parametrize("case", WRONG_BOUNDARIES)
def test_boundaries_that_divide_nothing(tmp_path: Path, case: str) -> None:
    settings, message = WRONG_BOUNDARIES[case]
    with pytest.raises(ValueError, match=message):
        prepared(tmp_path, **settings)
    assert not (tmp_path / "out").exists()


def own_log(
    tmp_path: Path, times: list[Any], splits: list[str] | None = None, **settings: Any
) -> CustomFiles:
    """One user's log; every other row is a click."""
    words = splits or [""] * len(times)
    rows = [f"1,{'ab'[i % 2]},{time},{i % 2},{word}" for i, (time, word) in enumerate(zip(times, words))]
    return small_log(tmp_path, "\n".join(["user,item,timestamp,liked,part", *rows]) + "\n", **settings)


def test_milliseconds_of_an_own_log(tmp_path: Path) -> None:
    """Their unit is told by size, or said; seconds are not believed of them, nor dates of small numbers."""
    times = [(NEW_YEAR + DAY * day) * 1000 + 5 for day in range(6)]
    by_date = {"val_from": "2020-01-03", "test_from": "2020-01-05", "min_context": 0, "vocab_size": 270}
    for unit in (None, "milliseconds"):
        stats = prepare(own_log(tmp_path, times, timestamp_unit=unit), tmp_path / "out", **by_date)
        assert [stats["splits"][name]["targets"] for name in ("train", "val", "test")] == [2, 2, 2]
        assert stats["timestamp_unit"] == (unit or "the file's")
        assert stats["split_rule"]["val_from"] == (NEW_YEAR + 2 * DAY) * 1000
    with pytest.raises(
        DataError,
        match=r"log\.csv: the time stamps, .*, are milliseconds, not seconds: as seconds the last would be of the year 51",
    ):
        own_log(tmp_path, times, timestamp_unit="seconds").load()
    with pytest.raises(DataError, match=r"log\.csv: the time stamps, 0 to 5, .*--timestamp-unit"):
        prepare(own_log(tmp_path, list(range(6))), tmp_path / "other", **by_date)
    said = own_log(tmp_path, list(range(6)), timestamp_unit="seconds")
    stats = prepare(said, tmp_path / "out", **{**by_date, "val_from": "1970-01-01T00:00:02", "test_from": 4})
    assert [stats["splits"][name]["targets"] for name in ("train", "val", "test")] == [2, 2, 2]


def test_fractions_and_dates_of_an_own_log(tmp_path: Path) -> None:
    by_date = {"val_from": "2020-01-03", "test_from": "2020-01-05", "min_context": 0, "vocab_size": 270}
    fractions = [f"{NEW_YEAR + DAY * day}.5" for day in range(6)]
    found = prepare(own_log(tmp_path, fractions, timestamp_unit="seconds"), tmp_path / "out", **by_date)
    assert (found["timestamp_unit"], found["splits"]["val"]["targets"]) == ("millionths of seconds", 2)
    numbers = {**by_date, "val_from": NEW_YEAR + 2 * DAY, "test_from": NEW_YEAR + 4 * DAY}
    assert prepare(own_log(tmp_path, fractions), tmp_path / "out", **numbers)["splits"] == found["splits"]
    dates = [f"2020-01-0{day + 1}T00:00:00.5" for day in range(6)]
    assert prepare(own_log(tmp_path, dates), tmp_path / "out", **by_date)["splits"] == found["splits"]
    with pytest.raises(DataError, match=r"log\.csv: column timestamp holds dates, which have no unit"):
        own_log(tmp_path, dates, timestamp_unit="seconds").load()
    with pytest.raises(ValueError, match="timestamp_unit must be one of seconds, .*, but is 'days'"):
        own_log(tmp_path, dates, timestamp_unit="days")


PUBLISHED = ["train", "", "Valid", " TEST", "dev", "training", "test", "validation", "val", "train"]


def test_a_published_split(tmp_path: Path) -> None:
    """Rows without a word are context only, and a word that is none is a rejected row; times come in any order."""
    times = [3, 1, 2, 9, 8, 7, 6, 5, 4, 0]
    files = own_log(tmp_path, times, PUBLISHED, split_column="part")
    stats = prepare(files, tmp_path / "out", min_context=0, vocab_size=270)
    wanted = [TRAIN, CONTEXT, VAL, TRAIN, VAL, VAL, TEST, VAL, TEST]
    assert PreparedData.open(tmp_path / "out").split.tolist() == wanted
    assert stats["rejected"]["first"] == [
        "log.csv:7: part must be train, val (valid, validation, dev), test or empty, but is training"
    ]
    assert stats["split"] == "column"
    without = {"train": 0, "val": 0, "test": 0}
    assert stats["split_rule"] == {"column": "part", "without_context": without}
    # Beside another column that contexts are made of.
    prepare(files, tmp_path / "out", min_context=0, vocab_size=270, context_text="{user} sees {item}")
    data = PreparedData.open(tmp_path / "out")
    assert (data.split.tolist(), data.timestamp[3]) == (wanted, 3)
    # The rows of times 0 to 2 become context: one each of train, of none and of val.
    stats = prepare(files, tmp_path / "out", min_context=3, vocab_size=270)
    assert PreparedData.open(tmp_path / "out").split.tolist() == [CONTEXT] * 3 + wanted[3:]
    assert stats["split_rule"]["without_context"] == {"train": 1, "val": 1, "test": 0}
    assert stats["splits"]["train_after_test"] == 0


def test_a_split_as_a_category_of_parquet(tmp_path: Path) -> None:
    files = own_log(tmp_path, list(range(10)), PUBLISHED)
    frame = pl.read_csv(files.interactions).with_columns(pl.col("part").cast(pl.Categorical))
    frame.write_parquet(tmp_path / "log.parquet")
    files = CustomFiles(
        tmp_path / "log.parquet",
        files.items,
        "{title}",
        label="liked",
        split_column="part",
        max_rejected=1,
    )
    prepare(files, tmp_path / "out", min_context=0, vocab_size=270)
    codes = [TRAIN, CONTEXT, VAL, TEST, VAL, TEST, VAL, VAL, TRAIN]
    assert PreparedData.open(tmp_path / "out").split.tolist() == codes


def test_columns_that_divide_nothing(tmp_path: Path) -> None:
    times = list(range(10))
    files = own_log(tmp_path, times, PUBLISHED, split_column="part")
    for settings in ({"split": "user"}, {"val_from": 1, "test_from": 2}):
        with pytest.raises(ValueError, match=r" and split_column each divide the targets: keep one"):
            prepare(files, tmp_path / "out", **settings)
    with pytest.raises(
        DataError,
        match=r"log\.csv: no target is test by column part \(min_context = 7 took 2 test away\)\. It must name all three of train, val, "
        r"test; min_context = 0 \(--min-context 0\) keeps all",
    ):
        prepare(files, tmp_path / "out", min_context=7)
    only_train = own_log(tmp_path, times, ["train"] * 10, split_column="part")
    with pytest.raises(DataError, match=r"no target is val or test by column part\. It must"):
        prepare(only_train, tmp_path / "out")
    with pytest.raises(DataError, match=r"log\.csv: there is no column fold; there are user, item, "):
        prepare(own_log(tmp_path, times, split_column="fold"), tmp_path / "out")
    with pytest.raises(
        DataError, match="context_text names part, the column of splits, which no request knows"
    ):
        prepare(files, tmp_path / "out", context_text="{part}")
    with pytest.raises(ValueError, match="split_column must be a column of its own, but item has another"):
        own_log(tmp_path, times, split_column="item")


@pytest.mark.parametrize("split", ["global", "user"])
def test_what_is_known_of_time(tmp_path: Path, split: str) -> None:
    """Counted in plain Python: rows that share a time stamp with another of their user, and training targets after the first test one."""
    raw = write_1m(tmp_path / "raw", ratings := some_ratings(num_users=30))
    stats = prepare("ml-1m", tmp_path / "out", raw, subset=True, vocab_size=270, split=split, min_context=1)
    moments = [(user, time) for user, _, _, time in ratings]
    assert stats["sharing_time"] == sum(moments.count(moment) > 1 for moment in moments) > 100
    data = PreparedData.open(tmp_path / "out")
    first_test = data.timestamp[data.targets("test")].min()
    late = int(np.sum(data.timestamp[data.targets("train")] > first_test))
    assert stats["splits"]["train_after_test"] == late
    assert (late > 100) == (split == "user")


ONE_CLASS = {
    1: r"of 16 interactions none is a click \(rating > 4\), .* Ways out: choose another threshold \(--threshold\); check",
    5: r"of 16 interactions each one is a click \(rating > 4\), .* Ways out: choose another threshold .*; add what was shown",
}


@pytest.mark.parametrize("rating", ONE_CLASS)
def test_a_log_of_one_class_is_refused(tmp_path: Path, rating: int) -> None:
    ratings = [(user, item, rating, 5) for user in (1, 2) for item in (1, 2, 3, 9, 10, 11, 100, 101)]
    files = {"ml-1m": write_1m(tmp_path / "raw", ratings)}
    with pytest.raises(DataError, match=rf"ratings\.dat: {ONE_CLASS[rating].replace('> 4', '> 3')}"):
        prepare("ml-1m", tmp_path / "out", files["ml-1m"], subset=True)
    write_amazon(tmp_path / "amazon", ratings)
    with pytest.raises(DataError, match=rf"CDs_and_Vinyl_5\.json\.gz: {ONE_CLASS[rating]}"):
        prepare("amazon-cds", tmp_path / "out", tmp_path / "amazon", min_item_count=1)
    assert not (tmp_path / "out").exists()


def test_an_own_log_of_clicks_is_refused(tmp_path: Path) -> None:
    """Other than with a rating, a threshold is no way out."""
    log = "user,item,timestamp,liked\n1,a,1,1\n1,b,2,1\n2,a,3,1\n"
    with pytest.raises(
        DataError,
        match=r"log\.csv: of 3 interactions each one is a click \(liked = 1\), .* Ways out: add what was shown and not clicked .*; where "
        "that was not logged, add items drawn at random",
    ):
        prepare(small_log(tmp_path, log, CATALOGUE), tmp_path / "out")
