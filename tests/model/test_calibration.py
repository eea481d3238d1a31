"""Temperature and bias: the fit against scikit-learn's, the order of scores, and what is no calibration; the error that it lessens."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy.special import expit, logit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score

from dti_model.evaluation import click_metrics, fit_calibration, grouped_auc
from dti_model.evaluation.metrics import GROUPS, expected_calibration_error, groups_of
from dti_model.model import TEMPERATURES, Calibration


def scored_targets(size: int, temperature: float, bias: float) -> tuple[np.ndarray, np.ndarray]:
    """Labels, and scores of a model whose log-odds, float32, are off by a temperature and a bias."""
    rng = np.random.default_rng(size)
    odds = rng.normal(0, 1.5, size).astype(np.float32)
    labels = (rng.random(size) < expit(odds.astype(np.float64) / temperature + bias)).astype(np.int64)
    return labels, expit(odds.astype(np.float64))


@pytest.mark.parametrize(("temperature", "bias"), [(2.5, -0.4), (0.4, 0.3), (1.0, 0.0)])
def test_the_fit_is_the_one_of_scikit_learn(temperature: float, bias: float) -> None:
    """A logistic regression of Platt's soft labels on the log-odds, without a penalty."""
    labels, scores = scored_targets(20_000, temperature, bias)
    found = fit_calibration(labels, scores)
    clicks, others = labels.sum(), (1 - labels).sum()
    soft = np.where(labels, (clicks + 1) / (clicks + 2), 1 / (others + 2))
    plain = LogisticRegression(C=np.inf, solver="newton-cholesky", tol=1e-12)
    both = np.repeat([1, 0], len(labels))
    plain.fit(np.tile(logit(scores), 2)[:, None], both, sample_weight=np.concatenate([soft, 1 - soft]))
    assert found.temperature == pytest.approx(1 / plain.coef_[0, 0], rel=1e-6)
    assert found.bias == pytest.approx(plain.intercept_[0], abs=1e-6)
    assert found.temperature == pytest.approx(temperature, rel=0.1)
    assert found.bias == pytest.approx(bias, abs=0.05)
    assert found == fit_calibration(labels, scores)


def test_it_lessens_log_loss_and_ece_on_other_targets() -> None:
    labels, scores = scored_targets(20_000, 2.5, -0.4)
    found = fit_calibration(labels[:10_000], scores[:10_000])
    users = np.zeros(10_000, np.int64)
    before = click_metrics(labels[10_000:], scores[10_000:], users)
    after = click_metrics(labels[10_000:], found(scores[10_000:]), users)
    assert after["log_loss"] < before["log_loss"] - 0.03
    assert after["ece"] < 0.02 < 0.1 < before["ece"]


@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 3.0, 50.0, 100.0])
@pytest.mark.parametrize("bias", [-3.0, 0.0, 3.0])
def test_the_order_of_scores_is_kept(temperature: float, bias: float, kind: type) -> None:
    """AUC and GAUC of the calibrated probabilities themselves, ties among the scores included."""
    labels, scores = scored_targets(5_000, 1.0, 0.0)
    scores[1_000:2_000] = scores[:1_000]
    scores = scores.astype(kind)
    users = np.arange(5_000) // 25
    calibrated = Calibration(temperature, bias)(scores)
    assert calibrated.dtype == np.float64
    assert roc_auc_score(labels, calibrated) == roc_auc_score(labels, scores)
    assert grouped_auc(labels, calibrated, users) == grouped_auc(labels, scores.astype(np.float64), users)
    assert (calibrated[1_000:2_000] == calibrated[:1_000]).all()


def test_metrics_of_order_do_not_see_rounding() -> None:
    """Next to 1 float64 has no room for all that a small temperature tells apart: 30 and 31 nats are one probability then."""
    scores = expit(np.array([-31.0, -30, 0, 30, 31, 32]))
    labels, users = np.array([0, 0, 1, 0, 1, 1]), np.zeros(6, np.int64)
    calibrated = Calibration(0.5)(scores)
    assert len(np.unique(calibrated)) < len(np.unique(scores)) == 6
    assert (np.diff(calibrated) >= 0).all()
    raw = click_metrics(labels, scores, users)
    after = click_metrics(labels, calibrated, users, order=scores)
    assert (after["auc"], after["gauc"]) == (raw["auc"], raw["gauc"])
    assert click_metrics(labels, calibrated, users)["auc"] != raw["auc"], "the case is one"


@pytest.mark.parametrize(
    ("labels", "scores", "expected"),
    [
        ([0, 1], [0.2, 0.8], [1 / 3, 2 / 3]),  # two targets: Platt's labels
        ([0, 0, 1, 1], [0.1, 0.2, 0.8, 0.9], None),  # no mistake
        ([0, 0, 1, 1], [0, 0, 1, 1], [expit(-3.75)] * 2 + [expit(3.75)] * 2),  # 37.5 / 10
        ([1, 0, 1, 0], [0, 0.3, 1, 1], None),
        ([0, 1, 1], [0.7, 0.7, 0.7], [11 / 18] * 3),  # (1/3 + 3/4 + 3/4) / 3
        ([0, 1], [1, 1], [0.5, 0.5]),
        ([0, 1], [0, 0], [0.5, 0.5]),
        ([0, 1, 1], [0.3, 0.3 + 1e-15, 0.3], [11 / 18] * 3),
    ],
)
def test_few_and_strange_targets(
    labels: list[int], scores: list[float], expected: list[float] | None
) -> None:
    found = fit_calibration(labels, scores)
    calibrated = found(scores)
    assert TEMPERATURES[0] <= found.temperature <= TEMPERATURES[1]
    assert math.isfinite(found.bias)
    assert ((calibrated > 0) & (calibrated < 1)).all()
    assert (np.diff(calibrated[np.argsort(scores, kind="stable")]) >= 0).all()
    if expected is not None:
        assert calibrated == pytest.approx(expected, abs=1e-6)


def test_a_model_that_is_worse_than_chance_keeps_its_order() -> None:
    """The best slope would be negative; the largest temperature is all that is left, and probabilities near the base rate."""
    labels, scores = scored_targets(2_000, 1.0, 0.5)
    found = fit_calibration(labels, 1 - scores)
    calibrated = found(1 - scores)
    assert found.temperature == 10
    assert calibrated == pytest.approx(np.full(2_000, labels.mean()), abs=0.15)
    assert roc_auc_score(labels, calibrated) == roc_auc_score(labels, 1 - scores) < 0.5
    assert log_loss(labels, calibrated) < log_loss(labels, 1 - scores)


def test_what_cannot_be_fitted() -> None:
    with pytest.raises(ValueError, match="a calibration needs both labels, got 2 clicks and 0 others"):
        fit_calibration([1, 1], [0.1, 0.2])
    for bad in (math.nan, 1.5, -1e-9):
        with pytest.raises(ValueError, match=r"must lie in \[0, 1\] to be calibrated"):
            fit_calibration([1, 0], [0.1, bad])


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 1.0},
        {"temperature": 0.0, "bias": 0.0},
        {"temperature": -1.0, "bias": 0.0},
        {"temperature": 11, "bias": 0.0},
        {"temperature": "1", "bias": 0.0},
        {"temperature": 1.0, "bias": math.nan},
        {"temperature": True, "bias": 0},
    ],
)
def test_what_is_no_calibration(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="calibration"):
        Calibration.from_dict(fields)


def test_a_calibration_is_read_back() -> None:
    assert Calibration.from_dict({"temperature": 2, "bias": -0.25}) == Calibration(2.0, -0.25)
    assert np.isnan(Calibration(2.0)([math.nan, 0.5])).tolist() == [True, False]


def test_ece_by_hand() -> None:
    """Twenty targets in ten groups of two; every group promises .1 more than it holds, but one, which promises .5 less."""
    clicked = np.array([0, 0, 0, 0, 0, 0, 0, 1, 0, 1, 0, 1, 0, 1, 1, 1, 1, 1, 1, 1])
    share = clicked.reshape(10, 2).mean(1)
    promised = np.repeat(np.array([0.1, 0.11, 0.12, 0.6, 0.61, 0.62, 0.63, 0.7, 0.71, 0.72]), 2)
    by_hand = np.abs(promised[::2] - share).mean()
    order = np.random.default_rng(0).permutation(20)
    assert groups_of(promised).tolist() == np.repeat(range(10), 2).tolist()
    for some in (np.arange(20), order):
        assert expected_calibration_error(clicked[some], promised[some]) == pytest.approx(by_hand)
        metrics = click_metrics(clicked[some], promised[some], np.zeros(20, np.int64))
        assert metrics["ece"] == pytest.approx(by_hand)


def test_ece_of_equal_and_of_few_probabilities() -> None:
    """One probability for all is one group: cut at random, groups would show errors that are chance."""
    clicked = np.random.default_rng(0).integers(0, 2, 1_000)
    assert expected_calibration_error(clicked, np.full(1_000, 0.5)) == pytest.approx(
        abs(clicked.mean() - 0.5)
    )
    assert expected_calibration_error(np.array([1, 0]), np.array([0.9, 0.2])) == pytest.approx(0.15)
    assert expected_calibration_error(np.array([1, 0]), np.array([1.0, 0.0])) == 0


def test_ece_of_perfect_probabilities_is_what_chance_leaves() -> None:
    rng = np.random.default_rng(0)
    p = rng.uniform(0.05, 0.95, (20, 10_000))
    found = [expected_calibration_error(rng.random(10_000) < each, each) for each in p]
    chance = math.sqrt(2 * GROUPS * (p * (1 - p)).mean() / (math.pi * 10_000))
    assert np.mean(found) == pytest.approx(chance, rel=0.15)
