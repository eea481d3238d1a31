"""ALiBi slopes of [SUM] rows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dti_kernels.counts import integer


def default_alibi_slopes(num_heads: int, device: torch.device | str | None = None) -> Tensor:
    """Geometric ALiBi slopes `(num_heads,)` float32, per token of distance (Press et al. 2022).

    `2 ** (-8 i / H)` for i = 1 .. H when H is a power of two; otherwise the slopes of the next smaller power of two, then
    every other slope of the next larger one.

    Raises:
        TypeError: `num_heads` is no integer.
        ValueError: it is not in [1, 2**16), as many as a GPU's grid holds.

    >>> default_alibi_slopes(4).tolist()
    [0.25, 0.0625, 0.015625, 0.00390625]
    """
    num_heads = integer("num_heads", num_heads, 1, 2**16)
    power = 2 ** int(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 * i / power) for i in range(1, power + 1)]
    slopes += [2.0 ** (-4.0 * i / power) for i in range(1, 2 * (num_heads - power), 2)]
    return torch.tensor(slopes, dtype=torch.float32, device=device)
