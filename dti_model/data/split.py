"""Which interactions are targets, and in which split.

A *target* has at least `min_context` earlier interactions of its user; the others are context only. Rows
are ordered by (time, user, item), and the split of the N targets is 8 : 1 : 1 in that order: the first
`floor(.8 N)` are train, up to `floor(.9 N)` validation, the rest test ("global"); or the same within each
user ("user").
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

CONTEXT, TRAIN, VAL, TEST = 0, 1, 2, 3
SPLIT_CODES = {"train": TRAIN, "val": VAL, "test": TEST}
SplitKind = Literal["global", "user"]


def assign_split(
    offsets: npt.NDArray[np.int64], order: npt.NDArray[np.int64], kind: SplitKind, min_context: int
) -> npt.NDArray[np.int8]:
    """Split code of every interaction row.

    Args:
        offsets: (U + 1,) int64, user u owns rows `offsets[u]:offsets[u + 1]`, in time order.
        order: (I,) int64, rank of a row in the global (time, user, item) order.
        kind: "global" or "user".
        min_context: earlier interactions of the same user that a target needs.

    Returns:
        (I,) int8 of CONTEXT, TRAIN, VAL, TEST.
    """
    lengths = np.diff(offsets)
    position = (
        np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths) - min_context
    )  # among the user's targets
    is_target = position >= 0
    if kind == "global":
        rank = np.full(order.shape, -1, dtype=np.int64)
        rows = np.argsort(order)
        targets = rows[is_target[rows]]
        rank[targets] = np.arange(targets.size)
        total = np.full(order.shape, targets.size, dtype=np.int64)
    else:
        rank = position
        total = np.repeat(np.maximum(lengths - min_context, 0), lengths)
    split = np.where(rank < total * 8 // 10, TRAIN, np.where(rank < total * 9 // 10, VAL, TEST))
    return np.where(is_target, split, CONTEXT).astype(np.int8)
