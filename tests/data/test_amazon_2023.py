"""Amazon reviews of 2023 beside those of 2018: which is which, texts, times, duplicates, rejected rows, and files that are no pair."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from dti_model.cli.prepare import prepared_report
from dti_model.data import AmazonFiles, DataError, PreparedData, prepare
from dti_model.data.sources import rows
from tests.data.log_files import (
    MILLISECONDS,
    RATINGS_2023,
    reviews_2023,
    write_amazon,
    write_amazon_2023,
    write_csv,
    write_json_lines,
    write_parquet,
)
from tests.data.movielens_files import Rating, some_ratings

RATINGS = [row for row in some_ratings() if row[1] < 100]
BAD_REVIEWS: dict[str, Any] = {
    "Expected `float` >= 1.0 - at `$.rating`": {"rating": 0.0},
    "Expected `float` <= 5.0 - at `$.rating`": {"rating": 5.5},
    "Expected `float`, got `null` - at `$.rating`": {"rating": None},
    "Expected `str` of length >= 1 - at `$.parent_asin`": {"parent_asin": ""},
    "Expected `str`, got `null` - at `$.user_id`": {"user_id": None},
    "Expected `int` >= 100000000000 - at `$.timestamp` (times of 2023 are milliseconds": {"timestamp": -5},
    "Expected `int` >= 100000000000 - at `$.timestamp` (times": {"timestamp": 1_600_000_000},
    "Expected `int` <= 100000000000000 - at `$.timestamp` (times": {"timestamp": 1_600_000_000_000_000},
    "Expected `int`, got `str` - at `$.timestamp`": {"timestamp": "2020"},
}


def prepared(reviews: Path, meta: Path, out: Path, **rules: Any) -> tuple[dict[str, Any], PreparedData]:
    max_rejected = rules.pop("max_rejected", 0)
    rules = {"min_item_count": 1, "min_context": 0, "vocab_size": 270, **rules}
    stats = prepare(AmazonFiles(reviews, meta, max_rejected=max_rejected), out, **rules)
    return stats, PreparedData.open(out)


@pytest.mark.parametrize("zipped", [True, False])
def test_texts_labels_and_times(tmp_path: Path, zipped: bool) -> None:
    files = AmazonFiles(*write_amazon_2023(tmp_path / "raw", RATINGS, zipped=zipped))
    stats = prepare(files, tmp_path / "out")
    data = PreparedData.open(tmp_path / "out")
    assert data.item_ids == ["1", "2", "3", "9", "10", "11"]
    long_title = data.item_texts[3].split(";")[0]
    assert 190 < len(long_title) <= 200
    assert data.item_texts == [
        "Rainforest Café Gift Card; Gift Cards, Food & Drink; Rain & Co",
        "Emma; Gift Cards, Food & Drink; Jane Austen",
        "Unknown title",
        f"{long_title}; Gift Cards, Food & Drink; Shrimp City",
        "Plain",
        "Unknown title",
    ]
    assert data.text_rule["text"] == "{title}; {categories}; {store}"
    in_order = sorted(RATINGS, key=lambda r: (r[0], r[3], r[1]))
    assert data.label.tolist() == [int(r > 4) for _, _, r, _ in in_order]
    assert data.timestamp.tolist() == [MILLISECONDS + 1000 * t for *_, t in in_order]
    assert (stats["timestamp_unit"], stats["duplicates_dropped"]) == ("milliseconds", 0)
    assert (stats["missing_titles"], stats["texts_cut"], stats["items_repeated"]) == (2, 1, 1)
    assert (stats["threshold"], stats["min_item_count"], stats["click"]) == (4, 5, "rating > 4")
    assert stats["rows_in_files"] == {"interactions": 72, "items": 7}
    assert stats["rejected"] == {"interactions": 0, "items": 0, "first": []}


def test_one_log_in_both_generations(tmp_path: Path) -> None:
    """Ratings, order and splits are the same; times differ by their unit, and requests name fields as the metadata does."""
    old, of_2018 = prepared(*write_amazon(tmp_path / "2018", RATINGS), tmp_path / "a", min_context=2)
    new, of_2023 = prepared(*write_amazon_2023(tmp_path / "2023", RATINGS), tmp_path / "b", min_context=2)
    for name in ("item", "label", "rating", "split", "order"):
        assert getattr(of_2018, name).tolist() == getattr(of_2023, name).tolist(), name
    assert (of_2018.user_ids, of_2018.item_ids) == (of_2023.user_ids, of_2023.item_ids)
    assert of_2023.timestamp.tolist() == (MILLISECONDS + 1000 * of_2018.timestamp).tolist()
    assert (old["timestamp_unit"], new["timestamp_unit"]) == ("seconds", "milliseconds")
    assert of_2018.text_rule["text"] == "{title}; {category}; {brand}"


@pytest.mark.parametrize("batch_bytes", [1 << 24, 600])
def test_exact_duplicates_are_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_bytes: int
) -> None:
    """Rows equal in user, item, rating and millisecond are one review, whatever else they hold and wherever they stand."""
    monkeypatch.setattr(rows, "BATCH_BYTES", batch_bytes)
    ratings: list[Rating] = [
        (1, 1, 5, 7),
        (2, 1, 3, 7),
        (1, 2, 2, 8),
        (1, 1, 5, 7),
        (1, 1, 5, 7),
        (1, 2, 2, 8),
    ]
    others = reviews_2023(ratings[:1]) * 2 + reviews_2023([(1, 1, 4, 7)])
    others[0]["timestamp"] += 1
    others[1] |= {"asin": "B1-red", "text": "the same review, at another size"}
    reviews, meta = write_amazon_2023(tmp_path, ratings, zipped=False)
    write_json_lines(reviews, reviews_2023(ratings) + others)
    stats, data = prepared(reviews, meta, tmp_path / "out")  # not one may be rejected
    assert (stats["interactions"], stats["duplicates_dropped"]) == (5, 4)
    assert (stats["duplicate_pairs"], stats["duplicate_interactions"]) == (1, 2)
    assert data.rating.tolist() == [5, 4, 5, 2, 3]
    assert data.timestamp.tolist() == [MILLISECONDS + t for t in (7000, 7000, 7001, 8000, 7000)]
    assert stats["rows_in_files"]["interactions"] == 9
    report = prepared_report(stats, tmp_path / "out")
    assert (
        "  4 were dropped: equal to an interaction before in user, item, time and rating\n" in f"{report}\n"
    )


def test_pruning_counts_a_duplicate_once(tmp_path: Path) -> None:
    ratings: list[Rating] = [(1, 1, 5, 7)] * 3 + [(1, 2, 5, 7), (2, 2, 4, 7), (3, 2, 4, 7)]
    files = write_amazon_2023(tmp_path, ratings)
    stats, data = prepared(*files, tmp_path / "out", min_item_count=2)
    assert data.item_ids == ["2"]
    assert (stats["interactions"], stats["interactions_pruned"], stats["duplicates_dropped"]) == (3, 1, 2)


def test_equal_rows_of_2018_are_kept(tmp_path: Path) -> None:
    """Their times are days."""
    files = write_amazon(tmp_path, [(1, 1, 5, 86_400), (1, 1, 5, 86_400), (2, 1, 1, 86_400)])
    stats, data = prepared(*files, tmp_path / "out")
    assert (data.rating.tolist(), stats["duplicates_dropped"], stats["duplicate_pairs"]) == ([5, 5, 1], 0, 1)
    assert "dropped" not in prepared_report(stats, tmp_path / "out")


def test_bad_reviews_are_listed_with_their_lines(tmp_path: Path) -> None:
    reviews, meta = write_amazon_2023(tmp_path, RATINGS, zipped=False)
    bad = [{**reviews_2023(RATINGS[:1])[0], **change} for change in BAD_REVIEWS.values()]
    write_json_lines(reviews, bad + reviews_2023(RATINGS))
    reviews.write_bytes(b"{\n" + reviews.read_bytes())
    stats, _ = prepared(reviews, meta, tmp_path / "out", max_rejected=0.2)
    listed = pl.read_csv(tmp_path / "out" / "rejected.csv")
    assert listed["line"].to_list() == list(range(1, len(bad) + 2))
    for problem, wanted in zip(listed["problem"], ["truncated", *BAD_REVIEWS]):
        assert wanted in problem
    assert (stats["rejected"]["interactions"], stats["interactions"]) == (1 + len(bad), len(RATINGS))
    with pytest.raises(DataError, match=r"10 of 82 rows.*--max-rejected\)\. The first: \S+jsonl:1: "):
        AmazonFiles(reviews, meta).load()


def test_times_in_the_unit_of_the_other_generation(tmp_path: Path) -> None:
    """A file in seconds was of January 1970, and one in milliseconds of the year 52,000, without a word."""
    reviews, meta = write_amazon_2023(tmp_path, [], zipped=False)
    write_json_lines(
        reviews, [{**row, "timestamp": row["timestamp"] // 1000} for row in reviews_2023(RATINGS)]
    )
    message = r"72 of 72 rows.*CDs_and_Vinyl\.jsonl:1: .*\(times of 2023 are milliseconds since 1970: multiply seconds by 1000\)"
    with pytest.raises(DataError, match=message):
        AmazonFiles(reviews, meta).load()
    late = [(u, i, r, MILLISECONDS + t) for u, i, r, t in RATINGS]
    message = r"72 of 72 rows.*json\.gz:1: .*unixReviewTime` \(times of 2018 are seconds since 1970: divide milliseconds by 1000\)"
    with pytest.raises(DataError, match=message):
        AmazonFiles(*write_amazon(tmp_path, late)).load()


def test_the_spelling_of_the_website(tmp_path: Path) -> None:
    """It shows rows with `sort_timestamp` and `helpful_votes`."""
    reviews, meta = write_amazon_2023(tmp_path, RATINGS)
    _, wanted = prepared(reviews, meta, tmp_path / "a")
    write_json_lines(
        reviews, [{"sort_timestamp": row.pop("timestamp"), **row} for row in reviews_2023(RATINGS)]
    )
    stats, found = prepared(reviews, meta, tmp_path / "b")
    assert stats["timestamp_unit"] == "milliseconds"
    assert found.timestamp.tolist() == wanted.timestamp.tolist()


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".parquet"])
def test_ratings_alone_in_a_table(tmp_path: Path, ending: str) -> None:
    """The CSV files of 2023 have these columns, and some a history; they give what JSON lines with these values give."""
    lines, meta = write_amazon_2023(tmp_path, RATINGS)
    _, wanted = prepared(lines, meta, tmp_path / "a")
    write = write_parquet if ending == ".parquet" else write_csv
    listed = [{**row, "history": "1 2"} for row in reviews_2023(RATINGS)]
    table = write(tmp_path / f"CDs{ending}", (*RATINGS_2023, "history"), listed)
    stats, found = prepared(table, meta, tmp_path / "b")
    assert stats["timestamp_unit"] == "milliseconds"
    for name in ("item", "label", "rating", "timestamp", "order"):
        assert getattr(found, name).tolist() == getattr(wanted, name).tolist(), name
    assert (found.user_ids, found.item_texts) == (wanted.user_ids, wanted.item_texts)


def test_bad_rows_of_a_table(tmp_path: Path) -> None:
    _, meta = write_amazon_2023(tmp_path, [])
    table = tmp_path / "CDs.csv"
    good = "A,1,5.0,1600000000123\n"
    bad = {
        f'"{good}': "a quoted value does not end",
        "A,1,0.0,1600000000123\n": "Expected `float` >= 1.0 - at `$.rating`",
        "A,,5.0,1600000000123\n": "Expected `str` of length >= 1 - at `$.parent_asin`",
        "A,1,5.0\n": "a row must have 4 values, but has 3",
        "A,1,nan,1600000000123\n": "Expected `float` >= 1.0 - at `$.rating`",
        "A,1,5.0,soon\n": "Expected `int`, got `str` - at `$.timestamp`",
        "A,1,5.0,1600000000\n": "(times of 2023 are milliseconds since 1970: multiply seconds by 1000)",
    }
    table.write_text(f"{','.join(RATINGS_2023)}\n{good}{''.join(bad)}\n")
    raw = AmazonFiles(table, meta, max_rejected=1).load()
    assert (raw.num_rows, raw.interactions.height, raw.num_rejected) == (8, 1, (7, 0))
    found = raw.rejected[0].frame()
    assert found["line"].to_list() == list(range(3, 10))
    for problem, wanted in zip(found["problem"], bad.values()):
        assert wanted in problem


def test_files_that_are_no_pair(tmp_path: Path) -> None:
    old = write_amazon(tmp_path / "2018", RATINGS)
    new = write_amazon_2023(tmp_path / "2023", RATINGS)
    table = write_csv(tmp_path / "log.csv", ("user", "item"), [{"user": 1, "item": 2}])
    (tmp_path / "ratings.txt").write_text(f"{','.join(RATINGS_2023)}\nA,1,5.0,1600000000123\n")
    two_years = (
        r"holds reviews of {} \({}\), but \S+ metadata of {} \({}\)\. Name two files of one generation"
    )
    for reviews, meta, message in (
        (old[0], new[1], two_years.format(2018, "reviewerID, asin", 2023, "parent_asin")),
        (new[0], old[1], two_years.format(2023, "user_id, parent_asin", 2018, "asin")),
        (old[0], old[0], r"_5\.json\.gz:1: a review \(reviewerID\), not metadata.*--meta"),
        (new[0], new[0], r"Vinyl\.jsonl\.gz:1: a review \(user_id\), not metadata.*--meta"),
        (new[1], new[1], r"meta_\S+gz:1: no row here is a review.*the first row has categories, main_category.*--reviews"),
        (old[1], old[1], r"meta_\S+gz:1: no row here is a review with reviewerID, asin, overall, unixReviewTime \(2018\) or user_id"),
        (table, new[1], r"log\.csv:1: no row here is a review.*the first row has item, user\..*`dti prepare custom`"),
        (tmp_path / "ratings.txt", new[1], r"ratings\.txt:1: .*nothing at its head is a JSON object.*whose name ends with \.csv"),
        (new[0], table, r"log\.csv:1: no row here is metadata.*asin \(2018\) or parent_asin \(2023\).*--meta"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=message):
            AmazonFiles(reviews, meta, max_rejected=1).load()


def test_a_category_of_2023_in_a_folder(tmp_path: Path) -> None:
    """Where both generations are there, that of 2018 is read, as it always was; halves of two make no pair."""
    for name, category in (("amazon-cds", "CDs_and_Vinyl"), ("amazon-kindles", "Kindle_Store")):
        raw = tmp_path / name
        reviews, meta = write_amazon_2023(raw, RATINGS, zipped=False, category=category)
        stats = prepare(name, tmp_path / "out", raw)
        assert (stats["source"]["name"], stats["timestamp_unit"]) == (name, "milliseconds")
        assert set(stats["source"]["sha256"]) == {reviews.name, meta.name}
    raw = tmp_path / "amazon-cds"
    old = write_amazon(raw, RATINGS)
    assert prepare("amazon-cds", tmp_path / "out", raw)["timestamp_unit"] == "seconds"
    old[1].unlink()
    assert prepare("amazon-cds", tmp_path / "out", raw)["timestamp_unit"] == "milliseconds"
    (raw / "CDs_and_Vinyl.jsonl").unlink()
    both = "CDs_and_Vinyl_5.json.gz and meta_CDs_and_Vinyl.json.gz or CDs_and_Vinyl.jsonl.gz and meta_CDs_and_Vinyl.jsonl.gz"
    with pytest.raises(
        DataError, match=f"no amazon-cds files here.*{re.escape(both)}.*amazon_v2/.*amazon-reviews-2023"
    ):
        prepare("amazon-cds", tmp_path / "out", raw)
