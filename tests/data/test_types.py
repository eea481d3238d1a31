"""Columns of Parquet files in every type that stands for text, numbers or times; and settings beyond all bounds."""

from __future__ import annotations

import datetime
import math
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dti_model.cli import main
from dti_model.data import AmazonFiles, CustomFiles, DataError, PreparedData, prepare
from dti_model.data.sources.source import RawData
from tests.data.log_files import write_amazon
from tests.data.movielens_files import some_ratings, write_1m

NOON = [datetime.datetime(2020, 1, 1, 12, 0, second) for second in range(4)]
NOON_US = [1_577_880_000_000_000 + second * 1_000_000 for second in range(4)]
COLUMNS = {
    "user": pa.array(["1", "1", "2", "2"]),
    "item": pa.array(["1", "2", "3", "1"]),
    "timestamp": pa.array([1, 2, 3, 4]),
    "liked": pa.array([1, 0, 1, 0]),
}
ITEMS = {
    "item": pa.array(["1", "2", "3"]),
    "title": pa.array(["A", "B", "C"]),
    "genres": pa.array([["x"], None, ["y", "z"]]),
}


def write(table: pa.Table, path: Path, **options: Any) -> None:
    try:
        pq.write_table(table, path, **options)
    except pa.ArrowNotImplementedError as error:
        if tuple(map(int, pa.__version__.split(".")[:2])) >= (20, 0):
            raise
        pytest.skip(f"pyarrow {pa.__version__} cannot write such a file ({error})")


def loaded(
    tmp_path: Path,
    interactions: dict[str, Any] | pl.DataFrame,
    items: dict[str, Any] = ITEMS,
    **settings: Any,
) -> RawData:
    if isinstance(interactions, pl.DataFrame):
        interactions.write_parquet(tmp_path / "clicks.parquet")
    else:
        # Small row groups: every one has a dictionary of its own.
        write(pa.table(interactions), tmp_path / "clicks.parquet", row_group_size=2)
    write(pa.table(items), tmp_path / "items.parquet")
    settings = {"label": "liked", **settings}
    files = CustomFiles(
        tmp_path / "clicks.parquet",
        tmp_path / "items.parquet",
        "{title}; {genres}",
        max_rejected=1,
        **settings,
    )
    return files.load()


def dictionary(values: list[Any], kind: pa.DataType, index: pa.DataType | None = None) -> pa.Array:
    array = pa.array(values, kind).dictionary_encode()
    return array.cast(pa.dictionary(index or pa.int8(), kind))


YES_NO = ["yes", "no", "yes", None]
LABELS = {
    "a category of words": dictionary(YES_NO, pa.string()),
    "a category of large strings": dictionary(YES_NO, pa.large_string(), pa.uint32()),
    "a category of integers": dictionary([1, 0, 1, None], pa.int64()),
    "a category of numbers": dictionary([1.0, 0.0, 1.0, None], pa.float32()),
    "a category of booleans": dictionary([True, False, True, None], pa.bool_()),
    "large strings": pa.array(YES_NO, pa.large_string()),
    "string views": pa.array(YES_NO, pa.string_view()),
    "booleans": pa.array([True, False, True, None]),
    "decimals": pa.array([Decimal("1.00"), Decimal(0), Decimal(1), None], pa.decimal128(5, 2)),
    "wide decimals": pa.array([Decimal("1.00"), Decimal(0), Decimal(1), None], pa.decimal256(50, 2)),
    "halves": pa.array([np.float16(1), np.float16(0), np.float16(1), None], pa.float16()),
    "unsigned": pa.array([1, 0, 1, 2**64 - 1], pa.uint64()),
    "lists of one": pa.array([["yes"], ["no"], ["1"], []]),
}


@pytest.mark.parametrize("kind", LABELS)
def test_labels_of_every_type(tmp_path: Path, kind: str) -> None:
    """A category (pandas, Polars' Categorical and Enum) was once a traceback."""
    raw = loaded(tmp_path, {**COLUMNS, "liked": LABELS[kind]})
    assert raw.rows()["rating"].to_list() == [1, 0, 1]
    assert raw.num_rejected == (1, 0)


@pytest.mark.parametrize("dtype", [pl.Categorical, pl.Enum(["yes", "no"])], ids=["Categorical", "Enum"])
def test_categories_of_polars(tmp_path: Path, dtype: Any) -> None:
    frame = pl.DataFrame({name: array.to_pylist() for name, array in COLUMNS.items()})
    frame = frame.with_columns(pl.Series("liked", YES_NO, dtype=dtype))
    frame = frame.with_columns(pl.col("user", "item").cast(pl.Categorical))
    raw = loaded(tmp_path, frame)
    assert raw.rows()["rating"].to_list() == [1, 0, 1]
    assert raw.rows()["user"].to_list() == ["1", "1", "2"]


IDS = {
    "a category": (dictionary(["1", "1", " 2", ""], pa.string()), ["1", "1", "2"]),
    "a category of integers": (dictionary([1, 1, 2, None], pa.int16()), ["1", "1", "2"]),
    "decimals": (pa.array([Decimal(100), Decimal(20), Decimal(10**37), None], pa.decimal128(38, 0)), ["100", "20", str(10**37)]),
    "decimals with places": (pa.array([Decimal("100.00"), Decimal("1.50"), Decimal("-2"), None], pa.decimal128(9, 2)), ["100", "1.5", "-2"]),
    "unsigned": (pa.array([2**64 - 1, 0, 1, None], pa.uint64()), [str(2**64 - 1), "0", "1"]),
    "lists of categories": (
        pa.ListArray.from_arrays([0, 1, 2, 4, 4], pa.array(["a", "b", "c", "d"]).dictionary_encode()),
        ["a", "b", "c, d"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", IDS)
def test_ids_of_every_type(tmp_path: Path, kind: str) -> None:
    array, wanted = IDS[kind]
    raw = loaded(tmp_path, {**COLUMNS, "user": array})
    assert raw.rows()["user"].to_list() == wanted
    assert raw.num_rejected == (1, 0)


TIMES = {
    "a category of integers": (dictionary([5, 6, 5, 7], pa.int64()), [5, 6, 5, 7]),
    "a category of dates": (dictionary([f"2020-01-01T12:00:0{s}Z" for s in range(4)], pa.string()), NOON_US),
    "a category of times": (dictionary(NOON, pa.timestamp("ns")), NOON_US),
    "decimals": (pa.array([Decimal("1.5"), Decimal(2), Decimal(3), Decimal(4)], pa.decimal128(20, 6)), [1_500_000, 2_000_000, 3_000_000, 4_000_000]),
    "seconds": (pa.array(NOON, pa.timestamp("s")), NOON_US),
    "a zone": (pa.array(NOON, pa.timestamp("us", "Europe/Berlin")), NOON_US),
    "an offset": (pa.array(NOON, pa.timestamp("us", "+05:30")), NOON_US),
    "a zone of nowhere": (pa.array(NOON, pa.timestamp("us", "Nowhere/Land")), NOON_US),
    "days": (pa.array([time.date() for time in NOON]), [1_577_836_800_000_000] * 4),
    "days in milliseconds": (pa.array([time.date() for time in NOON], pa.date64()), [1_577_836_800_000_000] * 4),
}  # fmt: skip


@pytest.mark.parametrize("kind", TIMES)
def test_times_of_every_type(tmp_path: Path, kind: str) -> None:
    """Arrow stores the moment in UTC, whatever the zone; a zone that Polars does not know was an error."""
    array, wanted = TIMES[kind]
    assert loaded(tmp_path, {**COLUMNS, "timestamp": array}).rows()["timestamp"].to_list() == wanted


@pytest.mark.parametrize("column", COLUMNS)
def test_a_column_of_nulls_is_a_column_of_empty_values(tmp_path: Path, column: str) -> None:
    raw = loaded(tmp_path, {**COLUMNS, column: pa.nulls(4)})
    assert raw.num_rejected == (4, 0)
    assert column in raw.rejected[0].first()[0]


TEXTS = {
    "categories": (dictionary(["x", None, "y"], pa.string()), ["A; x", "B", "C; y"]),
    "lists of categories": (
        pa.ListArray.from_arrays(pa.array([0, None, 1, 3]), pa.array(["x", "y", "z"]).dictionary_encode()),
        ["A; x", "B", "C; y, z"],
    ),
    "lists of string views": (pa.array([["x"], None, ["y"]], pa.list_(pa.string_view())), ["A; x", "B", "C; y"]),
    "nulls": (pa.nulls(3), ["A", "B", "C"]),
    "lists of nulls": (pa.array([[None], [], None], pa.list_(pa.null())), ["A", "B", "C"]),
    "decimals": (pa.array([Decimal("10.50"), Decimal("10.00"), Decimal("-0.5")], pa.decimal128(9, 2)), ["A; 10.5", "B; 10", "C; -0.5"]),
    "lists of times": (pa.array([[NOON[0]], [], None], pa.list_(pa.timestamp("us", "+05:30"))), ["A; 2020-01-01 12:00:00.000000+00:00", "B", "C"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", TEXTS)
def test_texts_of_every_type(tmp_path: Path, kind: str) -> None:
    array, wanted = TEXTS[kind]
    assert loaded(tmp_path, COLUMNS, {**ITEMS, "genres": array}).items["text"].to_list() == wanted


NOT_PLAIN = {
    "binary": pa.array([b"1", b"0", b"1", b"0"]),
    "a category of binary": dictionary([b"1", b"0", b"1", b"0"], pa.binary()),
    "a struct": pa.array([{"a": 1}] * 4),
    "lists of lists": pa.array([[[1]]] * 4),
    "a time of day": pa.array([1, 2, 3, 4], pa.time32("s")),
    "a duration": pa.array([1, 2, 3, 4], pa.duration("s")),
    "lists of decimals": pa.array([[Decimal(1)]] * 4, pa.list_(pa.decimal128(3, 0))),
}


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("kind", NOT_PLAIN)
def test_types_without_a_plain_text_are_named(tmp_path: Path, kind: str, column: str) -> None:
    message = rf"clicks\.parquet: column {column} has the type .*, which has no plain text: make it text, a number or a time$"
    with pytest.raises(DataError, match=message):
        loaded(tmp_path, {**COLUMNS, column: NOT_PLAIN[kind]})


def test_a_category_file_gives_what_a_text_file_gives(tmp_path: Path) -> None:
    """The whole way, to labels, order and texts."""
    rng = np.random.default_rng(0)
    plain = {
        "user": [f"u{i}" for i in rng.integers(0, 5, 80)],
        "item": [str(i) for i in rng.integers(1, 4, 80)],
        "timestamp": rng.integers(0, 20, 80).tolist(),
        "liked": rng.choice(["yes", "no"], 80).tolist(),
    }
    columns = {name: pa.array(values) for name, values in plain.items()}
    coded = {name: array.dictionary_encode() for name, array in columns.items()}
    found = []
    for name, table in (("plain", columns), ("coded", coded)):
        (tmp_path / name).mkdir()
        pq.write_table(pa.table(table), tmp_path / name / "clicks.parquet")
        pq.write_table(pa.table(ITEMS), tmp_path / name / "items.parquet")
        files = CustomFiles(
            tmp_path / name / "clicks.parquet", tmp_path / name / "items.parquet", "{title}", label="liked"
        )
        prepare(files, tmp_path / name / "out", min_context=0, vocab_size=270)
        found.append(PreparedData.open(tmp_path / name / "out").fingerprint)
    assert found[0] == found[1]


# -- settings beyond all bounds -------------------------------------------------------------------------------------------

ABSURD = [
    ("--vocab-size", "1" + "0" * 23, "--vocab-size must be at least 260 .* and at most 1,048,576, but is 1"),
    ("--vocab-size", "1000000000", "--vocab-size must be at least 260 .* and at most 1,048,576"),
    ("--vocab-size", "-1", "--vocab-size must be at least 260 .*, but is -1"),
    ("--min-context", "1" + "0" * 23, "--min-context must be at least 0 and at most 2,147,483,647, but is 1"),
    ("--min-context", "-1", "--min-context must be at least 0 and at most"),
    ("--min-item-count", "1" + "0" * 23, "--min-item-count must be at least 1 and at most 2,147,483,647"),
    ("--min-item-count", "0", "--min-item-count must be at least 1 and at most"),
    ("--threshold", "nan", "threshold must be at least 1 and below 5, .*, but is nan"),
    ("--threshold", "inf", "threshold must be at least 1 and below 5, .*, but is inf"),
    ("--threshold", "-inf", "threshold must be at least 1 and below 5"),
    ("--threshold", "1" + "0" * 23, "threshold must be at least 1 and below 5, .*, but is 1e\\+23"),
    ("--threshold", "-3", "threshold must be at least 1 and below 5"),
    ("--threshold", "5", "threshold must be at least 1 and below 5"),
]


@pytest.mark.parametrize(("option", "value", "message"), ABSURD)
@pytest.mark.parametrize("source", ["ml-1m", "amazon"])
def test_absurd_settings_are_one_line_with_name_and_bound(
    tmp_path: Path, capsys: pytest.CaptureFixture, option: str, value: str, message: str, source: str
) -> None:
    """10**23 was an OverflowError, and with NaN no rating was above the threshold: a data set without a click."""
    if source == "ml-1m":
        given = ["--raw-dir", str(write_1m(tmp_path / "raw", some_ratings())), "--subset"]
    else:
        reviews, meta = write_amazon(tmp_path / "raw", some_ratings())
        given = ["--reviews", str(reviews), "--meta", str(meta)]
    command = ["prepare", source, *given, "--out", str(tmp_path / "out"), f"{option}={value}"]
    assert main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert pl.select(pl.lit(line).str.contains(message)).item(), line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw"]


@pytest.mark.parametrize("threshold", [math.nan, math.inf, -math.inf, 1e23, -1e23])
def test_absurd_thresholds_of_a_custom_log(tmp_path: Path, threshold: float) -> None:
    with pytest.raises(ValueError, match=r"threshold must be a number from -1e\+09 to 1e\+09, but is"):
        loaded(tmp_path, COLUMNS, label=None, rating="liked", threshold=threshold)


def test_a_threshold_of_numpy_compares_like_a_number(tmp_path: Path) -> None:
    """A rating of 3.7 is a 32-bit float, a little above the 64-bit 3.7 of NumPy: it was a click with that threshold."""
    reviews, meta = write_amazon(tmp_path, [(1, 1, 3, 5), (1, 2, 5, 6)], zipped=False)
    reviews.write_text(reviews.read_text().replace('"overall": 3.0', '"overall": 3.7'))
    for threshold in (3.7, np.float64(3.7)):
        prepare(
            AmazonFiles(reviews, meta), tmp_path / "out", threshold=threshold, min_context=0, min_item_count=1
        )
        assert PreparedData.open(tmp_path / "out").label.tolist() == [0, 1]
