"""The lines a run is compared with: worked by a plain loop, and blind to every label they may not see."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from dti_model.data import DataError, PreparedData, prepare
from dti_model.evaluation.baselines import baseline_metrics, baseline_scores
from tests.data.movielens_files import Rating, some_ratings, write_1m

LINES = ["item_mean", "item_user_mean", "logistic_regression", "item_user_residual", "gradient_boosting"]


def _prepared(tmp_path: Path, ratings: list[Rating], **options: float) -> PreparedData:
    raw = write_1m(tmp_path / "raw", ratings)
    prepare("ml-1m", tmp_path / "out", raw, subset=True, min_context=1, **options)  # type: ignore[arg-type]
    return PreparedData.open(tmp_path / "out")


def test_means_are_the_plain_loop(tmp_path: Path) -> None:
    data = _prepared(tmp_path, some_ratings(40))
    scores = baseline_scores(data, "test")
    train = data.targets("train")
    g = data.label[train].mean()
    for position, row in enumerate(data.targets("test")):
        of_item = [data.label[t] for t in train if data.item[t] == data.item[row]]
        start = data.history_offsets[data.users_of(np.array([row]))[0]]
        earlier = data.label[start:row].tolist()
        item = (sum(of_item) + 20 * g) / (len(of_item) + 20)
        user = (sum(earlier) + 5 * g) / (len(earlier) + 5)
        logit = sum(sign * math.log(p / (1 - p)) for sign, p in ((1, item), (1, user), (-1, g)))
        assert scores["item_mean"][position] == pytest.approx(item)
        assert scores["item_user_mean"][position] == pytest.approx(1 / (1 + math.exp(-logit)))


def test_lines_are_aligned_with_the_targets(tmp_path: Path) -> None:
    data = _prepared(tmp_path, some_ratings(40))
    for split in ("train", "val", "test"):
        scores = baseline_scores(data, split)
        assert list(scores) == LINES
        for probabilities in scores.values():
            assert probabilities.shape == data.targets(split).shape
            assert ((probabilities > 0) & (probabilities < 1)).all()
    assert list(baseline_metrics(data, "test")) == LINES
    assert baseline_metrics(data, "test")["item_mean"]["targets"] == data.targets("test").size


def test_no_line_sees_a_label_it_may_not(tmp_path: Path) -> None:
    """Turn the label of one test target: only later targets of its user may change, and of its item where that is counted too."""
    data = _prepared(tmp_path, some_ratings(40))
    rows = data.targets("test")
    before = baseline_scores(data, "test")
    users = data.users_of(rows)
    turned = next(row for row, user in zip(rows, users) if (rows[users == user] > row).any())
    data.label = data.label.copy()
    data.label[turned] ^= 1
    after = baseline_scores(data, "test")
    user = data.users_of(np.array([turned]))[0]
    of_user = (users == user) & (rows > turned)
    later = data.order[rows] > data.order[turned]
    for name in LINES:
        changed = before[name] != after[name]
        assert not (changed & ~(later if name == "gradient_boosting" else of_user)).any(), name
        assert changed.any() == (name != "item_mean"), name


def test_validation_labels_are_chosen_by_but_not_fitted(tmp_path: Path) -> None:
    """With every validation label turned, item means of the test targets are bitwise what they were."""
    data = _prepared(tmp_path, some_ratings(40))
    before = baseline_scores(data, "test")["item_mean"]
    data.label = data.label.copy()
    data.label[data.targets("val")] ^= 1
    assert np.array_equal(before, baseline_scores(data, "test")["item_mean"])


def test_without_validation_the_lines_exist(tmp_path: Path) -> None:
    """Four targets: three train, none validation, one test."""
    ratings = [(user, item, 2 + 3 * (item % 2), 10 * user + item) for user in (1, 2) for item in (1, 2, 9)]
    data = _prepared(tmp_path, ratings)
    assert [data.targets(name).size for name in ("train", "val", "test")] == [3, 0, 1]
    assert all(scores.shape == (1,) for scores in baseline_scores(data, "test").values())


def test_one_class_is_refused(tmp_path: Path) -> None:
    """The last user, whose targets are test, clicks nothing; the others click everything."""
    data = _prepared(
        tmp_path, [(user, item, 3 + 2 * (user < 12), time) for user, item, _, time in some_ratings()]
    )
    with pytest.raises(DataError, match="training targets do not have both classes"):
        baseline_scores(data, "test")
    with pytest.raises(DataError, match="split must be one of"):
        baseline_scores(data, "dev")


def test_a_split_by_column_fits_no_label_of_a_test_target(tmp_path: Path) -> None:
    """Users' means of training targets behind a test target held its label, which logistic regression learnt."""
    data = _prepared(tmp_path, some_ratings(40))
    rng = np.random.default_rng(0)
    data.split = np.where(data.split == 0, 0, rng.integers(1, 4, len(data.split))).astype(np.int8)
    before, rows, label = baseline_scores(data, "test"), data.targets("test"), data.label
    for place in (3, 20, len(rows) - 1):
        data.label = label.copy()
        data.label[rows[place]] = 1 - label[rows[place]]
        after = baseline_scores(data, "test")
        assert [name for name in LINES if after[name][place] != before[name][place]] == []
