"""Raw files to a prepared folder: formats, order, labels, splits, statistics, and every way it can go wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dti_model.data import CONTEXT, TEST, TRAIN, VAL, DataError, PreparedData, build, prepare
from dti_model.data.sources.movielens import load_100k
from tests.data.movielens_files import MOVIES, some_ratings, write_1m, write_100k, write_recbole

WRITERS = {
    "grouplens": (write_100k, "ml-100k"),
    "recbole": (write_recbole, "ml-100k"),
    "1m": (write_1m, "ml-1m"),
}


@pytest.mark.parametrize("layout", WRITERS)
def test_every_format_gives_the_same_data(tmp_path: Path, layout: str) -> None:
    write, source = WRITERS[layout]
    ratings = some_ratings()
    stats = prepare(source, tmp_path / "out", write(tmp_path / "raw", ratings), subset=True)
    data = PreparedData.open(tmp_path / "out")
    assert (stats["users"], stats["items"], stats["interactions"]) == (12, 8, 96)
    assert (stats["missing_titles"], stats["duplicate_pairs"], stats["items_listed"]) == (1, 0, 8)
    assert stats["base_rate"] == pytest.approx(np.mean([rating > 3 for _, _, rating, _ in ratings]))
    assert data.item_ids == ["1", "2", "3", "9", "10", "11", "100", "101"]
    assert data.item_texts == [movie.text or "Unknown title" for movie in MOVIES]
    assert data.user_ids == [str(user) for user in range(1, 13)]


def test_both_sources_of_ml_100k_give_the_same_bytes(tmp_path: Path) -> None:
    ratings = some_ratings()
    prepare("ml-100k", tmp_path / "a", write_100k(tmp_path / "grouplens", ratings), subset=True)
    prepare("ml-100k", tmp_path / "b", write_recbole(tmp_path / "recbole", ratings[::-1]), subset=True)
    names = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    for name in names:
        if name.name != "stats.json":
            assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    first, second = (PreparedData.open(tmp_path / folder).stats for folder in "ab")
    assert first.pop("source")["digest"] == second.pop("source")["digest"]
    assert first == second


def test_rows_are_in_user_time_item_order(tmp_path: Path) -> None:
    """Compared with plain Python; ties in time follow the item id as a number (9 before 10), not as text."""
    ratings = some_ratings()
    prepare("ml-100k", tmp_path / "out", write_100k(tmp_path / "raw", ratings), subset=True)
    data = PreparedData.open(tmp_path / "out")
    by_user = sorted(ratings, key=lambda row: (row[0], row[3], row[1]))
    user = np.repeat(np.arange(data.num_users), np.diff(data.history_offsets))
    found = [
        (int(data.user_ids[u]), int(data.item_ids[i]), int(r), int(t))
        for u, i, r, t in zip(user, data.item, data.rating, data.timestamp)
    ]
    assert found == by_user
    assert data.users_of(np.arange(user.size)).tolist() == user.tolist()
    assert data.label.tolist() == [int(rating > 3) for _, _, rating, _ in by_user]
    in_time = sorted(ratings, key=lambda row: (row[3], row[0], row[1]))
    assert [found[row] for row in np.argsort(data.order)] == in_time


@pytest.mark.parametrize("min_context", [0, 5, 7])
def test_global_split(tmp_path: Path, min_context: int) -> None:
    raw = write_1m(tmp_path / "raw", some_ratings())
    stats = prepare("ml-1m", tmp_path / "out", raw, subset=True, min_context=min_context)
    data = PreparedData.open(tmp_path / "out")
    position = np.concatenate([np.arange(length) for length in np.diff(data.history_offsets)])
    assert np.array_equal(data.split == CONTEXT, position < min_context)
    targets = [row for row in np.argsort(data.order) if position[row] >= min_context]
    first, second = len(targets) * 8 // 10, len(targets) * 9 // 10
    assert data.targets("train").tolist() == targets[:first]
    assert data.targets("val").tolist() == targets[first:second]
    assert data.targets("test").tolist() == targets[second:]
    for name in ("train", "val", "test"):
        labels = data.label[data.targets(name)]
        assert stats["splits"][name] == {"targets": labels.size, "base_rate": pytest.approx(labels.mean())}
    assert stats["splits"]["context"]["interactions"] == 12 * min_context


def test_user_split(tmp_path: Path) -> None:
    raw = write_1m(tmp_path / "raw", some_ratings())
    prepare("ml-1m", tmp_path / "out", raw, subset=True, min_context=1, split="user")
    data = PreparedData.open(tmp_path / "out")
    for start in data.history_offsets[
        :-1
    ]:  # 7 targets: floor(5.6) train, up to floor(6.3) val, the rest test
        assert data.split[start : start + 8].tolist() == [CONTEXT] + [TRAIN] * 5 + [VAL] + [TEST]


def test_empty_split_has_no_base_rate(tmp_path: Path) -> None:
    raw = write_1m(tmp_path / "raw", some_ratings())
    stats = prepare("ml-1m", tmp_path / "out", raw, subset=True, min_context=8)
    assert stats["splits"]["test"] == {"targets": 0, "base_rate": None}
    assert PreparedData.open(tmp_path / "out").targets("test").size == 0


def test_threshold_pruning_and_duplicates(tmp_path: Path) -> None:
    """A repeated pair is kept and counted; of equal times the first in the file comes first, whatever the rating."""
    ratings = [(1, 1, 5, 7), (1, 1, 2, 7), (1, 2, 4, 1), (2, 1, 3, 9), (2, 9, 1, 9)]
    raw = write_100k(tmp_path / "raw", ratings)
    stats = prepare(
        "ml-100k", tmp_path / "out", raw, subset=True, threshold=2, min_item_count=2, min_context=0
    )
    data = PreparedData.open(tmp_path / "out")
    assert (stats["duplicate_pairs"], stats["interactions_pruned"], stats["threshold"]) == (1, 2, 2)
    assert data.item_ids == ["1"]
    assert data.rating.tolist() == [5, 2, 3]
    assert data.label.tolist() == [1, 0, 1]


def test_rated_movie_that_is_not_listed_has_no_title(tmp_path: Path) -> None:
    raw = write_1m(tmp_path / "raw", [*some_ratings(), (1, 7, 3, 1)])
    stats = prepare("ml-1m", tmp_path / "out", raw, subset=True)
    data = PreparedData.open(tmp_path / "out")
    assert stats["missing_titles"] == 2
    assert data.item_texts[data.item_ids.index("7")] == "Unknown title"


BROKEN_LINES = {
    "a field too few": (3, b"1\t2\t3", "a line must have 4 fields"),
    "a field too many": (5, b"1\t2\t3\t4\t5", "a line must have 4 fields"),
    "a blank line": (2, b"", "a line must have 4 fields"),
    "letters for a time": (4, b"1\t2\t3\tyesterday", "timestamp must be an integer"),
    "a rating of 6": (96, b"1\t2\t6\t881250949", "rating must be a number from 1 to 5"),
    "a rating that is no number": (7, b"1\t2\tnan\t881250949", "rating must be a number from 1 to 5"),
    "an empty user": (1, b"\t2\t3\t881250949", "user must be an integer"),
}


@pytest.mark.parametrize("case", BROKEN_LINES)
@pytest.mark.parametrize("layout", ["grouplens", "recbole", "1m"])
def test_malformed_line_is_reported_with_file_and_line(tmp_path: Path, case: str, layout: str) -> None:
    number, broken, problem = BROKEN_LINES[case]
    write, source = WRITERS[layout]
    raw = write(tmp_path / "raw", some_ratings())
    name = {"grouplens": "u.data", "recbole": "ml-100k.inter", "1m": "ratings.dat"}[layout]
    lines = (raw / name).read_bytes().split(b"\n")
    number += layout == "recbole"  # it has a header
    lines[number - 1] = broken.replace(b"\t", b"::") if layout == "1m" else broken
    (raw / name).write_bytes(b"\n".join(lines))
    with pytest.raises(DataError, match=rf"{name}:{number}: {problem}"):
        prepare(source, tmp_path / "out", raw, subset=True)
    assert not (tmp_path / "out").exists()


BROKEN_MOVIES = {
    "a genre flag of 2": (
        "u.item",
        4,
        b"9|Land (1995)|||" + b"|2" * 19,
        "the flag of genre 'unknown' must be 0 or 1",
    ),
    "an id twice": ("u.item", 2, b"1|Again (1995)|||" + b"|0" * 19, "item must not repeat"),
    "no id": ("u.item", 2, b"|Again (1995)|||" + b"|0" * 19, "item must be an integer of at least 1"),
    "no genres": ("u.item", 8, b"9|Land (1995)", "must have 24 fields"),
}


@pytest.mark.parametrize("case", BROKEN_MOVIES)
def test_malformed_movie_is_reported_with_file_and_line(tmp_path: Path, case: str) -> None:
    name, number, broken, problem = BROKEN_MOVIES[case]
    raw = write_100k(tmp_path / "raw", some_ratings())
    lines = (raw / name).read_bytes().split(b"\n")
    lines[number - 1] = broken
    (raw / name).write_bytes(b"\n".join(lines))
    with pytest.raises(DataError, match=rf"{name}:{number}: .*{problem}"):
        prepare("ml-100k", tmp_path / "out", raw, subset=True)


def test_cut_and_empty_and_wrongly_encoded_files(tmp_path: Path) -> None:
    raw = write_recbole(tmp_path / "raw", some_ratings())
    whole = (raw / "ml-100k.inter").read_bytes()
    cases = {
        rb"ml-100k\.inter:97: .*cut short": whole[:-3],
        rb"ml-100k\.inter:1: the file is empty": b"",
        rb"ml-100k\.inter:1: the first line must be": whole.split(b"\n", 1)[1],
        rb"ml-100k\.inter:3: not valid utf-8": whole.replace(whole.split(b"\n")[2], b"1\t2\t\xe9\t4"),
    }
    for message, content in cases.items():
        (raw / "ml-100k.inter").write_bytes(content)
        with pytest.raises(DataError, match=message.decode()):
            prepare("ml-100k", tmp_path / "out", raw, subset=True)


def test_windows_line_ends_are_read(tmp_path: Path) -> None:
    raw = write_100k(tmp_path / "raw", some_ratings())
    before = prepare("ml-100k", tmp_path / "a", raw, subset=True)
    for name in ("u.data", "u.item"):
        (raw / name).write_bytes((raw / name).read_bytes().replace(b"\n", b"\r\n"))
    after = prepare("ml-100k", tmp_path / "b", raw, subset=True)
    assert before["source"]["digest"] == after["source"]["digest"]


@pytest.mark.parametrize(("layout", "line"), [("grouplens", 96), ("recbole", 97), ("1m", 96)])
def test_wrong_count_is_an_error_unless_a_subset_is_asked_for(tmp_path: Path, layout: str, line: int) -> None:
    write, source = WRITERS[layout]
    raw = write(tmp_path / "raw", some_ratings())
    with pytest.raises(DataError, match=rf":{line}: 96 interactions .* the full set has 1,?0?00,.*--subset"):
        prepare(source, tmp_path / "out", raw)


def test_right_counts_with_other_content_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = write_100k(tmp_path / "raw", some_ratings())
    digest, facts = load_100k(raw).digest(), load_100k(raw).facts
    assert facts is not None
    for wanted, fails in ((digest, False), ("0" * 64, True)):
        small = type(facts)(interactions=96, users=12, items_rated=8, items_listed=8, digest=wanted)
        monkeypatch.setattr("dti_model.data.sources.movielens.FACTS_100K", small)
        if fails:
            with pytest.raises(DataError, match="all counts agree, but the content is not"):
                prepare("ml-100k", tmp_path / "out", raw)
        else:
            prepare("ml-100k", tmp_path / "out", raw)


def test_missing_files_name_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"u\.data and u\.item or ml-100k\.inter and ml-100k\.item"):
        prepare("ml-100k", tmp_path / "out", tmp_path)
    write_1m(
        tmp_path / "ml-1m", some_ratings()
    )  # the folder that the archive unpacks into is found by itself
    prepare("ml-1m", tmp_path / "out", tmp_path, subset=True)


def test_impossible_arguments(tmp_path: Path) -> None:
    raw = write_1m(tmp_path / "raw", some_ratings())
    with pytest.raises(
        DataError, match="source must be one of ml-100k, ml-1m, amazon-cds, .*, but is 'ml-2m'"
    ):
        prepare("ml-2m", tmp_path / "out", raw)
    with pytest.raises(ValueError, match="split must be one of global, user"):
        prepare("ml-1m", tmp_path / "out", raw, split="random")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="min_context must be at least 0"):
        prepare("ml-1m", tmp_path / "out", raw, min_context=-1)
    with pytest.raises(ValueError, match="min_item_count must be at least 1"):
        prepare("ml-1m", tmp_path / "out", raw, min_item_count=0)
    with pytest.raises(ValueError, match="vocab_size must be at least 260"):
        prepare("ml-1m", tmp_path / "out", raw, subset=True, vocab_size=100)
    with pytest.raises(DataError, match="no interaction is left"):
        prepare("ml-1m", tmp_path / "out", raw, subset=True, min_item_count=1000)


def test_interrupted_prepare_leaves_nothing_and_keeps_an_older_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = write_1m(tmp_path / "raw", some_ratings())
    prepare("ml-1m", tmp_path / "out", raw, subset=True)
    monkeypatch.setattr(build, "save_tokenizer", _interrupt)
    for name in ("new", "out"):
        with pytest.raises(KeyboardInterrupt):
            prepare("ml-1m", tmp_path / name, raw, subset=True, threshold=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "raw"]
    assert PreparedData.open(tmp_path / "out").stats["threshold"] == 3


def test_folder_that_cannot_be_made_is_a_data_error(tmp_path: Path) -> None:
    raw = write_1m(tmp_path / "raw", some_ratings())
    with pytest.raises(DataError, match="cannot be written"):
        prepare("ml-1m", raw / "movies.dat" / "out", raw, subset=True)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
