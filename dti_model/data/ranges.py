"""Ranges of numbers as one array."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


def ranges(first: IntArray, lengths: IntArray) -> IntArray:
    """`first[i], first[i] + 1, ...` for `lengths[i]` numbers, one range after the other."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    # Counting on from 0, range i begins at ends[i] - lengths[i]: shifted by what is missing to first[i].
    return np.arange(total) + np.repeat(first - ends + lengths, lengths)
