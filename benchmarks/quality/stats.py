"""Is one click model better than another? Paired differences of AUC with bootstrap confidence intervals.

    difference = mean over seeds of AUC(a) - mean over seeds of AUC(b), on the same targets

Resampled are users (targets of one user are not independent: their history is shared) and, for each model, its seeds. Both models
see the same users in every resample, which is what makes the interval narrow. Seeds are drawn for each model by itself, unless they
are pairs: runs that begin with the same weights and see the same batches.    Cost: resamples x targets x seeds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Difference:
    """AUC of a minus AUC of b with the bounds of its interval."""

    value: float
    low: float
    high: float


def weighted_auc(labels: npt.NDArray[np.int64], scores: Floats, weights: Floats) -> Floats:
    """AUC for every row of weights; ties count one half.

    Args:
        labels: `(S,)` 0 or 1.
        scores: `(S,)`.
        weights: `(B, S)`, >= 0: how often each target was drawn.

    Returns:
        `(B,)`, NaN where one class has no weight.
    """
    order = np.argsort(scores, kind="stable")
    _, starts = np.unique(scores[order], return_index=True)
    clicks = np.where(labels[order] == 1, weights[:, order], 0.0)
    others = np.where(labels[order] == 0, weights[:, order], 0.0)
    # Per distinct score: weight of clicks, of others, and of others with a lower score.
    clicks, others = (np.add.reduceat(x, starts, axis=1) for x in (clicks, others))
    below = np.cumsum(others, axis=1) - others
    with np.errstate(invalid="ignore"):
        auc: Floats = (clicks * (below + 0.5 * others)).sum(1) / (clicks.sum(1) * others.sum(1))
    return auc


def auc_difference(
    labels: npt.NDArray[np.int64],
    users: npt.NDArray[np.int64],
    a: list[Floats],
    b: list[Floats],
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    paired: bool = False,
) -> Difference:
    """Compare two models, each trained from several seeds, on the same targets.

    Args:
        labels: `(S,)` 0 or 1.
        users: `(S,)` user of each target.
        a: scores `(S,)` of one model, one array per seed.
        b: scores of the other.
        resamples: of the bootstrap.
        level: of the percentile interval.
        seed: of the resampling.
        paired: the i-th scores of both models are a pair, and stay together in every resample.

    Raises:
        ValueError: a model has no scores, their shape is not that of the labels, or pairs lack a half.
    """
    for name, scores in (("a", a), ("b", b)):
        if not scores or any(x.shape != labels.shape for x in scores):
            raise ValueError(
                f"{name} must hold at least one array of shape {labels.shape}, got {[x.shape for x in scores]}"
            )
    if paired and len(a) != len(b):
        raise ValueError(f"pairs must have two halves, got {len(a)} and {len(b)} arrays")
    rng = np.random.default_rng(seed)
    distinct, index = np.unique(users, return_inverse=True)
    draws = rng.multinomial(len(distinct), np.full(len(distinct), 1 / len(distinct)), size=resamples)
    once = np.ones((1, len(labels)))
    drawn = [rng.integers(len(scores), size=(len(scores), resamples)) for scores in (a, b)]
    means, resampled = [], []
    for scores, seeds in zip((a, b), (drawn[0], drawn[0] if paired else drawn[1])):
        means.append(float(np.mean([weighted_auc(labels, x, once)[0] for x in scores])))
        by_seed = np.stack([_chunked(labels, x, draws, index) for x in scores])
        resampled.append(np.take_along_axis(by_seed, seeds, axis=0).mean(0))
    differences = resampled[0] - resampled[1]
    tail = 50 * (1 - level)
    low, high = np.nanpercentile(differences, [tail, 100 - tail])
    return Difference(means[0] - means[1], float(low), float(high))


def _chunked(
    labels: npt.NDArray[np.int64], scores: Floats, draws: npt.NDArray[np.int64], index: npt.NDArray[np.int64]
) -> Floats:
    """`weighted_auc` for many draws of users, at most some 100 MB at a time."""
    size = max(1, 4_000_000 // len(labels))
    parts = [
        weighted_auc(labels, scores, draws[i : i + size][:, index].astype(float))
        for i in range(0, len(draws), size)
    ]
    return np.concatenate(parts)
