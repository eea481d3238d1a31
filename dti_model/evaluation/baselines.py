"""Baselines that every run is compared with. The first four use no text; gradient boosting counts parts of it as categories.

Labels of training targets make the item means; a user's mean runs over all *earlier* interactions of that
user, whatever split they fall in, which is what the model sees too. Labels of validation and test targets
are fitted nowhere. With g the base rate of the training targets, P and N the clicks and targets of the item
among the training targets, p and n the clicks and interactions of the user before the target:

    item_mean            i = (P + 20 g) / (N + 20)
    item_user_mean       logit = logit(i) + logit(u) - logit(g),   u = (p + 5 g) / (n + 5)
    logistic_regression  one-hot user, one-hot item and logit(u), ridge, C of {.03, .1, .3} by validation AUC
    item_user_residual   i_a + sum of the user's earlier (label - i_a) / (n + b), i_a as i with a instead of 20;
                         a of {1, 2, 5, 10, 20} and b of {5, 10, 20} by validation log loss
    gradient_boosting    trees over counts, means and residuals of item, user and category: boosting.py

The first three, with the constants above, are this project's published baselines. The fourth weighs a click
by its surprise: a user who liked what everybody likes has told less than one who liked what nobody does. Its
AUC is the highest of the four on ML-100K (both splits) and on half of ML-1M. The fifth is the strongest: it also
knows items as they were at the time of the target, which the item means above do not, and the user's last clicks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from copy import deepcopy
from functools import cached_property
from itertools import product

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_matrix, hstack
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score

from dti_model.data import DataError, PreparedData
from dti_model.evaluation.boosting import GradientBoosting
from dti_model.evaluation.metrics import click_metrics

ITEM_PRIOR, USER_PRIOR = 20.0, 5.0
# Ends where the published baseline was found. ML-100K per user would take C = 1: AUC .7933, log loss .5513 for .7884, .5581.
RIDGE_GRID = (0.03, 0.1, 0.3)
BOOSTING = "gradient_boosting"
RESIDUAL_GRID = tuple(product((1.0, 2.0, 5.0, 10.0, 20.0), (5.0, 10.0, 20.0)))
# A sum of means can leave (0, 1); a probability of 0 or 1 would cost an infinite log loss.
SMALLEST_PROBABILITY = 0.01

Rows = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Metrics = dict[str, dict[str, float]]  # by baseline

_last: dict[str, dict[str, Metrics]] = {}  # what `baselines_of_splits` found last, by what it was asked


def baseline_scores(data: PreparedData, split: str) -> dict[str, Floats]:
    """Click probabilities of every baseline (see the module docstring).

    Args:
        data: prepared data.
        split: "val" or "test". ("train" gives fitted values: the item means then know the labels they score.)

    Returns:
        From the name of the baseline to (S,) float64, aligned with `data.targets(split)`.

    Raises:
        DataError: no such split, or the training targets have only one class.
    """
    rows = data.targets(split)
    return _Baselines(data).scores(rows)


def baseline_metrics(data: PreparedData, split: str, rows: Rows | None = None) -> Metrics:
    """`click_metrics` of every baseline on one split, or on some of its targets.

    Args:
        data: prepared data.
        split: as for `baseline_scores`; baselines are fitted to all of validation, whatever the rows.
        rows: targets of the split to measure on; None: all.

    Raises:
        DataError: as `baseline_scores`, or the targets have only one class.
    """
    targets = data.targets(split)
    return _Baselines(data).metrics(targets if rows is None else targets[np.isin(targets, rows)])


def baselines_of_splits(data: PreparedData, rows: Mapping[str, Rows]) -> dict[str, Metrics]:
    """`baseline_metrics` of several splits, from one fit; asked the same again, as a search does run after run, it computes nothing.

    Args:
        data: prepared data, as its folder has them.
        rows: targets to measure on, by split.

    Raises:
        DataError: as `baseline_metrics`.
    """
    digest = hashlib.sha256(data.fingerprint.encode())
    for split, targets in rows.items():
        digest.update(f"{split} {len(targets)}".encode() + targets.tobytes())
    asked = digest.hexdigest()
    if asked not in _last:
        baselines = _Baselines(data)
        found = {split: baselines.metrics(targets) for split, targets in rows.items()}
        _last.clear()
        _last[asked] = found
    return deepcopy(_last[asked])


def item_user_auc(data: PreparedData, rows: Rows) -> float:
    """AUC of item_user_mean alone, which takes no fit, on some targets.

    Raises:
        DataError: as `baseline_metrics`.
    """
    scores = _Baselines(data).item_user_mean()[rows]
    return click_metrics(data.label[rows], scores, data.users_of(rows))["auc"]


class _Baselines:
    """The baselines over all I interaction rows of a data set; arrays are (I,) unless said otherwise."""

    def __init__(self, data: PreparedData) -> None:
        self.data = data
        self.train, self.val = data.targets("train"), data.targets("val")
        self.label: Floats = data.label.astype(np.float64)
        if np.unique(data.label[self.train]).size < 2:
            raise DataError(
                f"{data.path}: the {self.train.size:,} training targets do not have both classes. Check the "
                "threshold (--threshold) and the split."
            )
        lengths = np.diff(data.history_offsets)
        self._first = np.repeat(data.history_offsets[:-1], lengths)  # first row of the row's user
        self.num_earlier = np.arange(self.label.size) - self._first
        self.user = np.repeat(np.arange(data.num_users), lengths)
        self.base_rate = float(self.label[self.train].mean())
        self._item_clicks = self._sum_by_item(self.label[self.train])
        self._item_targets = self._sum_by_item(np.ones(self.train.size))

    def metrics(self, rows: Rows) -> Metrics:
        """`click_metrics` of every baseline on the targets `rows`."""
        labels, users = self.data.label[rows], self.data.users_of(rows)
        return {name: click_metrics(labels, scores, users) for name, scores in self.scores(rows).items()}

    def scores(self, rows: Rows) -> dict[str, Floats]:
        """(S,) probabilities of the targets `rows` by every baseline."""
        return {
            "item_mean": self.item_mean(ITEM_PRIOR)[rows],
            "item_user_mean": self.item_user_mean()[rows],
            "logistic_regression": self.logistic_regression(rows),
            "item_user_residual": self.item_user_residual[rows],
            BOOSTING: self.boosting.scores(rows),
        }

    @cached_property
    def boosting(self) -> GradientBoosting:
        return GradientBoosting(self.data)

    def item_mean(self, prior: float) -> Floats:
        means = (self._item_clicks + prior * self.base_rate) / (self._item_targets + prior)
        return np.asarray(means[self.data.item])

    def user_mean(self, to_fit: bool = False) -> Floats:
        """The user's mean so far; `to_fit`: without validation and test targets, which a split by column may put before training ones."""
        counted = np.ones(self.label.size)
        if to_fit:
            counted[np.concatenate([self.val, self.data.targets("test")])] = 0
        earlier, number = self._sum_earlier(self.label * counted), self._sum_earlier(counted)
        return (earlier + USER_PRIOR * self.base_rate) / (number + USER_PRIOR)

    def item_user_mean(self) -> Floats:
        sum_of_logits = _logit(self.item_mean(ITEM_PRIOR)) + _logit(self.user_mean())
        return np.asarray(1 / (1 + np.exp(_logit(np.array(self.base_rate)) - sum_of_logits)))

    @cached_property
    def item_user_residual(self) -> Floats:
        def scores(item_prior: float, user_prior: float) -> Floats:
            item = self.item_mean(item_prior)
            # Two sums, not a sum of differences: sums of labels are exact, so no label reaches another user's
            # score, not even through rounding.
            surplus = self._sum_earlier(self.label) - self._sum_earlier(item)
            shrunk = surplus / (self.num_earlier + user_prior)
            return np.clip(item + shrunk, SMALLEST_PROBABILITY, 1 - SMALLEST_PROBABILITY)

        found = [scores(*priors) for priors in RESIDUAL_GRID]
        if self.val.size == 0:
            return found[RESIDUAL_GRID.index((5.0, 10.0))]  # nothing to choose by: the middle of the grid
        return min(found, key=lambda p: log_loss(self.label[self.val], p[self.val], labels=[0, 1]))

    def logistic_regression(self, rows: Rows) -> Floats:
        """(S,) probabilities of the targets `rows`."""
        return np.asarray(self._ridge.predict_proba(self._one_hot_and_mean(False)[rows])[:, 1])

    @cached_property
    def _ridge(self) -> LogisticRegression:
        features, to_fit = self._one_hot_and_mean(False), self._one_hot_and_mean(True)[self.train]
        can_choose = np.unique(self.label[self.val]).size == 2
        best_auc, best = -1.0, LogisticRegression()
        # Without two classes in validation there is nothing to choose by: the weakest ridge.
        for ridge in RIDGE_GRID if can_choose else RIDGE_GRID[-1:]:
            model = LogisticRegression(C=ridge, max_iter=1000)
            model.fit(to_fit, self.label[self.train])
            auc = 0.0
            if can_choose:
                val_scores = model.predict_proba(features[self.val])[:, 1]
                auc = float(roc_auc_score(self.label[self.val], val_scores))
            if auc > best_auc:
                best_auc, best = auc, model
        return best

    def _one_hot_and_mean(self, to_fit: bool) -> csr_matrix:
        """(I, U + N + 1): user, item, and the logit of the user's mean so far."""
        index, one = np.arange(self.label.size), np.ones(self.label.size)
        user = csr_matrix((one, (index, self.user)), shape=(index.size, self.data.num_users))
        item = csr_matrix((one, (index, self.data.item)), shape=(index.size, self.data.num_items))
        mean = csr_matrix(_logit(self.user_mean(to_fit))[:, None])
        return csr_matrix(hstack([user, item, mean]))

    def _sum_by_item(self, values: Floats) -> Floats:
        """(N,) sum over the training targets of each item."""
        items = self.data.item[self.train]
        return np.bincount(items, weights=values, minlength=self.data.num_items).astype(np.float64)

    def _sum_earlier(self, values: Floats) -> Floats:
        """Sum over the earlier rows of the same user."""
        before = np.concatenate([np.zeros(1), np.cumsum(values)])[:-1]
        return np.asarray(before - before[self._first])


def _logit(probability: Floats) -> Floats:
    return np.asarray(np.log(probability) - np.log1p(-probability))
