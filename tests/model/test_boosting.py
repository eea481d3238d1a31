"""Gradient boosting: what it counts is the plain loop, and nothing that a row may not see changes a bit of its score."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from dti_model.data import Clock, PreparedData, prepare
from dti_model.evaluation import baselines, boosting
from dti_model.evaluation.baselines import baseline_scores, baselines_of_splits
from dti_model.evaluation.boosting import GradientBoosting
from tests.data.movielens_files import some_ratings, write_1m

NAMES = [
    "num_item",
    "num_user",
    "i",
    "u",
    "s",
    "r",
    "residual_5",
    "residual_20",
    *(f"last_{n}" for n in (1, 2, 5, 20)),
]
NAMES += ["R", "S", "both", "categories", "gap", "same", "hour"]


def _prepared(folder: Path, split: str = "global", num_users: int = 60) -> PreparedData:
    """Half an hour between one time and the next; many share theirs."""
    ratings = [(user, item, stars, 1800 * time) for user, item, stars, time in some_ratings(num_users)]
    prepare(
        "ml-1m", folder / "out", write_1m(folder / "raw", ratings), subset=True, min_context=1, split=split
    )
    return PreparedData.open(folder / "out")


def _mean(values: list[float]) -> float:
    return float(np.mean(values)) if values else 0.0


def _plain(data: PreparedData, g: float) -> list[dict[str, float]]:
    """The features of all rows, by loops."""
    label, item, time, user = data.label, data.item, data.timestamp, data.users_of(np.arange(data.label.size))
    parts = [{part.strip() for part in text.partition(";")[2].split(",")} - {""} for text in data.item_texts]
    kept = {name for of_item in parts for name in of_item if sum(name in each for each in parts) > 1}
    parts = [of_item & kept for of_item in parts]
    rows: list[dict[str, float]] = [{} for _ in label]
    for row in np.argsort(data.order):
        earlier = [other for other in range(label.size) if data.order[other] < data.order[row]]
        of_item = [other for other in earlier if item[other] == item[row]]
        of_user = [other for other in earlier if user[other] == user[row]]

        def over(others: list[int], value: Callable[[int], float], prior: float = 5.0) -> float:
            return sum(map(value, others)) / (len(others) + prior)

        def clipped(value: float) -> float:
            return min(max(value, 0.0), 1.0)

        f = rows[row]
        f["num_item"], f["num_user"] = len(of_item), len(of_user)
        f["i"] = g + over(of_item, lambda k: label[k] - g)
        f["u"] = g + over(of_user, lambda k: label[k] - g)
        f["s"] = over(of_user, lambda k: label[k] - rows[k]["i"])
        f["r"] = over(of_item, lambda k: label[k] - rows[k]["u"])
        f["R"] = over(of_item, lambda k: label[k] - clipped(g + rows[k]["s"]))
        f["S"] = over(of_user, lambda k: label[k] - clipped(g + rows[k]["r"]))
        f["both"] = g + f["R"] + f["S"]
        for num in (5, 20):
            f[f"residual_{num}"] = _mean([label[k] - rows[k]["i"] for k in of_user[-num:]])
        for num in (1, 2, 5, 20):
            f[f"last_{num}"] = _mean([float(label[k]) for k in of_user[-num:]])
        found = [
            over(
                [k for k in of_user if name in parts[item[k]]],
                lambda k: label[k] - clipped(rows[k]["both"]),
                3.0,
            )
            for name in parts[item[row]]
        ]
        f["categories"] = _mean(found)
        f["gap"] = float(time[row] - time[of_user[-1]]) if of_user else -1.0
        f["same"] = sum(time[k] == time[row] for k in of_user)
        f["hour"] = datetime.fromtimestamp(int(time[row]), UTC).hour
    return rows


def test_features_are_the_plain_loop(tmp_path: Path) -> None:
    data = _prepared(tmp_path, num_users=30)
    rows = np.arange(data.label.size)
    found = GradientBoosting(data)._features(rows, rows)
    expected = _plain(data, float(data.label[data.targets("train")].mean()))
    for column, name in enumerate(NAMES):
        plain = np.array([row[name] for row in expected])
        assert np.unique(plain).size > 1, name
        np.testing.assert_allclose(found[:, column], plain, rtol=0, atol=1e-6, err_msg=name)
    assert found.shape[1] == len(NAMES)


def _fields(data: PreparedData) -> None:
    """Copies that can be written to."""
    for name in ("label", "item", "timestamp"):
        setattr(data, name, getattr(data, name).copy())


@pytest.mark.parametrize("split", ["global", "user"])
@pytest.mark.parametrize("name", ["val", "test"])
def test_a_label_changes_later_scores_only(tmp_path: Path, split: str, name: str) -> None:
    """A split per user has training targets after it: what is fitted may not have counted it."""
    data = _prepared(tmp_path, split)
    rows = np.arange(data.label.size)
    before = GradientBoosting(data).scores(rows)
    turned = data.targets(name)[0]
    _fields(data)
    data.label[turned] ^= 1
    changed = GradientBoosting(data).scores(rows) != before
    assert changed.any()
    assert not changed[data.order <= data.order[turned]].any()


def test_what_comes_later_changes_nothing(tmp_path: Path) -> None:
    """Labels, items and times of all later rows, of the same user and of others."""
    data = _prepared(tmp_path)
    tests = data.targets("test")
    before = baseline_scores(data, "test")[baselines.BOOSTING]
    half = tests.size // 2
    later = data.order > data.order[tests[half]]
    _fields(data)
    data.label[later] ^= 1
    data.item[later] = (data.item[later] + 1) % data.num_items
    data.timestamp[later] += 12_345
    after = baseline_scores(data, "test")[baselines.BOOSTING]
    assert np.array_equal(before[: half + 1], after[: half + 1])
    assert (before[half + 1 :] != after[half + 1 :]).any()


def test_rows_in_any_order_and_none(tmp_path: Path) -> None:
    data = _prepared(tmp_path)
    boosted = GradientBoosting(data)
    rows = data.targets("test")
    assert np.array_equal(boosted.scores(rows[::-1]), boosted.scores(rows)[::-1])
    assert boosted.scores(rows[:0]).shape == (0,)


def test_few_categories_no_hour_and_features_that_are_constant(tmp_path: Path) -> None:
    """Items whose texts have no parts, times without a unit, one moment, and one row a user, who has nothing to count."""
    columns = "user,item,time,liked\n" + "".join(f"{user},{user % 3},5,{user % 2}\n" for user in range(40))
    (tmp_path / "log.csv").write_text(columns)
    (tmp_path / "items.csv").write_text("item,title\n0,One\n1,Two\n2,Three\n")
    from dti_model.data import CustomFiles

    files = CustomFiles(
        tmp_path / "log.csv", tmp_path / "items.csv", text="{title}", label="liked", timestamp="time"
    )
    prepare(files, tmp_path / "out", min_context=0, min_item_count=1)
    data = PreparedData.open(tmp_path / "out")
    scores = baseline_scores(data, "test")[baselines.BOOSTING]
    assert scores.shape == data.targets("test").shape
    assert ((scores > 0) & (scores < 1)).all()


def test_hours_of_units() -> None:
    assert boosting._hour(Clock("seconds", 0, 5)) == 3_600
    assert boosting._hour(Clock("millionths of milliseconds", 0, 5)) == 3_600_000 * 10**6
    assert boosting._hour(Clock("the file's", 1_600_000_000, 1_700_000_000)) == 3_600
    assert boosting._hour(Clock("the file's", 1, 9)) is None


def test_only_the_last_training_targets_are_fitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = _prepared(tmp_path)
    seen: list[int] = []
    fit = boosting.HistGradientBoostingClassifier.fit
    monkeypatch.setattr(
        boosting.HistGradientBoostingClassifier,
        "fit",
        lambda self, features, labels: seen.append(len(labels)) or fit(self, features, labels),
    )
    GradientBoosting(data)
    monkeypatch.setattr(boosting, "MOST_TARGETS", 50)
    GradientBoosting(data)
    assert seen == [data.targets("train").size, 50]


def test_splits_of_one_data_set_are_fitted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A search compares run after run with the same lines."""
    data = _prepared(tmp_path)
    fits: list[Path] = []
    monkeypatch.setattr(
        baselines, "GradientBoosting", lambda data: fits.append(data.path) or GradientBoosting(data)
    )
    rows = {split: data.targets(split) for split in ("test", "val")}
    found = baselines_of_splits(data, rows)
    assert found == {split: baselines.baseline_metrics(data, split) for split in rows}
    assert len(fits) == 3
    found["test"].clear()
    assert baselines_of_splits(PreparedData.open(data.path), rows)["test"].keys() == found["val"].keys()
    assert len(fits) == 3
    some = {"test": rows["test"][1:]}
    assert baselines_of_splits(data, some)["test"]["item_mean"]["targets"] == len(some["test"])
    assert len(fits) == 4
