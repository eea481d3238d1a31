"""Targets among interactions, and their split.

A *target* has at least `min_context` earlier interactions of its user; the others are context only. Rows
are ordered by (time, user, item, place in the file), and the split of the N targets is 8 : 1 : 1 in that order: the first
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
    offsets: npt.NDArray[np.int64], by_time: npt.NDArray[np.int64], kind: SplitKind, min_context: int
) -> npt.NDArray[np.int8]:
    """Split code of every interaction row.

    Args:
        offsets: (U + 1,) int64, user u owns rows `offsets[u]:offsets[u + 1]`, in time order.
        by_time: (I,) int64, the rows in the global (time, user, item) order.
        kind: "global" or "user".
        min_context: earlier interactions of the same user that a target needs.

    Returns:
        (I,) int8 of CONTEXT, TRAIN, VAL, TEST.
    """
    lengths = np.diff(offsets)
    num_targets = np.maximum(lengths - min_context, 0)
    if kind == "global":
        split = _repeated([CONTEXT, TRAIN], [lengths - num_targets, num_targets])
        targets = by_time[split[by_time] != CONTEXT]
        split[targets[targets.size * 8 // 10 :]] = VAL
        split[targets[targets.size * 9 // 10 :]] = TEST
        return split
    val, test = num_targets * 8 // 10, num_targets * 9 // 10
    counts = [lengths - num_targets, val, test - val, num_targets - test]
    return _repeated([CONTEXT, TRAIN, VAL, TEST], counts)


def _repeated(codes: list[int], counts: list[npt.NDArray[np.int64]]) -> npt.NDArray[np.int8]:
    """For user after user, each of `codes` as often as its `counts` says."""
    of_user = np.tile(np.array(codes, dtype=np.int8), counts[0].size)
    return np.repeat(of_user, np.stack(counts, axis=1).ravel())
