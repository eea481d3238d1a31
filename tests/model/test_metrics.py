"""Metrics against scikit-learn and against figures worked out by hand."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from sklearn.metrics import f1_score, log_loss, roc_auc_score

from dti_model.data import DataError
from dti_model.evaluation.metrics import click_metrics, grouped_auc


def _gauc_by_loop(labels: np.ndarray, scores: np.ndarray, users: np.ndarray) -> tuple[float, float]:
    total, covered = 0.0, 0
    for user in np.unique(users):
        mine = users == user
        if np.unique(labels[mine]).size == 2:
            total += roc_auc_score(labels[mine], scores[mine]) * mine.sum()
            covered += int(mine.sum())
    return total / covered, covered / labels.size


@pytest.mark.parametrize("num_scores", [2, 10, 10_000], ids=["many ties", "some ties", "few ties"])
def test_gauc_is_the_loop_over_users(num_scores: int) -> None:
    rng = np.random.default_rng(num_scores)
    users = (
        rng.zipf(1.5, 3_000) % 200 * 7 - 100
    )  # from one target to hundreds a user; negative and missing numbers
    labels = rng.integers(0, 2, users.size)
    scores = rng.integers(0, num_scores, users.size) / num_scores
    assert grouped_auc(labels, scores, users) == pytest.approx(
        _gauc_by_loop(labels, scores, users), abs=1e-12
    )


def test_worked_example() -> None:
    metrics = click_metrics([1, 0, 1, 1, 0, 1], [0.9, 0.2, 0.6, 0.4, 0.4, 0.7], [7, 7, 7, 3, 3, 5])
    assert metrics["auc"] == pytest.approx(7.5 / 8)
    assert metrics["f1"] == pytest.approx(6 / 7)  # 3 of 4 clicks found, no false one
    assert metrics["f1_always_yes"] == pytest.approx(0.8)
    assert metrics["gauc"] == pytest.approx((3 * 1.0 + 2 * 0.5) / 5)
    assert metrics["gauc_coverage"] == pytest.approx(5 / 6)
    assert metrics["base_rate"] == pytest.approx(4 / 6)
    assert metrics["mean_prediction"] == pytest.approx(3.2 / 6)
    assert metrics["targets"] == 6


def test_against_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    labels, probabilities = rng.integers(0, 2, 500), rng.random(500, dtype=np.float32)
    metrics = click_metrics(labels.astype(np.int8), probabilities, np.arange(500) // 10)
    assert metrics["auc"] == pytest.approx(roc_auc_score(labels, probabilities))
    assert metrics["log_loss"] == pytest.approx(log_loss(labels, probabilities.astype(np.float64)))
    assert metrics["f1"] == pytest.approx(f1_score(labels, probabilities >= 0.5))
    assert metrics["f1_always_yes"] == pytest.approx(f1_score(labels, np.ones(500)))


def test_no_user_with_both_classes_has_no_gauc() -> None:
    metrics = click_metrics([1, 0], [0.5, 0.5], [1, 2])
    assert math.isnan(metrics["gauc"])
    assert metrics["gauc_coverage"] == 0


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_is_refused(label: int) -> None:
    with pytest.raises(DataError, match=f"all 3 labels are {label}: AUC needs both classes"):
        click_metrics([label] * 3, [0.1, 0.2, 0.3], [1, 1, 1])


def test_bad_input_is_refused() -> None:
    with pytest.raises(DataError, match="no targets"):
        click_metrics([], [], [])
    with pytest.raises(ValueError, match="of one length"):
        click_metrics([0, 1], [0.5], [1, 1])
    with pytest.raises(ValueError, match="labels must be 0 or 1, but one is 2"):
        click_metrics([0, 2], [0.5, 0.5], [1, 1])
    for bad in (float("nan"), 1.1, -0.1):
        with pytest.raises(ValueError, match=r"probabilities\[1\] is"):
            click_metrics([0, 1], [0.5, bad], [1, 1])


def test_a_hundred_thousand_targets_take_no_time() -> None:
    rng = np.random.default_rng(0)
    labels, scores, users = rng.integers(0, 2, 100_000), rng.random(100_000), rng.integers(0, 6_000, 100_000)
    start = time.perf_counter()
    grouped_auc(labels, scores, users)
    assert time.perf_counter() - start < 2  # takes about 0.03 s; a loop over users takes 10 s
