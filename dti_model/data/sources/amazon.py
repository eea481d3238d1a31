"""Amazon reviews, version 2 (2018): a review file and a metadata file of one category, JSON lines, gzip or plain.

    reviews   {"reviewerID": "A31...", "asin": "B004...", "overall": 5.0, "unixReviewTime": 1529193600, ...}
    meta      {"asin": "B004...", "title": "...", "brand": "...", "category": ["Gift Cards", "Gift Cards"], ...}

The text of an item is title, categories, brand. The real files need care: values hold HTML entities and markup; `category`
starts with the department, which every item of the file shares, and may repeat itself; the brand of a Kindle book
is "Visit Amazon's <author> Page"; a title with "getTime" is a script of the page and no title. An asin may be listed twice: the
first row with a title is used.

Both files are streamed. msgspec decodes the four or so fields asked for and skips the others: its messages name the
field, good and bad lines go through the same code, and it survives every line of the fuzz tests (Polars reads a lone
surrogate as NUL).

Source: Ni, Li, McAuley (2019), "Justifying recommendations using distantly-labeled reviews and fine-grained aspects".
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import msgspec
import polars as pl

from dti_model.data.errors import DataError
from dti_model.data.sources.item_frames import ItemTexts
from dti_model.data.sources.rows import MAX_REJECTED, Interactions, Rejected, check_limits, read_lines
from dti_model.data.sources.source import STARS, RawData
from dti_model.data.texts import MAX_CHARS, Template, clean_text

CATEGORIES = {"amazon-cds": "CDs_and_Vinyl", "amazon-kindles": "Kindle_Store"}
URL = "https://jmcauley.ucsd.edu/data/amazon_v2/"
THRESHOLD = 4.0  # only this fits the paper's own log loss and F1
MIN_ITEM_COUNT = 5
TEMPLATE = Template("{title}; {category}; {brand}")
_AUTHOR = re.compile(r"^Visit Amazon's (.*) Page$")

_Id = Annotated[str, msgspec.Meta(min_length=1)]


class _Review(msgspec.Struct):
    reviewerID: _Id
    asin: _Id
    overall: Annotated[float, msgspec.Meta(ge=1, le=5)]
    unixReviewTime: Annotated[int, msgspec.Meta(ge=0, le=2**62)]


class _Product(msgspec.Struct):
    asin: _Id
    title: str | None = None
    brand: str | None = None
    category: list[str] | None = None


@dataclass(frozen=True)
class AmazonFiles:
    """One category of Amazon reviews v2.

    Attributes:
        reviews: `<Category>_5.json.gz`, or `<Category>.json.gz` with all reviews; may be unpacked.
        meta: `meta_<Category>.json.gz`; may be unpacked.
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
            DataError: a file cannot be read, or more rows than `max_rejected` are unusable.
            ValueError: `max_rejected` or `max_chars` is impossible.
        """
        check_limits(self.max_rejected, self.max_chars)
        reviews, meta = Path(self.reviews), Path(self.meta)
        rejected = Rejected(reviews), Rejected(meta)
        interactions = Interactions()
        num_rows = 0
        for found, count in _decoded(reviews, _Review, rejected[0]):
            num_rows += count
            interactions.add(
                [row.reviewerID for row in found],
                [row.asin for row in found],
                pl.Series([row.unixReviewTime for row in found], dtype=pl.Int64),
                pl.Series([row.overall for row in found], dtype=pl.Float64),
            )
        rejected[0].check(num_rows, self.max_rejected)
        items = ItemTexts(interactions.items.names(), TEMPLATE, self.max_chars)
        num_listed = 0
        for found, count in _decoded(meta, _Product, rejected[1]):
            num_listed += count
            known = [row for row in found if row.asin in items]
            items.add([row.asin for row in known], _values(known))
        rejected[1].check(num_listed, self.max_rejected)
        return RawData(
            interactions,
            items,
            rejected,
            num_rows,
            num_listed,
            threshold=THRESHOLD,
            min_item_count=MIN_ITEM_COUNT,
            text_rule={"text": TEMPLATE.template, "max_chars": self.max_chars},
        )


def amazon_category(name: str, raw_dir: str | Path | None, **options: Any) -> AmazonFiles:
    """The files of a category in a folder; `options` are those of `AmazonFiles`.

    Raises:
        DataError: there is no folder, or a file is not in it.
    """
    category = CATEGORIES[name]
    wanted = f"{category}_5.json.gz and meta_{category}.json.gz (or unpacked, without .gz)"
    way_out = f"Get them from {URL} (categoryFilesSmall/ and metaFiles2/) and name their folder with raw_dir (--raw-dir)."
    if raw_dir is None:
        raise DataError(f"{name} is not fetched by itself: it needs {wanted}. {way_out}")
    found: list[Path] = []
    for stem in (f"{category}_5.json", f"meta_{category}.json"):
        paths = [Path(raw_dir) / f"{stem}{ending}" for ending in (".gz", "")]
        found += [path for path in paths if path.is_file()][:1]
    if len(found) != 2:
        problem = f"no {name} files here" if Path(raw_dir).is_dir() else "no such folder"
        raise DataError(f"{raw_dir}: {problem}. The folder must hold {wanted}. {way_out}")
    return AmazonFiles(found[0], found[1], **options, name=name)


def _decoded(path: Path, kind: type, rejected: Rejected) -> Iterator[tuple[list[Any], int]]:
    """Batches of decoded rows, each with the number of rows read; blank lines are no rows."""
    decoder: msgspec.json.Decoder[Any] = msgspec.json.Decoder(kind)
    for first, batch in read_lines(path):
        num_lines = batch.count(b"\n")
        try:
            found = decoder.decode_lines(batch)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            found = []
        if len(found) == num_lines:
            yield found, num_lines
        else:
            yield _decoded_one_by_one(decoder, first, batch, rejected)


def _decoded_one_by_one(
    decoder: msgspec.json.Decoder[Any], first: int, batch: bytes, rejected: Rejected
) -> tuple[list[Any], int]:
    found, count = [], 0
    for number, line in enumerate(batch.split(b"\n"), first):
        if not line.strip():
            continue
        count += 1
        try:
            found.append(decoder.decode(line))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            rejected.add(number, str(error))
    return found, count


def _values(products: list[_Product]) -> dict[str, Iterator[str]]:
    """The columns of the template, made one by one as they are asked for."""
    titles = (product.title or "" for product in products)
    return {
        "title": ("" if "getTime" in title else title for title in titles),
        "category": (_categories(product.category or []) for product in products),
        "brand": (_AUTHOR.sub(r"\1", clean_text(product.brand or "")) for product in products),
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
