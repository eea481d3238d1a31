"""The two generations of Amazon reviews: what their files call things, and of which one a file is.

                   user        item         rating   time                        names of a product
    2018 ("v2")    reviewerID  asin         overall  unixReviewTime, seconds     title, category, brand
    2023           user_id     parent_asin  rating   timestamp, milliseconds     title, categories, store

Everything else is the same in both. The website of 2023 shows a row with `sort_timestamp` in the place of `timestamp`: either is
read. An `asin` of 2023 is a colour or a size; metadata and the counts of the data set go by `parent_asin`.

No review is older than Amazon. So a time below 10^11 is no time in milliseconds (1973), and one above is none in seconds (the
year 5138): such rows are rejected, and a file in the wrong unit is refused instead of being read as another century.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import msgspec

from dti_model.data.errors import DataError, at_line
from dti_model.data.sources.csv_parquet import PARQUET, SEPARATORS, open_table
from dti_model.data.sources.rows import read_lines
from dti_model.data.texts import Template

SECONDS, MILLISECONDS = (0, 10**11), (10**11, 10**14)
DECODE_ERRORS = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
NUM_NAMES_SHOWN = 12
_Id = Annotated[str, msgspec.Meta(min_length=1)]
_Stars = Annotated[float, msgspec.Meta(ge=1, le=5)]
_Row = msgspec.json.Decoder(dict[str, msgspec.Raw])


@dataclass(frozen=True)
class Generation:
    """The names of one generation.

    Attributes:
        year: of its release.
        user, item, rating, timestamp: fields of a review; `item` is in the metadata too.
        categories, brand: fields of the metadata, beside `title`.
        unit: of the times, in words.
        times: the lowest and the highest time.
        time_rule: what to do about a time of another unit.
        wrapped_brand: what brands are wrapped in; its first group is the brand.
        drops_duplicates: rows that are equal in user, item, time and rating are one review. A time in milliseconds does not come twice;
            one in days does.
    """

    year: str
    user: str
    item: str
    rating: str
    timestamp: str
    categories: str
    brand: str
    unit: str
    times: tuple[int, int]
    time_rule: str
    wrapped_brand: re.Pattern[str]
    drops_duplicates: bool

    @property
    def review_names(self) -> tuple[str, ...]:
        """The fields of a review that are read."""
        return self.user, self.item, self.rating, self.timestamp

    @property
    def template(self) -> Template:
        """The text of a product; requests name its fields as the metadata does."""
        return Template(f"{{title}}; {{{self.categories}}}; {{{self.brand}}}")

    def review_type(self) -> type[msgspec.Struct]:
        """A review: user, item, rating, timestamp."""
        low, high = self.times
        time = Annotated[int, msgspec.Meta(ge=low, le=high)]
        fields = [("user", _Id), ("item", _Id), ("rating", _Stars), ("timestamp", time)]
        names = dict(zip(("user", "item", "rating", "timestamp"), self.review_names))
        return msgspec.defstruct("Review", fields, rename=names)

    def product_type(self) -> type[msgspec.Struct]:
        """A product: item, title, brand, categories; all but the first may be missing or null."""
        fields: list[Any] = [
            ("item", _Id),
            ("title", str | None, None),
            ("brand", str | None, None),
            ("categories", list[str] | None, None),
        ]
        names = {"item": self.item, "brand": self.brand, "categories": self.categories}
        return msgspec.defstruct("Product", fields, rename=names)

    def problem(self, error: Exception) -> str:
        """What is wrong with a row, for its reader."""
        text = str(error)
        is_other_unit = str(10**11) in text and text.endswith(f"`$.{self.timestamp}`")
        return f"{text} ({self.time_rule})" if is_other_unit else text


OF_2018 = Generation(
    year="2018",
    user="reviewerID",
    item="asin",
    rating="overall",
    timestamp="unixReviewTime",
    categories="category",
    brand="brand",
    unit="seconds",
    times=SECONDS,
    time_rule="times of 2018 are seconds since 1970: divide milliseconds by 1000",
    wrapped_brand=re.compile(r"^Visit Amazon's (.*) Page$"),
    drops_duplicates=False,
)
OF_2023 = Generation(
    year="2023",
    user="user_id",
    item="parent_asin",
    rating="rating",
    timestamp="timestamp",
    categories="categories",
    brand="store",
    unit="milliseconds",
    times=MILLISECONDS,
    time_rule="times of 2023 are milliseconds since 1970: multiply seconds by 1000",
    wrapped_brand=re.compile(r"^(.*?) *Format: .*$"),
    drops_duplicates=True,
)
GENERATIONS = (OF_2018, OF_2023, replace(OF_2023, timestamp="sort_timestamp"))


def generation_of_pair(reviews: Path, meta: Path) -> Generation:
    """The generation of a review file and of the metadata that goes with it.

    Raises:
        DataError: a file cannot be read, is of no generation or of the other kind, or the two are of different ones.
    """
    generation, other = _of_reviews(reviews), _of_meta(meta)
    if generation.year != other.year:
        raise DataError(
            f"{reviews} holds reviews of {generation.year} ({generation.user}, {generation.item}), but {meta} metadata of {other.year} "
            f"({other.item}). Name two files of one generation: their items have different ids."
        )
    return generation


def is_table(path: Path) -> bool:
    """Whether the name of a file is that of a table instead of JSON lines."""
    return Path(path.name.removesuffix(".gz")).suffix.lower() in (*SEPARATORS, *PARQUET)


def _of_reviews(path: Path) -> Generation:
    """The generation of the first row that has all fields of a review."""
    first: tuple[int, Collection[str]] = 1, ()
    heads = [(1, set(open_table(path, multiline=False).columns))] if is_table(path) else _names(path)
    for number, names in heads:
        for generation in GENERATIONS:
            if names.issuperset(generation.review_names):
                return generation
        first = first if first[1] else (number, names)
    wanted = " or ".join(f"{', '.join(each.review_names)} ({each.year})" for each in (OF_2018, OF_2023))
    raise at_line(
        path,
        first[0],
        f"no row here is a review with {wanted}; {_shown(first[1])}. Name a review file of Amazon with reviews (--reviews): JSON lines, "
        "or a table whose name ends with .csv, .tsv (also .gz) or .parquet. Any other log is read by `dti prepare custom`, whose "
        "options name its columns.",
    )


def _of_meta(path: Path) -> Generation:
    """The generation of the first row that has the id of a product."""
    first: tuple[int, Collection[str]] = 1, ()
    for number, names in _names(path):
        for generation in (OF_2023, OF_2018):  # a row of 2023 may hold an `asin` as well
            if generation.item in names:
                if generation.user in names:
                    raise at_line(
                        path,
                        number,
                        f"a review ({generation.user}), not metadata. Name the file with the titles with meta (--meta).",
                    )
                return generation
        first = first if first[1] else (number, names)
    raise at_line(
        path,
        first[0],
        f"no row here is metadata, a JSON object with {OF_2018.item} (2018) or {OF_2023.item} (2023); {_shown(first[1])}. Name "
        "meta_<Category>.json.gz (2018) or meta_<Category>.jsonl.gz (2023) with meta (--meta).",
    )


def _names(path: Path) -> Iterator[tuple[int, set[str]]]:
    """The fields of the JSON objects at the head of a file, each with its line: those of the first batch of lines tell enough."""
    for first, batch in read_lines(path):
        for number, line in enumerate(batch.split(b"\n"), first):
            try:
                yield number, set(_Row.decode(line))
            except DECODE_ERRORS:
                continue
        return


def _shown(names: Collection[str]) -> str:
    if not names:
        return "nothing at its head is a JSON object"
    shown = sorted(names)[:NUM_NAMES_SHOWN]
    return f"the first row has {', '.join(shown)}{' and more' if len(names) > len(shown) else ''}"
