"""Metrics of a click model over one set of targets.

    AUC       chance that a clicked target scores above one that was not, ties count one half
    log loss  mean of -ln(probability of what happened)
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


def click_metrics(
    labels: npt.ArrayLike, probabilities: npt.ArrayLike, users: npt.ArrayLike
) -> dict[str, float]:
    """All metrics of one set of targets.

    Args:
        labels: (S,) 0 or 1, any integer or boolean dtype.
        probabilities: (S,) probability of a click, in [0, 1].
        users: (S,) integers, the user of each target.

    Returns:
        auc, log_loss, f1, f1_always_yes, gauc, gauc_coverage (share of targets whose user has both classes),
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
    gauc, coverage = grouped_auc(label_S, prob_S, user_S)
    return {
        "auc": float(roc_auc_score(label_S, prob_S)),
        "log_loss": float(log_loss(label_S, prob_S, labels=[0, 1])),
        "f1": float(f1_score(label_S, prob_S >= 0.5, zero_division=0.0)),
        "f1_always_yes": 2 * base_rate / (1 + base_rate),
        "gauc": gauc,
        "gauc_coverage": coverage,
        "base_rate": base_rate,
        "mean_prediction": float(prob_S.mean()),
        "targets": label_S.size,
    }


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
