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

import os
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from dti_model.data.errors import DataError
from dti_model.data.sources.delimited import DelimitedFile
from dti_model.data.sources.fetch import fetch
from dti_model.data.sources.item_frames import ItemTexts
from dti_model.data.sources.rows import Interactions, Rejected
from dti_model.data.sources.source import STARS, Facts, RawData
from dti_model.data.sources.user_frames import movielens_users
from dti_model.data.texts import MAX_CHARS, TEMPLATE, Template
from dti_model.files import sha256_of, temporary_folder

THRESHOLD = 3.0  # the paper's: a rating above 3 is a click
MIN_ITEM_COUNT = 1  # the paper counts 3,706 items of ML-1M, which is the unpruned number
GENRES_100K = ["unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary"]
GENRES_100K += ["Drama", "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi"]
GENRES_100K += ["Thriller", "War", "Western"]
# Both GroupLens' files and RecBole's copy have this content digest (see RawData.digest).
DIGEST_100K = "8986024e7591737402e6268132ddb9fad860830c6e2060ba580c5e619e35bc63"
FACTS_100K = Facts(interactions=100_000, users=943, items_rated=1_682, items_listed=1_682, digest=DIGEST_100K)
FACTS_1M = Facts(interactions=1_000_209, users=6_040, items_rated=3_706, items_listed=3_883)

ITEM_COLUMNS = ("title", "genres")  # of a template
COLUMNS = ["user", "item", "rating", "timestamp"]
_INTER_HEADER = "user_id:token\titem_id:token\trating:float\ttimestamp:float"
_ITEM_HEADER = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq"
_Movies = tuple[DelimitedFile, Iterable[str], list[list[str]]]  # with their titles and genres


@dataclass(frozen=True)
class MovieLens:
    """ML-100K or ML-1M.

    Attributes:
        name: "ml-100k" or "ml-1m".
        raw_dir: folder with the raw files; None: they are fetched.
        subset: a part of the set is enough: its counts are reported, not compared with the full set's.
        profile: also read the users' file, for profiles of gender, age and occupation.
        text: template of an item text, of {title} and {genres}; None: title and genres.
    """

    ratings: ClassVar[tuple[float, float] | None] = STARS

    name: str
    raw_dir: str | Path | None = None
    subset: bool = False
    profile: bool = False
    text: str | None = None

    def __post_init__(self) -> None:
        """Raise a DataError where the template names another column."""
        if self.text is not None:
            Template(self.text).check(ITEM_COLUMNS, f"a movie of {self.name}")

    def load(self, columns: Sequence[str] = ()) -> RawData:
        """Read the files; interactions have no further columns.

        Raises:
            DataError: a file is missing, malformed or cut short, or not the published one.
        """
        with ExitStack() as stack:
            folder = self.raw_dir
            if folder is None:
                place = Path(tempfile.gettempdir()) / f"dti-fetch-{os.getuid()}"
                folder = fetch(self.name, stack.enter_context(temporary_folder(place)))
            raw = LOADERS[self.name](Path(folder))
            if self.profile:
                raw.profiles = movielens_users(raw.interactions_path.parent, MAX_CHARS)
                raw.checksums = {**raw.checksums, raw.profiles.path.name: sha256_of(raw.profiles.path)}
            raw.subset = self.subset
            if not self.subset:
                raw.check_facts()  # the digest is of the usual texts
            if self.text is not None:
                raw.items = _texts(*_MOVIES[raw.items_path.name](raw.items_path), self.text).frame()
                raw.text_rule = {"text": self.text}
        return raw


def load_100k(folder: Path) -> RawData:
    """ML-100K from `u.data` and `u.item`, or from RecBole's `ml-100k.inter` and `ml-100k.item`.

    Raises:
        DataError: no such files in `folder`, or a malformed line.
    """
    folder = _folder_of(folder, "ml-100k", ("u.data", "u.item"), ("ml-100k.inter", "ml-100k.item"))
    if (folder / "u.data").exists():
        ratings = DelimitedFile(folder / "u.data", COLUMNS, "\t", "latin-1")
        return _raw_data(ratings, *_movies_100k(folder / "u.item"), "grouplens", FACTS_100K)
    ratings = DelimitedFile(folder / "ml-100k.inter", COLUMNS, "\t", "utf-8", header=_INTER_HEADER)
    return _raw_data(ratings, *_movies_recbole(folder / "ml-100k.item"), "recbole", FACTS_100K)


def load_1m(folder: Path) -> RawData:
    """ML-1M from `ratings.dat` and `movies.dat`.

    Raises:
        DataError: no such files in `folder`, or a malformed line.
    """
    folder = _folder_of(folder, "ml-1m", ("ratings.dat", "movies.dat"))
    ratings = DelimitedFile(folder / "ratings.dat", COLUMNS, "::", "latin-1")
    return _raw_data(ratings, *_movies_1m(folder / "movies.dat"), "grouplens", FACTS_1M)


LOADERS = {"ml-100k": load_100k, "ml-1m": load_1m}


def _movies_1m(path: Path) -> _Movies:
    file = DelimitedFile(path, ["item", "title", "genres"], "::", "latin-1")
    return file, file.columns["title"], file.columns["genres"].str.split("|").to_list()


def _movies_100k(path: Path) -> _Movies:
    names = ["item", "title", "date", "video_date", "url", *GENRES_100K]
    file = DelimitedFile(path, names, "|", "latin-1")
    for genre in GENRES_100K:
        file.require(file.columns[genre].is_in(["0", "1"]), f"the flag of genre {genre!r} must be 0 or 1")
    flags = (file.columns.select(GENRES_100K) == "1").rows()
    genres = [[genre for genre, is_set in zip(GENRES_100K, row) if is_set] for row in flags]
    return file, file.columns["title"], genres


def _movies_recbole(path: Path) -> _Movies:
    file = DelimitedFile(path, ["item", "title", "year", "genres"], "\t", "utf-8", header=_ITEM_HEADER)
    titles = [
        "" if title == "unkonwn" else f"{title} ({year})"
        for title, year in zip(file.columns["title"], file.columns["year"])
    ]
    return file, titles, file.columns["genres"].str.split(" ").to_list()


_MOVIES = {"u.item": _movies_100k, "ml-100k.item": _movies_recbole, "movies.dat": _movies_1m}


def _raw_data(
    ratings: DelimitedFile,
    movies: DelimitedFile,
    titles: Iterable[str],
    genres: list[list[str]],
    route: str,
    facts: Facts,
) -> RawData:
    interactions = Interactions()
    interactions.add(
        ratings.ids("user").to_list(),
        ratings.ids("item").to_list(),
        ratings.integers("timestamp"),
        ratings.numbers("rating", *STARS),
    )
    return RawData(
        interactions,
        _texts(movies, titles, genres, TEMPLATE),
        (Rejected(ratings.path), Rejected(movies.path)),  # nothing is: a bad line stops the loader
        ratings.lines.len(),
        movies.lines.len(),
        threshold=THRESHOLD,
        min_item_count=MIN_ITEM_COUNT,
        route=route,
        facts=facts,
    )


def _texts(movies: DelimitedFile, titles: Iterable[str], genres: list[list[str]], template: str) -> ItemTexts:
    """Of all movies: the digest of the set covers them."""
    ids = movies.unique_ids("item")
    texts = ItemTexts(ids, Template(template))
    texts.add(ids, {"title": map(_title, titles), "genres": map(_known, genres)})
    return texts


def _title(title: str) -> str:
    """A title without the mark of a video release; "" where there is none."""
    title = title.rstrip().removesuffix("(V)")
    return "" if title.strip() == "unknown" else title


def _known(genres: list[str]) -> str:
    return ", ".join(genre for genre in genres if genre not in ("", "unknown"))


def _folder_of(folder: Path, name: str, *choices: tuple[str, ...]) -> Path:
    """The first of `folder` and `folder/name` that holds all files of one choice."""
    for candidate in (folder, folder / name):
        if any(all((candidate / file).is_file() for file in files) for files in choices):
            return candidate
    wanted = " or ".join(" and ".join(files) for files in choices)
    found = f"no {name} files here" if folder.is_dir() else "no such folder"
    raise DataError(f"{folder}: {found}. The folder must hold {wanted}.")
