"""Amazon reviews of 2018 ("v2") and 2023: a review file and a metadata file of one category, JSON lines, gzip or plain.

    2018  reviews   {"reviewerID": "A31...", "asin": "B004...", "overall": 5.0, "unixReviewTime": 1529193600, ...}
          meta      {"asin": "B004...", "title": "...", "brand": "...", "category": ["Gift Cards", "Gift Cards"], ...}
    2023  reviews   {"user_id": "AGK...", "parent_asin": "B00Y...", "rating": 5.0, "timestamp": 1588687728923, ...}
          meta      {"parent_asin": "B00Y...", "title": "...", "store": "...", "categories": ["Gift Cards", "Gift Cards"], ...}

The generation is told by the fields (amazon_fields.py). Reviews may be a table with these columns as well, such as the CSV files of 2023
with ratings alone ("5-core"). The text of an item is title, categories, brand (2023: store). The real files
need care: values hold HTML entities and markup; the first category is the department, which every item of the file shares, and it may
repeat itself; the brand of a Kindle book is "Visit Amazon's <author> Page", the store of a CD "<artist>   Format: Audio CD"; a title
with "getTime" is a script of the page and no title. An item may be listed twice: the first row with a title is used. An item without
a title, or without metadata at all (2023 has such items), keeps its interactions and has an unknown title.

A rating that is not from 1 to 5 (2023 has zeros) and a time before 1970 (2023 has some) reject their row. Reviews of 2023 that are
equal in user, item, time (to the millisecond) and rating are one review. The first is kept, the others are dropped: before the last of
them, the context would hold the very answer. They are counted (`duplicates_dropped`) and not rejected, since a category may hold more
than 1 % of them. Other reviews of one user and item are kept in both generations. So are equal ones of 2018, whose times are days.

Both files are streamed. msgspec decodes the four or so fields asked for and skips the others: its messages name the
field, good and bad lines go through the same code, and it survives every line of the fuzz tests (Polars reads a lone
surrogate as NUL).

Sources: Ni, Li, McAuley (2019), "Justifying recommendations using distantly-labeled reviews and fine-grained aspects"; Hou, Li, He,
Yan, Chen, McAuley (2024), "Bridging language and items for retrieval and recommendation".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import polars as pl

from dti_model.data.errors import DataError
from dti_model.data.sources.amazon_fields import DECODE_ERRORS, Generation, generation_of_pair, is_table
from dti_model.data.sources.csv_parquet import LINE, Table, open_table
from dti_model.data.sources.item_frames import ItemTexts
from dti_model.data.sources.rows import MAX_REJECTED, Interactions, Rejected, check_limits, read_lines
from dti_model.data.sources.source import STARS, RawData
from dti_model.data.texts import MAX_CHARS, clean_text

CATEGORIES = {"amazon-cds": "CDs_and_Vinyl", "amazon-kindles": "Kindle_Store"}
THRESHOLD = 4.0  # only this fits the paper's own log loss and F1
MIN_ITEM_COUNT = 5
ROWS_AT_ONCE = 50_000  # of a table, as Python objects
# Per generation the reviews and the metadata of a category, .gz or unpacked, and where they are.
FILES = (
    (
        "{}_5.json",
        "meta_{}.json",
        "https://jmcauley.ucsd.edu/data/amazon_v2/ (categoryFilesSmall/ and metaFiles2/)",
    ),
    ("{}.jsonl", "meta_{}.jsonl", "https://amazon-reviews-2023.github.io/ (review and meta)"),
)


@dataclass(frozen=True)
class AmazonFiles:
    """One category of Amazon reviews, of 2018 or 2023.

    Attributes:
        reviews: 2018 `<Category>_5.json.gz`, or `<Category>.json.gz` with all reviews; 2023 `<Category>.jsonl.gz`; may be unpacked.
            Or a table (.csv, .tsv, .parquet) with the same fields, such as the `<Category>.csv.gz` of 2023 with ratings alone.
        meta: 2018 `meta_<Category>.json.gz`, 2023 `meta_<Category>.jsonl.gz`; may be unpacked.
        max_rejected: largest share of a file's rows that may be unusable.
        max_chars: longest title, category list or brand in a text; longer ones are cut at a word.
        name: of the source in stats.json.
    """

    ratings: ClassVar[tuple[float, float] | None] = STARS

    reviews: Path
    meta: Path
    max_rejected: float = MAX_REJECTED
    max_chars: int = MAX_CHARS
    name: str = "amazon"

    def load(self, columns: Sequence[str] = ()) -> RawData:
        """Read both files; of further columns there are none.

        Raises:
            DataError: a file cannot be read, the two are no pair, or more rows than `max_rejected` are unusable.
            ValueError: `max_rejected` or `max_chars` is impossible.
        """
        check_limits(self.max_rejected, self.max_chars)
        reviews, meta = Path(self.reviews), Path(self.meta)
        names = generation_of_pair(reviews, meta)
        table = open_table(reviews, multiline=False) if is_table(reviews) else None
        rejected = table.rejected if table else Rejected(reviews), Rejected(meta)
        kind = names.review_type()
        rows = _converted(table, kind, names) if table else _decoded(reviews, kind, names, rejected[0])
        interactions = Interactions()
        num_rows = 0
        for found, count in rows:
            num_rows += count
            interactions.add(
                [row.user for row in found],
                [row.item for row in found],
                pl.Series([row.timestamp for row in found], dtype=pl.Int64),
                pl.Series([row.rating for row in found], dtype=pl.Float64),
            )
        rejected[0].check(num_rows, self.max_rejected)
        if names.drops_duplicates:
            interactions.drop_duplicates()
        items = ItemTexts(interactions.items.names(), names.template, self.max_chars)
        num_listed = 0
        for found, count in _decoded(meta, names.product_type(), names, rejected[1]):
            num_listed += count
            known = [row for row in found if row.item in items]
            items.add([row.item for row in known], _values(known, names))
        rejected[1].check(num_listed, self.max_rejected)
        return RawData(
            interactions,
            items,
            rejected,
            num_rows,
            num_listed,
            threshold=THRESHOLD,
            min_item_count=MIN_ITEM_COUNT,
            timestamp_unit=names.unit,
            text_rule={"text": names.template.template, "max_chars": self.max_chars},
        )


def amazon_category(name: str, raw_dir: str | Path | None, **options: Any) -> AmazonFiles:
    """The files of a category in a folder, those of 2018 where both are there; `options` are those of `AmazonFiles`.

    Raises:
        DataError: there is no folder, or no pair of files is in it.
    """
    category = CATEGORIES[name]
    pairs = [(reviews.format(category), meta.format(category)) for reviews, meta, _ in FILES]
    wanted = (
        " or ".join(f"{reviews}.gz and {meta}.gz" for reviews, meta in pairs) + " (or unpacked, without .gz)"
    )
    places = " or ".join(place for *_, place in FILES)
    way_out = f"Get them from {places} and name their folder with raw_dir (--raw-dir)."
    if raw_dir is None:
        raise DataError(f"{name} is not fetched by itself: it needs {wanted}. {way_out}")
    for stems in pairs:
        choices = [[Path(raw_dir) / f"{stem}{ending}" for ending in (".gz", "")] for stem in stems]
        found = [next(filter(Path.is_file, paths), None) for paths in choices]
        if found[0] and found[1]:
            return AmazonFiles(found[0], found[1], **options, name=name)
    problem = f"no {name} files here" if Path(raw_dir).is_dir() else "no such folder"
    raise DataError(f"{raw_dir}: {problem}. The folder must hold {wanted}. {way_out}")


def _converted(table: Table, kind: type, names: Generation) -> Iterator[tuple[list[Any], int]]:
    """Batches of rows of a table, each with the number of rows read: what `_decoded` makes of JSON lines with these values."""
    num_before = 0
    for batch in table.batches(names.review_names):
        columns = [pl.col(f"={name}").alias(name) for name in names.review_names]
        found = []
        for part in batch.iter_slices(ROWS_AT_ONCE):
            rows = part.select(columns).to_dicts()
            try:
                found += msgspec.convert(rows, list[kind], strict=False)  # type: ignore[valid-type]
            except msgspec.ValidationError:
                for number, row in zip(part[LINE], rows):
                    try:
                        found.append(msgspec.convert(row, kind, strict=False))
                    except msgspec.ValidationError as error:
                        table.rejected.add(number, names.problem(error))
        yield found, table.num_rows - num_before
        num_before = table.num_rows


def _decoded(
    path: Path, kind: type, names: Generation, rejected: Rejected
) -> Iterator[tuple[list[Any], int]]:
    """Batches of decoded rows, each with the number of rows read; blank lines are no rows."""
    decoder: msgspec.json.Decoder[Any] = msgspec.json.Decoder(kind)
    for first, batch in read_lines(path):
        num_lines = batch.count(b"\n")
        try:
            found = decoder.decode_lines(batch)
        except DECODE_ERRORS:
            found = []
        if len(found) == num_lines:
            yield found, num_lines
            continue
        found, num_rows = [], 0
        for number, line in enumerate(batch.split(b"\n"), first):
            if not line.strip():
                continue
            num_rows += 1
            try:
                found.append(decoder.decode(line))
            except DECODE_ERRORS as error:
                rejected.add(number, names.problem(error))
        yield found, num_rows


def _values(products: list[Any], names: Generation) -> dict[str, Iterator[str]]:
    """The columns of the template, made one by one as they are asked for."""
    titles = (product.title or "" for product in products)
    return {
        "title": ("" if "getTime" in title else title for title in titles),
        names.categories: (_categories(product.categories or []) for product in products),
        names.brand: (
            names.wrapped_brand.sub(r"\1", clean_text(product.brand or "")) for product in products
        ),
    }


def _categories(names: list[str]) -> str:
    """The categories below the department, each once; entries that are nothing but markup go.

    Example:
        >>> _categories(["Gift Cards", "Gift Cards", "</span></span>"])
        'Gift Cards'
    """
    cleaned = dict.fromkeys(clean_text(name) for name in names[1:])
    cleaned.pop("", None)
    return ", ".join(cleaned)
