"""Amazon and custom files to prepared folders: texts, labels, times, rejected rows, and every way it can go wrong."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from dti_model.data import AmazonFiles, CustomFiles, DataError, PreparedData, prepare
from dti_model.data.sources import rows
from dti_model.data.sources.csv_parquet import open_table
from dti_model.data.sources.custom import parsed_times
from dti_model.data.texts import Template, clean_text, shorten, template_text
from tests.data.log_files import (
    CUSTOM_COLUMNS,
    custom_rows,
    item_rows,
    write_amazon,
    write_csv,
    write_custom,
)
from tests.data.movielens_files import some_ratings, write_1m

TEXT = "{title} ({year}); {genres}"
TEXTS = [
    'Toy "Story", & more (1995); Animation, Comedy',
    "Misérables, Les (1995); Drama",
    "Unknown title; Drama",
    "Land (1995) (V); Children's",
    "Two Friends (1986); Drama, War",
    "Fish & Chips (1990); Comedy",
    "Good Morning (1971); unknown",
    "Casino (1995); Crime, Drama",
]


def custom(tmp_path: Path, ending: str = ".csv", **settings: Any) -> CustomFiles:
    return CustomFiles(*write_custom(tmp_path, ending), **{"text": TEXT, "label": "liked", **settings})


@pytest.mark.parametrize("zipped", [True, False])
def test_amazon(tmp_path: Path, zipped: bool) -> None:
    ratings = [row for row in some_ratings() if row[1] < 100]
    files = AmazonFiles(*write_amazon(tmp_path / "raw", ratings, zipped=zipped))
    stats = prepare(files, tmp_path / "out")
    data = PreparedData.open(tmp_path / "out")
    assert data.item_ids == ["1", "2", "3", "9", "10", "11"]
    long_title = data.item_texts[3].split(";")[0]
    assert 190 < len(long_title) <= 200
    assert data.item_texts == [
        "Rainforest Café Gift Card; Gift Cards, Food & Drink; Rain & Co",
        "Emma; Gift Cards, Food & Drink; Jane Austen",
        "Unknown title; Gift Cards, Food & Drink",
        f"{long_title}; Gift Cards, Food & Drink; by Someone",
        "Unknown title; Gift Cards, Food & Drink",
        "Unknown title",
    ]
    assert data.label.tolist() == [
        int(r > 4) for _, _, r, _ in sorted(ratings, key=lambda r: (r[0], r[3], r[1]))
    ]
    assert (stats["missing_titles"], stats["texts_cut"], stats["items_repeated"]) == (3, 1, 1)
    assert (stats["threshold"], stats["min_item_count"], stats["click"]) == (4, 5, "rating > 4")
    assert stats["rows_in_files"] == {"interactions": 72, "items": 8}


def test_amazon_category_in_a_folder(tmp_path: Path) -> None:
    write_amazon(tmp_path, some_ratings())
    assert prepare("amazon-cds", tmp_path / "out", tmp_path)["source"]["name"] == "amazon-cds"
    with pytest.raises(
        DataError, match=r"no amazon-kindles files here.*Kindle_Store_5\.json\.gz and meta_Kindle"
    ):
        prepare("amazon-kindles", tmp_path / "out2", tmp_path)
    with pytest.raises(DataError, match=r"amazon-cds is not fetched by itself.*https://.*--raw-dir"):
        prepare("amazon-cds", tmp_path / "out2")


BAD_REVIEWS = {
    b"{": "truncated",
    b"null": "got `null`",
    b"[1]": "got `array`",
    b'{"reviewerID":"a","asin":"b","overall":5.0}': "missing required field `unixReviewTime`",
    b'{"reviewerID":"","asin":"b","overall":5.0,"unixReviewTime":3}': "length >= 1",
    b'{"reviewerID":"a","asin":"b","overall":6,"unixReviewTime":3}': "<= 5.0",
    b'{"reviewerID":"a","asin":"b","overall":"5","unixReviewTime":3}': "got `str` - at `$.overall`",
    b'{"reviewerID":"a","asin":"b","overall":5,"unixReviewTime":-3}': ">= 0",
    b'{"reviewerID":"\\ud800","asin":"b","overall":5,"unixReviewTime":3}': "surrogate",
    b'{"reviewerID":"\xff","asin":"b","overall":5,"unixReviewTime":3}': "utf-8",
}


def test_bad_reviews_are_listed_with_their_lines(tmp_path: Path) -> None:
    reviews, meta = write_amazon(tmp_path, some_ratings(), zipped=False)
    lines = reviews.read_bytes().split(b"\n")[:-1]
    for place, bad in enumerate(BAD_REVIEWS):
        lines.insert(3 + 2 * place, bad)
    lines.insert(10, b"")  # a blank line is no row, but counts as a line
    reviews.write_bytes(b"\n".join(lines))  # and the last line needs no end
    numbers = [number for number, line in enumerate(lines, 1) if line in BAD_REVIEWS]
    with pytest.raises(
        DataError,
        match=r"10 of 106 rows \(9\.43%\).*--max-rejected\)\. The first: CDs\S+:4: .*truncated; CDs",
    ):
        prepare(AmazonFiles(reviews, meta), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    stats = prepare(AmazonFiles(reviews, meta, max_rejected=0.1), tmp_path / "out")
    listed = pl.read_csv(tmp_path / "out" / "rejected.csv")
    assert listed["line"].to_list() == numbers
    assert set(listed["file"]) == {reviews.name}
    for problem, wanted in zip(listed["problem"], BAD_REVIEWS.values()):
        assert wanted in problem
    assert stats["rejected"]["interactions"] == 10
    assert len(stats["rejected"]["first"]) == 5


def test_duplicates_are_kept_in_time_order_and_counted(tmp_path: Path) -> None:
    """Two pairs occur more than once, with three interactions after the first ones; before pruning."""
    ratings = [
        (1, 1, 5, 7),
        (1, 1, 2, 9),
        (1, 1, 3, 8),
        (1, 2, 4, 1),
        (2, 9, 3, 9),
        (2, 9, 1, 9),
        (2, 1, 1, 1),
    ]
    stats = prepare(
        AmazonFiles(*write_amazon(tmp_path, ratings)), tmp_path / "out", min_item_count=3, min_context=0
    )
    data = PreparedData.open(tmp_path / "out")
    assert (stats["duplicate_pairs"], stats["duplicate_interactions"], stats["interactions_pruned"]) == (
        2,
        3,
        3,
    )
    assert data.rating.tolist() == [5, 3, 2, 1]


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".parquet"])
@pytest.mark.parametrize("click", [{"label": "liked"}, {"label": None, "rating": "stars", "threshold": 3}])
def test_custom_files_equal_movielens(tmp_path: Path, ending: str, click: dict[str, Any]) -> None:
    """The same ratings as in MovieLens-1M's format give the same rows."""
    stats = prepare(custom(tmp_path, ending, **click), tmp_path / "out")
    prepare("ml-1m", tmp_path / "ml", write_1m(tmp_path / "raw", some_ratings()), subset=True)
    ours, theirs = PreparedData.open(tmp_path / "out"), PreparedData.open(tmp_path / "ml")
    for name in ("item", "label", "timestamp", "split", "order", "history_offsets"):
        assert np.array_equal(getattr(ours, name), getattr(theirs, name)), name
    assert ours.item_ids == theirs.item_ids
    assert ours.item_texts == TEXTS
    assert stats["missing_titles"] == 1
    assert stats["click"] == ("liked = 1" if click["label"] else "stars > 3")


def test_column_names(tmp_path: Path) -> None:
    names = {"user": "member", "item": "sku", "timestamp": "when", "liked": "bought"}
    content = [{names.get(k, k): v for k, v in row.items()} for row in custom_rows()]
    files = custom(tmp_path, user="member", item="sku", timestamp="when", label="bought", items_key="item")
    write_csv(tmp_path / "clicks.csv", tuple(names.get(c, c) for c in CUSTOM_COLUMNS), content)
    prepare(files, tmp_path / "out")
    assert PreparedData.open(tmp_path / "out").item_texts == TEXTS
    with pytest.raises(
        DataError, match=r"items\.csv: there is no column sku; there are item, title, genres, year"
    ):
        prepare(dataclasses.replace(files, items_key=None), tmp_path / "out2")
    with pytest.raises(DataError, match=r"clicks\.csv: there is no column item, timestamp; there are member"):
        prepare(dataclasses.replace(files, item="item", timestamp="timestamp"), tmp_path / "out2")


TIMES = {
    "integers": (["3", " 1", "-2", "soon"], [3, 1, -2, None]),
    "numbers": (["1.5", "2", "1e3", "nan"], [1_500_000, 2_000_000, 1_000_000_000, None]),
    "dates": (
        [
            "1970-01-01",
            "1970-01-01 00:00:01.5",
            "1970-01-01T01:00:00+01:00",
            "1970-01-01T00:01Z",
            "70-1-1",
            "",
        ],
        [0, 1_500_000, 0, 60_000_000, None, None],
    ),
}


@pytest.mark.parametrize("kind", TIMES)
def test_times(kind: str) -> None:
    given, wanted = TIMES[kind]
    assert parsed_times(pl.Series(given), None)[0].to_list() == wanted


def test_times_of_parquet_types() -> None:
    """Fractions of a second decide the order, so they are kept; a whole float stays exact."""
    dates = pl.Series(["1970-01-01T00:00:01.25"]).str.to_datetime(time_unit="ns", time_zone="UTC")
    assert parsed_times(dates, None)[0].to_list() == [1_250_000]
    assert parsed_times(dates.dt.date(), None)[0].to_list() == [0]
    assert parsed_times(pl.Series([978300760.25, None]), None)[0].to_list() == [978300760250000, None]
    assert parsed_times(pl.Series([2**64 - 1, 5], dtype=pl.UInt64), None)[0].to_list() == [None, 5]


BAD_ROWS = {
    "1,2,3": "must have 5 values, but has 3",
    "1,2,3,1,5,6": "must have 5 values, but has 6",
    ",2,3,1,5": "user must not be empty",
    "1, ,3,1,5": "item must not be empty",
    "1,2,yesterday,1,5": "timestamp must be an integer, but is yesterday",
    "1,2,3,2,5": "liked must be 0 or 1 (or true, false, yes, no), but is 2",
    '1,2,"3,1,5': "a quoted value does not end",
    '1,"2"x,3,1,5': "expected after",
}


def test_bad_rows_are_listed_with_their_lines(tmp_path: Path) -> None:
    """A quote that does not end spoils its own line only; a quoted good line is read; labels may be words."""
    files = custom(tmp_path)
    lines = files.interactions.read_text().splitlines()
    for place, bad in enumerate(BAD_ROWS):
        lines.insert(3 + 2 * place, bad)
    lines.insert(20, "")
    lines.append('"12","101","99",yes,5')
    lines.append("12,101,99,FALSE,5")
    files.interactions.write_bytes("\r\n".join(lines).encode() + b"\r\n12,\xff,1,1,1\r\n")
    numbers = [number for number, line in enumerate(lines, 1) if line in BAD_ROWS] + [len(lines) + 1]
    stats = prepare(dataclasses.replace(files, max_rejected=0.5), tmp_path / "out")
    listed = pl.read_csv(tmp_path / "out" / "rejected.csv")
    assert listed["line"].to_list() == numbers
    for problem, wanted in zip(listed["problem"], [*BAD_ROWS.values(), "not valid UTF-8"]):
        assert wanted in problem
    assert (stats["interactions"], stats["rejected"]["interactions"]) == (98, 9)
    assert stats["rows_in_files"]["interactions"] == 107
    assert stats["duplicate_interactions"] == 2


def test_bad_items(tmp_path: Path) -> None:
    """After a quote that does not end, reading starts again at the next line, so no item is swallowed."""
    files = custom(tmp_path, max_rejected=0.5)
    lines = files.items.read_text().split("\n")
    lines[1:1] = ['7,"never ends,x,y', "too,few", ",No id,x,1990", "1,Repeated,x,1990"]
    files.items.write_text("\n".join(lines))
    stats = prepare(files, tmp_path / "out")
    assert pl.read_csv(tmp_path / "out" / "rejected.csv")["line"].to_list() == [2, 3, 4]
    assert (stats["rejected"]["items"], stats["items_repeated"], stats["items_listed"]) == (3, 1, 8)
    texts = PreparedData.open(tmp_path / "out").item_texts
    assert texts[1:] == TEXTS[1:]
    assert texts[0] == "Repeated (1990); x"


def test_batches_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines that a batch cuts in two, gzip and plain, line numbers and values alike."""
    amazon = AmazonFiles(*write_amazon(tmp_path / "raw", some_ratings()), max_rejected=0.5)
    own = custom(tmp_path, max_rejected=0.5)
    own.interactions.write_text(own.interactions.read_text() + "bad\n")
    whole = [files.load() for files in (amazon, own)]
    monkeypatch.setattr(rows, "BATCH_BYTES", 100)
    for files, expected in zip((amazon, own), whole):
        found = files.load()
        assert found.rows().equals(expected.rows())
        assert found.items.equals(expected.items)
        assert found.rejected[0].frame().equals(expected.rejected[0].frame())


CONTRADICTIONS = {
    "neither label nor rating": ({"label": None}, "either label .* or rating"),
    "both": ({"rating": "stars", "threshold": 3}, "either label .* or rating"),
    "rating without threshold": ({"label": None, "rating": "stars"}, "threshold goes with rating"),
    "label with threshold": ({"threshold": 3}, "threshold goes with rating"),
    "one column twice": ({"timestamp": "user"}, "four different columns"),
    "more than everything": ({"max_rejected": 2}, "max_rejected must be a share"),
    "no length": ({"max_chars": 0}, "max_chars must be at least 1"),
    "no column": ({"text": "title"}, "names no column"),
    "a brace too few": ({"text": "{title"}, "text template '{title': "),
    "a format": ({"text": "{title:5}"}, "only plain column names"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_contradictions(tmp_path: Path, case: str) -> None:
    settings, message = CONTRADICTIONS[case]
    with pytest.raises(ValueError, match=message):
        custom(tmp_path, **settings)


def test_arguments_that_do_not_apply(tmp_path: Path) -> None:
    files = custom(tmp_path)
    with pytest.raises(
        ValueError, match="names brand, but .*items.csv has the columns item, title, genres, year"
    ):
        prepare(dataclasses.replace(files, text="{title}; {brand}"), tmp_path / "out")
    with pytest.raises(ValueError, match="threshold does not apply"):
        prepare(files, tmp_path / "out", threshold=3)
    with pytest.raises(ValueError, match="subset does not apply"):
        prepare(files, tmp_path / "out", subset=True)
    with pytest.raises(ValueError, match="raw_dir does not apply"):
        prepare(files, tmp_path / "out", tmp_path)


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    files = custom(tmp_path)
    zipped = tmp_path / "cut.csv.gz"
    reviews, _ = write_amazon(tmp_path / "raw", some_ratings())
    zipped.write_bytes(reviews.read_bytes()[:-20])
    (tmp_path / "empty.csv").write_bytes(b"")
    (tmp_path / "twice.csv").write_text("user,item,user\n1,2,3\n")
    (tmp_path / "not.parquet").write_text("PAR1")
    (tmp_path / "other.csv").write_text("item,title,genres,year\n77,x,y,1\n")
    cases = {
        "nowhere.csv": "nowhere.csv: no such file",
        "clicks.xlsx": "must end with one of .csv, .tsv, .parquet, .pq",
        "empty.csv": "empty.csv:1: the file is empty",
        "cut.csv.gz": "cut.csv.gz: cannot be read after line 0",
        "twice.csv": "two columns have the name user",
        "not.parquet": "not a complete Parquet file",
    }
    for name, message in cases.items():
        with pytest.raises(DataError, match=message):
            prepare(dataclasses.replace(files, interactions=tmp_path / name), tmp_path / "out")
    with pytest.raises(
        DataError, match=r"other\.csv: lists none of the 8 items of .*clicks\.csv, such as '1'"
    ):
        prepare(dataclasses.replace(files, items=tmp_path / "other.csv"), tmp_path / "out")


def test_clean_text_and_shorten() -> None:
    assert clean_text("&amp;amp;lt;i&gt; I <3 you \t<BR/>now\u00a0x") == "I <3 you now x"
    assert shorten("one two three", 9) == "one two"
    assert shorten("one two three", 7) == "one two"
    assert shorten("onetwothree", 5) == "onetw"


def test_template() -> None:
    template = Template("{a} - {b} [{c}]; of {c}; {b}")
    rows = ["ABC", (" ", "B", " "), ("A", " ", " "), (" ", " ", " ")]
    found = [template.render({name: value.strip() for name, value in zip("abc", row)}) for row in rows]
    assert found == ["A - B [C]; of C; B", "Unknown title - B; B", "A", ""]
    assert Template("100% {a}; %s").render({"a": "A"}) == "100% A; %s"


def test_stats_say_where_every_row_went(tmp_path: Path) -> None:
    stats = prepare(AmazonFiles(*write_amazon(tmp_path, some_ratings())), tmp_path / "out", min_item_count=12)
    assert PreparedData.open(tmp_path / "out").stats == stats
    kept = stats["interactions"] + stats["interactions_pruned"] + stats["rejected"]["interactions"]
    assert kept == stats["rows_in_files"]["interactions"]


@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_text_of_an_item_given_by_its_fields(tmp_path: Path, ending: str) -> None:
    """Scoring makes of fields what `prepare` made of the same item's row."""
    files = custom(tmp_path, ending)
    stats = prepare(files, tmp_path / "out")
    template, data = Template(stats["source"]["text"]), PreparedData.open(tmp_path / "out")
    for row in item_rows():
        if row["item"] not in data.item_ids:
            continue
        fields = {name: row[name] for name in template.columns}
        text = template_text(template, fields, stats["source"]["max_chars"])
        assert text == data.item_texts[data.item_ids.index(row["item"])]
    with pytest.raises(DataError, match="has the fields title"):
        template_text(template, {"titel": "x"}, 10)


@pytest.mark.parametrize("name", ["clicks.csv", "clicks.tsv.gz", "clicks.parquet"])
def test_a_missing_file_is_missing(tmp_path: Path, name: str) -> None:
    """A missing Parquet file was called a damaged one."""
    with pytest.raises(DataError, match=rf"{re.escape(name)}: no such file$"):
        open_table(tmp_path / name, multiline=False)
    (tmp_path / name).mkdir()
    with pytest.raises(DataError, match=rf"{re.escape(name)}: not a file$"):
        open_table(tmp_path / name, multiline=False)


def test_a_missing_folder_is_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere: no such folder. The folder must hold"):
        prepare("ml-100k", tmp_path / "out", tmp_path / "nowhere")
