"""Raw files in forms that nobody promised: read as they are meant, or refused with what to do."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dti_model.data import AmazonFiles, CustomFiles, DataError
from dti_model.data.sources import rows
from dti_model.data.sources.custom import parsed_times
from dti_model.data.sources.movielens import MovieLens, load_100k
from dti_model.data.sources.source import RawData
from tests.data.log_files import (
    CATALOGUE,
    LOG,
    small_log,
    write_amazon,
    write_amazon_2023,
    write_custom,
)
from tests.data.movielens_files import some_ratings, write_1m, write_100k, write_recbole

RATINGS = some_ratings(num_users=4)


def _movielens(name: str, folder: Path) -> RawData:
    """With the users' file."""
    return MovieLens(name, folder, subset=True, profile=True).load()


SOURCES: dict[str, tuple[Callable[[Path], object], Callable[[Path], RawData]]] = {
    "ml-100k": (lambda folder: write_100k(folder, RATINGS), lambda folder: _movielens("ml-100k", folder)),
    "ml-1m": (lambda folder: write_1m(folder, RATINGS), lambda folder: _movielens("ml-1m", folder)),
    "recbole": (lambda folder: write_recbole(folder, RATINGS), lambda folder: _movielens("ml-100k", folder)),
    "amazon": (
        lambda folder: write_amazon(folder, RATINGS, zipped=False),
        lambda folder: AmazonFiles(
            folder / "CDs_and_Vinyl_5.json.gz", folder / "meta_CDs_and_Vinyl.json.gz"
        ).load(),
    ),
    "amazon 2023": (
        lambda folder: write_amazon_2023(folder, RATINGS, zipped=False),
        lambda folder: AmazonFiles(
            folder / "CDs_and_Vinyl.jsonl", folder / "meta_CDs_and_Vinyl.jsonl"
        ).load(),
    ),
    "custom": (
        lambda folder: write_custom(folder, ratings=RATINGS),
        lambda folder: CustomFiles(
            folder / "clicks.csv", folder / "items.csv", "{title}", label="liked"
        ).load(),
    ),
}


@pytest.fixture(params=SOURCES)
def source(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Callable[[Path], RawData]]:
    """A folder with the files of a source, and its loader."""
    write, load = SOURCES[request.param]
    write(tmp_path)
    return tmp_path, load


def changed(folder: Path, change: Callable[[bytes], bytes]) -> Iterator[Path]:
    """Every file by turns, changed and then as it was."""
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        path.write_bytes(change(content))
        yield path
        path.write_bytes(content)


def test_a_byte_order_mark_is_no_data(source: tuple[Path, Callable[[Path], RawData]]) -> None:
    """Amazon's first row was rejected, and MovieLens' first movie lost its title without a word."""
    folder, load = source
    whole = load(folder)
    for path in changed(folder, lambda content: b"\xef\xbb\xbf" + content):
        found = load(folder)
        assert found.rows().equals(whole.rows()), path
        assert found.items.equals(whole.items), path
        assert found.num_rejected == (0, 0)


FORMS = {
    "UTF-16": (lambda content: content.decode("latin-1").encode("utf-16"), "not UTF-8 but UTF-16"),
    "UTF-16 without a mark": (lambda content: content.decode("latin-1").encode("utf-16-le"), "not UTF-8 but UTF-16"),
    "UTF-32": (lambda content: content.decode("latin-1").encode("utf-32-be"), "not UTF-8 but UTF-16, UTF-32"),
    "carriage returns": (lambda content: content.replace(b"\n", b"\r"), "end with a carriage return alone. Save"),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_other_encodings_and_line_ends_are_named(
    source: tuple[Path, Callable[[Path], RawData]], form: str
) -> None:
    """Messages were about missing columns, malformed JSON or a file that is cut short."""
    folder, load = source
    change, message = FORMS[form]
    for path in changed(folder, change):
        with pytest.raises(DataError, match=rf"{path.name}:1: .*{message}"):
            load(folder)


def test_the_ids_of_movies_are_numbers(tmp_path: Path) -> None:
    """One with a NUL was another movie, so that the real one had no title."""
    write_100k(tmp_path, RATINGS)
    path = tmp_path / "u.item"
    content = path.read_bytes()
    path.write_bytes(b"00" + content)
    assert load_100k(tmp_path).items["item"][0] == content.split(b"|")[0].decode()
    path.write_bytes(b"\0" + content)
    with pytest.raises(DataError, match=r"u\.item:1: (not UTF-8|item must be an integer)"):
        load_100k(tmp_path)
    path.write_bytes(content.replace(b"\n", b"\nx", 1))
    with pytest.raises(DataError, match=r"u\.item:2: item must be an integer of at least 1"):
        load_100k(tmp_path)


@pytest.mark.parametrize("quote", ["", '"'])
def test_the_longest_value_is_the_same_in_both_files(tmp_path: Path, quote: str) -> None:
    """An item's was rejected as "field larger than field limit", an interaction's was read."""
    most = csv.field_size_limit()
    fits, longer = (f"{quote}{'x' * length}{quote}" for length in (most - 20, most + 1))
    found = small_log(
        tmp_path, f"{LOG}{fits},a,4,1\n{longer},a,5,1\n", f"{CATALOGUE}c,{fits}\nd,{longer}\n"
    ).load()
    assert found.num_rejected == (1, 1)
    for rejected, line in zip(found.rejected, (6, 5)):
        assert rejected.first()[0].endswith(
            f":{line}: a value of more than 131,072 characters, or a quoted value that does not end"
        )


def test_carriage_returns_and_blank_headers_are_named(tmp_path: Path) -> None:
    found = small_log(tmp_path, LOG + '"3",a\rb,1,1\n').load()
    assert found.rejected[0].first() == ["log.csv:5: a carriage return in a value without quotes"]
    for blank in ("\n", "  \r\n"):
        with pytest.raises(
            DataError, match=r"log\.csv:1: the first line must name the columns, but is blank"
        ):
            small_log(tmp_path, blank + LOG).load()


def test_a_row_over_lines_may_go_on_in_the_next_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bad row ends at its first line, wherever a batch ends, and the line numbers stay."""
    catalogue = 'item,title\n\na,"A\n\n1"\nb,"B""\n2",3\nx,"never\nb,"B"\nc,"C\n'
    for batch_bytes in range(1, 40):
        monkeypatch.setattr(rows, "BATCH_BYTES", batch_bytes)
        found = small_log(tmp_path, LOG, catalogue).load()
        assert dict(found.items.select("item", "text").iter_rows()) == {"a": "A 1", "b": "B"}
        assert found.rejected[1].frame()["line"].to_list() == [6, 8, 10]
        assert found.num_listed == 5


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("2020-01-01T12:00:00+05:30", -19_800),
        ("2020-01-01T12:00:00+0530", -19_800),
        ("2020-01-01 12:00:00+05", -18_000),
        ("2020-01-01 12:00:00 -03:30", 12_600),
        ("2020-01-01 12:00+05", -18_000),
        ("2020-01-01t12:00:00z", 0),
        ("2020-01-01 12:00:00 UTC", 0),
        ("2020-01-01T12:00:00.0 GMT", 0),
        ("2020-01-01T12:00:00 +05:30", -19_800),
    ],
)
def test_zones_as_databases_write_them(text: str, seconds: int) -> None:
    """Hours alone, a blank before the zone, and small letters were no times."""
    noon = 1_577_880_000
    times, unit = parsed_times(pl.Series([text]), None)
    assert (times.to_list(), unit) == ([(noon + seconds) * 1_000_000], "microseconds")


def test_rows_without_a_time_do_not_decide_what_times_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the first batch had none, times had to be integers in the whole file."""
    monkeypatch.setattr(rows, "BATCH_BYTES", 60)
    log = "user,item,timestamp,liked\n" + "1,a,soon,1\n" * 10 + "1,a,2020-01-01,1\n1,a,2020-01-02,1\n" * 5
    found = small_log(tmp_path, log).load()
    assert found.interactions.height == 10
    assert found.timestamp_unit == "microseconds"
    assert found.rejected[0].first()[0] == (
        "log.csv:2: timestamp must be an integer, a number or an ISO date-time, but is soon"
    )


FAR = {
    "milliseconds": pa.array([2**60, 5, -(2**60)]).cast(pa.timestamp("ms")),
    "a zone": pa.array([2**62, 5, -(2**62)]).cast(pa.timestamp("us", "+05:30")),
    "days": pa.array([2**31 - 1, 5, -(2**31)], pa.int32()).cast(pa.date32()),
}


@pytest.mark.parametrize("kind", FAR)
def test_times_beyond_the_year_9999_are_rejected(tmp_path: Path, kind: str) -> None:
    """Polars panicked where it showed one, and multiplied others beyond 64 bits into wrong times."""
    pq.write_table(
        pa.table({"user": [1, 1, 2], "item": ["a", "b", "a"], "timestamp": FAR[kind], "liked": [1, 0, 1]}),
        tmp_path / "log.parquet",
    )
    pq.write_table(
        pa.table({"item": ["a", "b"], "title": [[FAR[kind][0]], [FAR[kind][1], FAR[kind][2]]]}),
        tmp_path / "items.parquet",
    )
    found = CustomFiles(
        tmp_path / "log.parquet", tmp_path / "items.parquet", "{title}", label="liked", max_rejected=1
    ).load()
    assert found.num_rejected[0] == 2
    assert (
        found.rejected[0]
        .first()[0]
        .endswith("row 1: timestamp must be an ISO date-time, but is empty, or not of the years 1 to 9999")
    )
    assert found.items["titled"].to_list() == [True]


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_what_is_no_file_is_refused(tmp_path: Path, make: Callable[[Path], object]) -> None:
    """A named pipe in the place of Amazon's reviews waited for ever."""
    make(tmp_path / "reviews.json")
    with pytest.raises(DataError, match=r"reviews\.json: not a file$"):
        AmazonFiles(tmp_path / "reviews.json", tmp_path / "meta.json").load()
    with pytest.raises(DataError, match=r"meta\.json: no such file$"):
        list(rows.read_lines(tmp_path / "meta.json"))
    with pytest.raises(DataError, match=r"x: cannot be read \(File name too long\)$"):
        list(rows.read_lines(tmp_path / ("x" * 300)))
