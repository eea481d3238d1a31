"""Sources: the table of names agrees with the loaders, and a new source needs nothing but to be one."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import polars as pl
import pytest

from dti_model.cli.prepare import prepared_report
from dti_model.data import SOURCES, DataError, PreparedData, named_source, prepare
from dti_model.data.sources import RawData, amazon
from dti_model.data.sources.item_frames import ItemTexts
from dti_model.data.sources.rows import Interactions, Rejected
from dti_model.data.texts import MISSING_TITLE, TEMPLATE, Template, template_text
from tests.data.log_files import write_custom
from tests.data.movielens_files import MOVIES, some_ratings, write_1m, write_100k


def test_the_table_has_the_defaults_of_the_loaders() -> None:
    """The command line shows them without importing a loader."""
    for entry in SOURCES.values():
        module = import_module(f"dti_model.data.sources.{entry.maker.partition('.')[0]}")
        if entry.threshold is not None:
            assert (entry.threshold, entry.min_item_count) == (module.THRESHOLD, module.MIN_ITEM_COUNT)
    assert set(SOURCES) >= {"ml-100k", "ml-1m", "amazon", *amazon.CATEGORIES, "custom"}
    assert (SOURCES["custom"].threshold, SOURCES["custom"].min_item_count) == (None, 1)


def test_a_source_by_its_name_is_the_source(tmp_path: Path) -> None:
    raw = write_1m(tmp_path / "raw", some_ratings())
    by_name = prepare("ml-1m", tmp_path / "a", raw, subset=True)
    made = prepare(named_source("ml-1m", raw_dir=raw, subset=True), tmp_path / "b")
    assert made == by_name
    clicks, items = write_custom(tmp_path)
    own = named_source("custom", interactions=clicks, items=items, text="{title}", label="liked")
    assert prepare(own, tmp_path / "c")["source"]["name"] == "custom"


class Ratings:
    """A source as somebody else might write one: ten users, ratings up to 10, a text of the default template."""

    name, ratings = "mine", (0, 10)

    def load(self) -> RawData:
        interactions = Interactions()
        for user in range(10):
            times, stars = pl.Series([1, 2, 3]), pl.Series([2.0, 7.0, 9.0])
            interactions.add([str(user)] * 3, ["a", "b", "c"], times, stars)
        texts = ItemTexts(interactions.items.names(), Template(TEMPLATE))
        texts.add(["a", "b"], {"title": ["A", ""], "genres": ["War", "Drama, War"]})
        rejected = Rejected(Path(__file__)), Rejected(Path(__file__))
        return RawData(interactions, texts, rejected, 30, 2, threshold=5, min_item_count=1)


def test_a_source_of_one_s_own(tmp_path: Path) -> None:
    stats = prepare(Ratings(), tmp_path / "out", min_context=0, vocab_size=270)
    data = PreparedData.open(tmp_path / "out")
    assert (stats["source"]["name"], stats["base_rate"]) == ("mine", pytest.approx(2 / 3))
    assert data.item_texts == ["A; War", "Unknown title; Drama, War", "Unknown title"]
    assert data.text_rule == {}  # the template of sources that name none
    assert template_text(Template(TEMPLATE), {"genres": ["Drama", "War"]}, 200) == data.item_texts[1]
    for threshold in (-1, 10, float("nan")):
        with pytest.raises(ValueError, match="threshold must be at least 0 and below 10"):
            prepare(Ratings(), tmp_path / "other", threshold=threshold)


@pytest.mark.parametrize(("name", "write"), [("ml-100k", write_100k), ("ml-1m", write_1m)])
def test_texts_of_movies_may_leave_the_title_out(
    name: str, write: Callable[..., Path], tmp_path: Path
) -> None:
    """The template is of the folder: requests give fields by it. A movie without a genre has no text of its own."""
    raw = write(tmp_path, some_ratings())
    prepare(
        named_source(name, raw_dir=raw, subset=True, text="movie; {genres}"), tmp_path / "out", vocab_size=300
    )
    data = PreparedData.open(tmp_path / "out")
    assert data.text_rule == {"text": "movie; {genres}"}
    assert " items without genres, " in prepared_report(data.stats, data.path)
    found = dict(zip(data.item_ids, data.item_texts))
    for movie in MOVIES:
        if str(movie.item) in found:
            genres = ", ".join(genre for genre in movie.genres if genre != "unknown")
            assert found[str(movie.item)] == (f"movie; {genres}" if genres else MISSING_TITLE)
    assert len(found) > 4
    with pytest.raises(DataError, match=r"names tags, but a movie of ml-1.* has the columns title, genres"):
        named_source(name, raw_dir=raw, subset=True, text="{tags}")
    with pytest.raises(ValueError, match="names no column"):
        named_source(name, raw_dir=raw, subset=True, text="movie")
