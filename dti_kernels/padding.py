"""Layouts of few shapes: rows that stand for nobody fill a batch up, so that many batches launch the same grids.

Every further context row is a prompt of its own that sees itself, and every further [SUM] row sees the last of them. So the rows that were
there see what they saw, a tile of further rows visits few keys, and spans never go back.
"""

from __future__ import annotations

import numpy as np
import torch

from dti_kernels.layout import (
    IS_ITEM,
    PREFIX_STOP,
    PROMPT_FIRST,
    ROW_STOP,
    START,
    STOP,
    SUM_START,
    SUM_STOP,
    StreamLayout,
)


def padded_layout(layout: StreamLayout, num_context: int, num_sum: int) -> StreamLayout:
    """The layout with rows that nobody reads: context rows behind the context rows, [SUM] rows behind the [SUM] rows.

    Args:
        layout: on the CPU.
        num_context: context rows of the result, at least one more than the layout has: further [SUM] rows see the last of them.
        num_sum: [SUM] rows of the result, at least those of the layout.

    Returns:
        The padded layout, of the same windows and `mean_span`, which chooses tiles.

    Raises:
        ValueError: a number is too small.

    Example: two context rows and a [SUM], padded to four context rows and three [SUM] rows.

    >>> layout = StreamLayout.build([[2]], [[0]], [1], window=1)
    >>> larger = padded_layout(layout, 4, 3)
    >>> larger.start.tolist(), larger.stop.tolist()
    ([0, 0, 2, 3, 0, 3, 3], [1, 2, 3, 4, 2, 4, 4])
    """
    old_context, old_sum = layout.num_context, layout.num_sum
    if num_context <= old_context:
        raise ValueError(f"num_context must be more than the layout's {old_context}, got {num_context}")
    if num_sum < old_sum:
        raise ValueError(f"num_sum must be at least the layout's {old_sum}, got {num_sum}")
    old_rows, old_keys = layout.rows.numpy(), layout.keys.numpy()
    rows = np.zeros((len(old_rows), num_context + num_sum), np.int32)
    of_context, of_sums = rows[:, :num_context], rows[:, num_context:]
    of_context[:, :old_context], of_sums[:, :old_sum] = old_rows[:, :old_context], old_rows[:, old_context:]
    new, last = np.arange(old_context, num_context, dtype=np.int32), num_context - 1
    for field in (PROMPT_FIRST, PREFIX_STOP, START):
        of_context[field, old_context:], of_sums[field, old_sum:] = new, last
    of_context[STOP, old_context:], of_sums[STOP, old_sum:] = new + 1, num_context

    keys = np.empty((len(old_keys), num_context), np.int32)
    keys[:, :old_context] = old_keys
    keys[ROW_STOP, old_context:], keys[IS_ITEM, old_context:] = new + 1, 1
    keys[SUM_START, old_context:] = keys[SUM_STOP, old_context:] = old_sum
    keys[SUM_STOP, last] = num_sum
    arrays = torch.from_numpy(rows), torch.from_numpy(keys)
    return StreamLayout(*arrays, layout.window, layout.reset_window, layout.mean_span, checked=True)
