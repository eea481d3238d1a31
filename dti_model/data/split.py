"""Targets among interactions, and their split.

A *target* has at least `min_context` earlier interactions of its user; the others are context only. Rows
are ordered by (time, user, item, place in the file), and the split of the N targets is 8 : 1 : 1 in that order: the first
`floor(.8 N)` are train, up to `floor(.9 N)` validation, the rest test ("global"); or the same within each
user ("user"). Two time stamps may divide the targets instead, or a code that each row brings along.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

CONTEXT, TRAIN, VAL, TEST = 0, 1, 2, 3
SPLIT_CODES = {"train": TRAIN, "val": VAL, "test": TEST}
# What a column of splits may say, in any case; without a word a row is context only.
SPLIT_WORDS = {
    "": CONTEXT,
    "train": TRAIN,
    **dict.fromkeys(("val", "valid", "validation", "dev"), VAL),
    "test": TEST,
}
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
        cut_by_time(split, by_time[split[by_time] != CONTEXT])
        return split
    val, test = num_targets * 8 // 10, num_targets * 9 // 10
    counts = [lengths - num_targets, val, test - val, num_targets - test]
    return _repeated([CONTEXT, TRAIN, VAL, TEST], counts)


def cut_by_time(split: npt.NDArray[np.int8], targets: npt.NDArray[np.int64]) -> None:
    """Mark, in place, targets in their global order as 8 : 1 : 1 of TRAIN, VAL and TEST."""
    split[targets] = TRAIN
    split[targets[targets.size * 8 // 10 :]] = VAL
    split[targets[targets.size * 9 // 10 :]] = TEST


def split_at(timestamp: npt.NDArray[np.int64], val_from: int, test_from: int) -> npt.NDArray[np.int8]:
    """TRAIN before the time stamp `val_from`, VAL before `test_from`, TEST from there on; (I,) int8, whatever is a target."""
    split = np.full(timestamp.shape, TRAIN, np.int8)
    split[timestamp >= val_from] = VAL
    split[timestamp >= test_from] = TEST
    return split


def without_early(
    split: npt.NDArray[np.int8], offsets: npt.NDArray[np.int64], min_context: int
) -> npt.NDArray[np.int8]:
    """The split with rows as CONTEXT that have fewer than `min_context` earlier ones of their user."""
    lengths = np.diff(offsets)
    num_early = np.minimum(lengths, min_context)
    return split * _repeated([0, 1], [num_early, lengths - num_early])


def code_of_word(word: str) -> int | None:
    """The code of a word of `SPLIT_WORDS`, whatever its case and the blanks around it; None: it is none."""
    return SPLIT_WORDS.get(word.strip().lower())


def num_sharing_time(offsets: npt.NDArray[np.int64], timestamp: npt.NDArray[np.int64]) -> int:
    """How many rows have the time stamp of another row of their user; rows are in (user, time) order."""
    as_before = np.zeros(timestamp.size + 1, dtype=bool)  # row i and row i - 1
    as_before[1:-1] = timestamp[1:] == timestamp[:-1]
    as_before[offsets] = False
    return int((as_before[1:] | as_before[:-1]).sum())


def num_train_after_test(split: npt.NDArray[np.int8], timestamp: npt.NDArray[np.int64]) -> int:
    """How many training targets are later than the first test target."""
    test = timestamp[split == TEST]
    return int((timestamp[split == TRAIN] > test.min()).sum()) if test.size else 0


def _repeated(codes: list[int], counts: list[npt.NDArray[np.int64]]) -> npt.NDArray[np.int8]:
    """For user after user, each of `codes` as often as its `counts` says."""
    of_user = np.tile(np.array(codes, dtype=np.int8), counts[0].size)
    return np.repeat(of_user, np.stack(counts, axis=1).ravel())
