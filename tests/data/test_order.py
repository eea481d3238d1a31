"""The order of rows: (time, user, item, place in the file), whatever the label, by every loader."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dti_model.data import AmazonFiles, CustomFiles, PreparedData, prepare
from dti_model.data.sources import rows
from tests.data.log_files import small_log, write_amazon, write_custom
from tests.data.movielens_files import MOVIES, Rating, write_1m, write_100k, write_recbole

ITEMS = [movie.item for movie in MOVIES]


def tied_ratings(num_users: int, seed: int) -> list[Rating]:
    """Every user rates items again and again within few seconds; ratings are drawn independently, lines are shuffled."""
    rng = np.random.default_rng(seed)
    drawn = [
        (user, int(rng.choice(ITEMS)), int(rng.integers(1, 6)), int(rng.integers(1000, 1003)))
        for user in range(1, num_users + 1)
        for _ in range(60)
    ]
    return [drawn[i] for i in rng.permutation(len(drawn))]


def _custom(ending: str) -> Callable[[Path, list[Rating], Path], None]:
    def prepared(folder: Path, ratings: list[Rating], out: Path) -> None:
        clicks, items = write_custom(folder, ending, ratings)
        if ending != ".parquet":
            # Quoted lines are split by another parser than plain ones.
            lines = clicks.read_text().splitlines()
            lines[1::3] = [f'"{line.replace(",", chr(34) + "," + chr(34))}"' for line in lines[1::3]]
            clicks.write_text("\n".join(lines) + "\n")
        files = CustomFiles(clicks, items, "{title}", rating="stars", threshold=3)
        prepare(files, out, min_context=0, vocab_size=270)

    return prepared


def _movielens(name: str, write: Callable[[Path, list[Rating]], Path]) -> Callable[..., None]:
    def prepared(folder: Path, ratings: list[Rating], out: Path) -> None:
        prepare(name, out, write(folder, ratings), subset=True, min_context=0, vocab_size=270)

    return prepared


def _amazon(folder: Path, ratings: list[Rating], out: Path) -> None:
    reviews, meta = write_amazon(folder, ratings)
    prepare(
        AmazonFiles(reviews, meta),
        out,
        threshold=3,
        min_context=0,
        min_item_count=1,
        vocab_size=270,
    )


LOADERS = {
    "ml-100k": _movielens("ml-100k", write_100k),
    "recbole": _movielens("ml-100k", write_recbole),
    "ml-1m": _movielens("ml-1m", write_1m),
    "amazon": _amazon,
    "custom, csv": _custom(".csv"),
    "custom, parquet": _custom(".parquet"),
}


@pytest.mark.parametrize("batch_bytes", [1 << 24, 1000])
@pytest.mark.parametrize("loader", LOADERS)
def test_rows_of_one_moment_stay_in_the_order_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loader: str, batch_bytes: int
) -> None:
    """Rows of one user, item and second were sorted by their rating: a click was never followed by none."""
    monkeypatch.setattr(rows, "BATCH_BYTES", batch_bytes)
    ratings = tied_ratings(20, seed=1)
    LOADERS[loader](tmp_path / "raw", ratings, tmp_path / "out")
    data = PreparedData.open(tmp_path / "out")
    # Python's sort is stable: what is equal stays in the order of the file.
    by_user = sorted(ratings, key=lambda row: (row[0], row[3], row[1]))
    user = np.repeat(np.arange(data.num_users), np.diff(data.history_offsets))
    ids = [int(name.removeprefix("A")) for name in data.user_ids]
    found = [
        (ids[u], int(data.item_ids[i]), int(r), int(t))
        for u, i, r, t in zip(user, data.item, data.rating, data.timestamp)
    ]
    assert found == by_user
    assert data.label.tolist() == [int(rating > 3) for _, _, rating, _ in by_user]
    in_time = sorted(ratings, key=lambda row: (row[3], row[0], row[1]))
    assert [found[row] for row in np.argsort(data.order)] == in_time


def test_the_label_of_a_row_says_nothing_of_the_next(tmp_path: Path) -> None:
    """Of labels that are drawn independently, the second of a tied pair is as often a click after a click as after none.

    Sorted by label, it is always a click after a click: a model would learn the order of the file.
    """
    LOADERS["ml-1m"](tmp_path / "raw", tied_ratings(200, seed=2), tmp_path / "out")
    data = PreparedData.open(tmp_path / "out")
    user = data.users_of(np.arange(len(data.item)))
    tied = (user[1:] == user[:-1]) & (data.item[1:] == data.item[:-1])
    tied &= data.timestamp[1:] == data.timestamp[:-1]
    first, second = data.label[:-1][tied], data.label[1:][tied]
    assert len(first) > 5000
    after_click, after_none = second[first == 1].mean(), second[first == 0].mean()
    standard_error = np.sqrt(0.24 / (first == 1).sum() + 0.24 / (first == 0).sum())
    assert abs(after_click - after_none) < 4 * standard_error
    assert abs(after_click - 0.4) < 0.05


def test_ties_of_a_custom_log(tmp_path: Path) -> None:
    """The labels of one user stay as the log has them."""
    log = [("u1", f"i{i // 2}", 1000 + i // 2, label) for i, label in enumerate([1, 0, 1, 0, 0, 1])]
    log += [("u2", "i0", 1000, 1), ("u2", "i0", 1000, 0)]
    lines = ["user,item,timestamp,liked", *(",".join(map(str, row)) for row in log)]
    files = small_log(tmp_path, "\n".join(lines) + "\n", "item,title\ni0,A\ni1,B\ni2,C\n")
    prepare(files, tmp_path / "out", min_context=0)
    data = PreparedData.open(tmp_path / "out")
    assert data.label.tolist() == [1, 0, 1, 0, 0, 1, 1, 0]
    assert data.order.tolist() == [0, 1, 4, 5, 6, 7, 2, 3]
