"""MovieLens loaders: GroupLens' ML-100K and ML-1M, and RecBole's copy of ML-100K.

The text of a movie is its title with its year, then its genres, and never an id:

    Toy Story (1995); Animation, Children's, Comedy

GroupLens' ML-100K flags genres and keeps title and year together; RecBole splits title, year and class.
RecBole's parts are put back together and both are normalised alike (HTML entities, runs of blanks, the
"(V)" of a video release), so both routes give the same text for all 1,682 items. The genre "unknown" is no
genre, and the one title "unknown" (RecBole spells it "unkonwn") is no title.

These are published files of known content, so nothing is rejected: a line that cannot be used means a damaged
file and is an error with file and line, also with `subset`. Logs, where some bad rows are normal, have a limit
(`max_rejected`) instead.
"""

from __future__ import annotations

from pathlib import Path

import polars as pl

from dti_model.data.errors import DataError
from dti_model.data.sources.lines import DelimitedFile
from dti_model.data.sources.rows import Interactions
from dti_model.data.sources.source import ITEM_SCHEMA, Facts, RawData, file_sha256
from dti_model.data.texts import movie_text

THRESHOLD = 3.0  # the paper's: a rating above 3 is a click
MIN_ITEM_COUNT = 1  # the paper counts 3,706 items of ML-1M, which is the unpruned number
GENRES_100K = ["unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary"]
GENRES_100K += ["Drama", "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi"]
GENRES_100K += ["Thriller", "War", "Western"]
# Both GroupLens' files and RecBole's copy have this content digest (see RawData.digest).
DIGEST_100K = "8986024e7591737402e6268132ddb9fad860830c6e2060ba580c5e619e35bc63"
FACTS_100K = Facts(interactions=100_000, users=943, items_rated=1_682, items_listed=1_682, digest=DIGEST_100K)
FACTS_1M = Facts(interactions=1_000_209, users=6_040, items_rated=3_706, items_listed=3_883)

_INTER_HEADER = "user_id:token\titem_id:token\trating:float\ttimestamp:float"
_ITEM_HEADER = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq"


def load_100k(folder: Path) -> RawData:
    """ML-100K from `u.data` and `u.item`, or from RecBole's `ml-100k.inter` and `ml-100k.item`.

    Raises:
        DataError: no such files in `folder`, or a malformed line.
    """
    folder = _folder_of(folder, "ml-100k", ("u.data", "u.item"), ("ml-100k.inter", "ml-100k.item"))
    if (folder / "u.data").exists():
        ratings, items = folder / "u.data", folder / "u.item"
        interactions = _ratings(
            DelimitedFile(ratings, ["user", "item", "rating", "timestamp"], "\t", "latin-1")
        )
        return _raw_data(interactions, _items_100k(items), "grouplens", ratings, items, FACTS_100K)
    ratings, items = folder / "ml-100k.inter", folder / "ml-100k.item"
    columns = ["user", "item", "rating", "timestamp"]
    interactions = _ratings(DelimitedFile(ratings, columns, "\t", "utf-8", header=_INTER_HEADER))
    return _raw_data(interactions, _items_recbole(items), "recbole", ratings, items, FACTS_100K)


def load_1m(folder: Path) -> RawData:
    """ML-1M from `ratings.dat` and `movies.dat`.

    Raises:
        DataError: no such files in `folder`, or a malformed line.
    """
    folder = _folder_of(folder, "ml-1m", ("ratings.dat", "movies.dat"))
    ratings, movies = folder / "ratings.dat", folder / "movies.dat"
    interactions = _ratings(DelimitedFile(ratings, ["user", "item", "rating", "timestamp"], "::", "latin-1"))
    file = DelimitedFile(movies, ["item", "title", "genres"], "::", "latin-1")
    genres = file.columns["genres"].str.split("|").to_list()
    items = _item_frame(file.unique_ids("item"), file.columns["title"].to_list(), genres)
    return _raw_data(interactions, items, "grouplens", ratings, movies, FACTS_1M)


def _ratings(file: DelimitedFile) -> Interactions:
    interactions = Interactions()
    interactions.add(
        file.ids("user").to_list(),
        file.ids("item").to_list(),
        file.integers("timestamp"),
        file.numbers("rating", 1, 5),
    )
    return interactions


def _items_100k(path: Path) -> pl.DataFrame:
    names = ["item", "title", "date", "video_date", "url", *GENRES_100K]
    file = DelimitedFile(path, names, "|", "latin-1")
    for genre in GENRES_100K:
        file.require(file.columns[genre].is_in(["0", "1"]), f"the flag of genre {genre!r} must be 0 or 1")
    flags = (file.columns.select(GENRES_100K) == "1").rows()
    genres = [[genre for genre, is_set in zip(GENRES_100K, row) if is_set] for row in flags]
    return _item_frame(file.unique_ids("item"), file.columns["title"].to_list(), genres)


def _items_recbole(path: Path) -> pl.DataFrame:
    file = DelimitedFile(path, ["item", "title", "year", "genres"], "\t", "utf-8", header=_ITEM_HEADER)
    titles = [
        "" if title == "unkonwn" else f"{title} ({year})"
        for title, year in zip(file.columns["title"], file.columns["year"])
    ]
    return _item_frame(file.unique_ids("item"), titles, file.columns["genres"].str.split(" ").to_list())


def _item_frame(ids: pl.Series, titles: list[str], genres: list[list[str]]) -> pl.DataFrame:
    texts = [movie_text(title, names) for title, names in zip(titles, genres)]
    return pl.DataFrame(
        {"item": ids, "text": texts, "titled": [text != "" for text in texts]}, schema=ITEM_SCHEMA
    )


def _folder_of(folder: Path, name: str, *choices: tuple[str, ...]) -> Path:
    """The first of `folder` and `folder/name` that holds all files of one choice."""
    for candidate in (folder, folder / name):
        if any(all((candidate / file).is_file() for file in files) for files in choices):
            return candidate
    wanted = " or ".join(" and ".join(files) for files in choices)
    found = f"no {name} files here" if folder.is_dir() else "no such folder"
    raise DataError(f"{folder}: {found}. The folder must hold {wanted}.")


def _raw_data(
    interactions: Interactions, items: pl.DataFrame, route: str, ratings: Path, movies: Path, facts: Facts
) -> RawData:
    rows = interactions.frame()
    return RawData(
        interactions=rows,
        users=interactions.users.names(),
        rated=interactions.items.names(),
        items=items,
        threshold=THRESHOLD,
        min_item_count=MIN_ITEM_COUNT,
        route=route,
        interactions_path=ratings,
        items_path=movies,
        num_rows=rows.height,  # no line is ever rejected: a bad one stops the loader
        num_listed=items.height,
        facts=facts,
        checksums={path.name: file_sha256(path) for path in (ratings, movies)},
    )
