"""Tiny Amazon and custom data sets in their exact file formats, made up for the tests."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dti_model.data import CustomFiles
from tests.data.movielens_files import MOVIES, Rating, some_ratings

# One of each oddity of the real files: entities and markup, a department repeated, an asin twice, no title, a page's script
# as a title, an author as a brand, a huge title.
PRODUCTS: list[dict[str, Any]] = [
    {"asin": "1", "title": " Rainforest Caf&eacute; <b>Gift</b> Card", "brand": "Rain &amp; Co", "rank": []},
    {"asin": "2", "title": "", "brand": "Visit Amazon's Jane Austen Page", "rank": "3 in Books"},
    {"asin": "2", "title": "Emma", "brand": "Visit Amazon's Jane Austen Page", "rank": [">#3 in Books"]},
    {"asin": "3", "title": "var aPageStart = (new Date()).getTime();", "brand": ""},
    {"asin": "9", "title": "A very long title " * 40, "brand": "by\n    \n    Someone"},
    {"asin": "10"},
    {"asin": "11", "title": None, "category": None, "brand": None},
    {"asin": "100", "title": "Never reviewed", "brand": "x"},
]
CATEGORY = ["Gift Cards", "Gift Cards", "Food &amp; Drink", "</span></span>"]


def write_amazon(folder: Path, ratings: list[Rating], *, zipped: bool = True) -> tuple[Path, Path]:
    """`CDs_and_Vinyl_5.json.gz` and `meta_CDs_and_Vinyl.json.gz`."""
    folder.mkdir(parents=True, exist_ok=True)
    reviews = [
        {
            "overall": float(r),
            "reviewerID": f"A{u:03}",
            "asin": str(i),
            "unixReviewTime": t,
            "reviewText": "☃",
        }
        for u, i, r, t in ratings
    ]
    paths = folder / "CDs_and_Vinyl_5.json.gz", folder / "meta_CDs_and_Vinyl.json.gz"
    for path, rows in zip(paths, (reviews, [{"category": CATEGORY, **product} for product in PRODUCTS])):
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(text, mtime=0) if zipped else text)
    return paths


# The same of 2023, without what was mended there (markup in categories, scripts as titles): nulls, an empty list of categories, a CD's
# artist with its format, fields with objects in them. Item 11 is not listed.
PRODUCTS_2023: list[dict[str, Any]] = [
    {"parent_asin": "1", "title": " Rainforest Caf&eacute; <b>Gift</b> Card", "store": "Rain &amp; Co"},
    {"parent_asin": "2", "title": None, "store": "Jane Austen", "price": None},
    {"parent_asin": "2", "title": "Emma", "store": "Jane Austen", "details": {"UPC": "1", "Size": None}},
    {"parent_asin": "3", "title": "", "store": None, "categories": []},
    {"parent_asin": "9", "title": "A very long title " * 40, "store": "Shrimp City   Format: Audio CD"},
    {"parent_asin": "10", "title": "Plain", "asin": "B10", "store": "Format: Audio CD", "categories": None},
    {"parent_asin": "100", "title": "Never reviewed", "store": "x"},
]
CATEGORIES_2023 = ["Gift Cards", "Gift Cards", "Food &amp; Drink"]
MILLISECONDS = 1_600_000_000_123  # times of 2023 start here, those of the ratings are added in seconds
RATINGS_2023 = ("user_id", "parent_asin", "rating", "timestamp")


def reviews_2023(ratings: list[Rating]) -> list[dict[str, Any]]:
    """Reviews with the fields of 2023; `asin` is of a colour or size."""
    return [
        {
            "rating": float(r),
            "title": "A review's own title",
            "text": "☃",
            "images": [{"small_image_url": "x"}],
            "asin": f"B{i}",
            "parent_asin": str(i),
            "user_id": f"A{u:03}",
            "timestamp": MILLISECONDS + 1000 * t,
            "helpful_vote": 0,
            "verified_purchase": True,
        }
        for u, i, r, t in ratings
    ]


def write_amazon_2023(
    folder: Path, ratings: list[Rating], *, zipped: bool = True, category: str = "CDs_and_Vinyl"
) -> tuple[Path, Path]:
    """`CDs_and_Vinyl.jsonl.gz` and `meta_CDs_and_Vinyl.jsonl.gz`, or unpacked."""
    folder.mkdir(parents=True, exist_ok=True)
    products = [
        {"main_category": "Gift Cards", "categories": CATEGORIES_2023, **product} for product in PRODUCTS_2023
    ]
    ending = ".jsonl.gz" if zipped else ".jsonl"
    paths = folder / f"{category}{ending}", folder / f"meta_{category}{ending}"
    for path, rows in zip(paths, (reviews_2023(ratings), products)):
        write_json_lines(path, rows)
    return paths


def write_json_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    """One object a line, gzip where the name ends so."""
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text, mtime=0) if path.suffix == ".gz" else text)
    return path


CUSTOM_COLUMNS = ("user", "item", "timestamp", "liked", "stars")
ITEM_COLUMNS = ("item", "title", "genres", "year")


def custom_rows(ratings: list[Rating] | None = None) -> list[dict[str, Any]]:
    """Interactions with a label and a rating that agree at a threshold of 3."""
    rows = some_ratings() if ratings is None else ratings
    return [{"user": u, "item": i, "timestamp": t, "liked": int(r > 3), "stars": r} for u, i, r, t in rows]


def item_rows() -> list[dict[str, Any]]:
    """The test movies; a quoted title, a line end in a title, and no title."""
    rows = [{"item": m.item, "title": m.short, "genres": list(m.genres), "year": m.year} for m in MOVIES]
    rows[0]["title"] = 'Toy "Story", &amp; more'
    rows[1]["title"] = "Misérables,\nLes"
    rows[2].update(title="", genres=["Drama"], year="")
    return rows


def write_csv(path: Path, columns: tuple[str, ...], rows: list[dict[str, Any]]) -> Path:
    """A CSV or TSV file, lists joined with commas."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",", lineterminator="\n")
        writer.writerow(columns)
        for row in rows:
            writer.writerow(", ".join(row[c]) if isinstance(row[c], list) else row[c] for c in columns)
    return path


def write_parquet(path: Path, columns: tuple[str, ...], rows: list[dict[str, Any]]) -> Path:
    """A Parquet file with the types that the values have."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({name: [row[name] for row in rows] for name in columns}), path)
    return path


def write_custom(
    folder: Path, ending: str = ".csv", ratings: list[Rating] | None = None
) -> tuple[Path, Path]:
    """`clicks` and `items`, of the kind that `ending` names."""
    write = write_parquet if ending == ".parquet" else write_csv
    clicks = write(folder / f"clicks{ending}", CUSTOM_COLUMNS, custom_rows(ratings))
    return clicks, write(folder / f"items{ending}", ITEM_COLUMNS, item_rows())


LOG, CATALOGUE = "user,item,timestamp,liked\n1,a,1,1\n1,b,2,0\n2,a,3,1\n", "item,title\na,A\nb,B\n"


def small_log(
    folder: Path, log: str | bytes = LOG, catalogue: str | bytes = CATALOGUE, **settings: Any
) -> CustomFiles:
    """`log.csv` and `items.csv` with this content."""
    for name, content in (("log.csv", log), ("items.csv", catalogue)):
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    settings = {"label": "liked", "max_rejected": 1, **settings}
    return CustomFiles(folder / "log.csv", folder / "items.csv", "{title}", **settings)
