"""Metrics of a click model over one set of targets.

    AUC       chance that a clicked target scores above one that was not, ties count one half
    log loss  mean of -ln(probability of what happened)
    ECE       expected calibration error: |mean probability - clicked share| in each of ten groups of equal size by probability, its mean
              over the targets (Guo et al., On Calibration of Modern Neural Networks, 2017, whose groups have equal width)
    F1        at probability .5, beside the F1 of always answering yes, 2 b / (1 + b) at base rate b
    GAUC      AUC within each user, weighted by the user's targets; users with one class have none and are left out

Gather the scores of all ranks first: a mean of per-rank AUCs is another number. Cost: two sorts, O(S log S).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.metrics import f1_score, log_loss, roc_auc_score

from dti_model.data import DataError

GROUPS = 10  # of ECE and of the plot of calibration


def click_metrics(
    labels: npt.ArrayLike,
    probabilities: npt.ArrayLike,
    users: npt.ArrayLike,
    order: npt.ArrayLike | None = None,
) -> dict[str, float]:
    """All metrics of one set of targets.

    Args:
        labels: (S,) 0 or 1, any integer or boolean dtype.
        probabilities: (S,) probability of a click, in [0, 1].
        users: (S,) integers, the user of each target.
        order: (S,) scores that AUC and GAUC are of, such as those before calibration, which keeps their order; None: the probabilities.

    Returns:
        auc, log_loss, ece, f1, f1_always_yes, gauc, gauc_coverage (share of targets whose user has both classes),
        base_rate, mean_prediction, targets. gauc is NaN where no user has both classes (coverage 0).

    Raises:
        DataError: no targets, or all labels are equal, so that AUC does not exist.
        ValueError: shapes differ, a label is not 0 or 1, or a probability is not a number in [0, 1].
    """
    label_S, prob_S, user_S = _checked(labels, probabilities, users)
    base_rate = float(label_S.mean())
    if base_rate in (0.0, 1.0):
        raise DataError(
            f"all {label_S.size:,} labels are {int(base_rate)}: AUC needs both classes. Check the threshold "
            "(--threshold) and the split."
        )
    order_S = prob_S if order is None else _checked(labels, order, users)[1]
    gauc, coverage = grouped_auc(label_S, order_S, user_S)
    return {
        "auc": float(roc_auc_score(label_S, order_S)),
        **probability_metrics(label_S, prob_S),
        "f1": float(f1_score(label_S, prob_S >= 0.5, zero_division=0.0)),
        "f1_always_yes": 2 * base_rate / (1 + base_rate),
        "gauc": gauc,
        "gauc_coverage": coverage,
        "base_rate": base_rate,
        "mean_prediction": float(prob_S.mean()),
        "targets": label_S.size,
    }


def probability_metrics(
    labels: npt.NDArray[np.integer[Any]], probabilities: npt.NDArray[np.float64]
) -> dict[str, float]:
    """log_loss and ece, the metrics that ask more of probabilities than their order; arguments as `click_metrics`."""
    return {
        "log_loss": float(log_loss(labels, probabilities, labels=[0, 1])),
        "ece": expected_calibration_error(labels, probabilities),
    }


def expected_calibration_error(
    labels: npt.NDArray[np.integer[Any]], probabilities: npt.NDArray[np.float64]
) -> float:
    """ECE as in the module docstring.

    Perfect probabilities do not have 0 either: chance alone gives S targets about sqrt(2 GROUPS p (1 - p) / (pi S)), which is .011 for
    10,000 targets of an AUC of .77.
    """
    surplus = np.bincount(groups_of(probabilities), weights=probabilities - labels)
    return float(np.abs(surplus).sum() / len(probabilities))


def groups_of(probabilities: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """(S,) the group of each target, from 0: of GROUPS, some empty where many probabilities are equal, since these share one.

    Of fewer targets than groups each is its own.
    """
    size = len(probabilities)
    first = np.searchsorted(np.sort(probabilities), probabilities)  # of those with this probability
    return np.asarray(first * min(GROUPS, size) // size, np.int64)


def grouped_auc(
    labels: npt.NDArray[np.int64], scores: npt.NDArray[np.float64], users: npt.NDArray[np.int64]
) -> tuple[float, float]:
    """AUC within each user, weighted by the user's targets.

    For a user with P clicks, Q others and R the sum of the clicks' ranks, AUC = (R - P (P + 1) / 2) / (P Q); tied
    scores share their mean rank.

    Args:
        labels: (S,) 0 or 1.
        scores: (S,) any real numbers.
        users: (S,) the user of each target.

    Returns:
        GAUC (NaN where no user has both classes) and the share of targets that it covers.
    """
    by_score = np.lexsort((scores, users))
    label, score, user = labels[by_score], scores[by_score], users[by_score]
    new_user = np.diff(user, prepend=user[0] - 1) != 0
    new_score = new_user | (np.diff(score, prepend=score[0]) != 0)
    index_U = np.cumsum(new_user) - 1
    # Targets start[t] ... stop[t] - 1 share one score; counted from 1, their mean rank is (start + 1 + stop) / 2.
    start = np.flatnonzero(new_score)
    stop = np.append(start[1:], label.size)
    rank = np.repeat((start + 1 + stop) / 2, stop - start) - np.flatnonzero(new_user)[index_U]
    total_U = np.bincount(index_U)
    clicks_U = np.bincount(index_U, weights=label)
    rank_sum_U = np.bincount(index_U, weights=rank * label)
    pairs_U = clicks_U * (total_U - clicks_U)
    both = pairs_U > 0
    if not both.any():
        return float("nan"), 0.0
    auc_U = (rank_sum_U[both] - clicks_U[both] * (clicks_U[both] + 1) / 2) / pairs_U[both]
    covered = total_U[both]
    return float((auc_U * covered).sum() / covered.sum()), float(covered.sum() / label.size)


def _checked(
    labels: npt.ArrayLike, probabilities: npt.ArrayLike, users: npt.ArrayLike
) -> tuple[Any, Any, Any]:
    label, prob, user = np.asarray(labels), np.asarray(probabilities, dtype=np.float64), np.asarray(users)
    if label.ndim != 1 or label.shape != prob.shape or label.shape != user.shape:
        raise ValueError(
            "labels, probabilities and users must be 1-d and of one length, but are "
            f"{label.shape}, {prob.shape} and {user.shape}"
        )
    if label.size == 0:
        raise DataError("there are no targets to score. Check the split and min_context.")
    if not np.isin(label, (0, 1)).all():
        raise ValueError(f"labels must be 0 or 1, but one is {label[~np.isin(label, (0, 1))][0]}")
    if not ((prob >= 0) & (prob <= 1)).all():
        bad = int(np.flatnonzero(~((prob >= 0) & (prob <= 1)))[0])
        raise ValueError(f"probabilities must lie in [0, 1], but probabilities[{bad}] is {prob[bad]}")
    return label.astype(np.int64), prob, user.astype(np.int64)
