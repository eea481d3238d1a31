"""The hidden-state reset: [SUM] rows read far context blended back to its initial states."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dti_kernels.counts import real, shown

# Shorter tables are not cut off.
_SHORT_TABLE = 4096
# Cached tables: 32 MB at most, and more settings than a process has, unless it searches for days.
_MAX_TABLES = 1024


@dataclass(frozen=True, eq=False)
class HiddenStateReset:
    """How far [SUM] rows blend a context token's key and value back to the token's initial state.

        d = t - t(j)                                 distance in interactions; own item text (d = 0) and the prefix: alpha_own
        a(d) = alpha_min + (alpha_max - alpha_min) * sigmoid((d - n / 2) * steepness)
        k~ = (1 - a) k + a k_initial,  v~ = (1 - a) v + a v_initial

    Source: paper, section 4.1, with the mixing after norm and projection.

    Attributes:
        k_initial: `(C, G, D)`, keys of the token embeddings through this layer's norm and projection, un-rotated where
            `k_sum` is.
        v_initial: `(C, G, D)`, values likewise.
        alpha_min: ratio far inside the window's recent end, in [0, 1].
        alpha_max: ratio at its far end, in [alpha_min, 1].
        steepness: of the sigmoid, per interaction, > 0.
        alpha_own: ratio for the target's own item text and the prefix, in [0, 1]. 0 unless the leak must be exactly zero: from the
            third layer on, own item text has seen states of the window that have seen tokens before the window.

    Raises:
        TypeError: a ratio or the steepness is no number; bools and tensors are none (a tensor's gradient would be lost).
        ValueError: a ratio outside [0, 1], `alpha_max < alpha_min`, or a steepness that is not positive.
    """

    k_initial: Tensor
    v_initial: Tensor
    alpha_min: float
    alpha_max: float
    steepness: float = 1.0
    alpha_own: float = 0.0

    def __post_init__(self) -> None:
        alpha_min, alpha_max = real("alpha_min", self.alpha_min), real("alpha_max", self.alpha_max)
        if not 0.0 <= alpha_min <= alpha_max <= 1.0:
            raise ValueError(
                "reset ratios must hold 0 <= alpha_min <= alpha_max <= 1, "
                f"got {shown(self.alpha_min)} and {shown(self.alpha_max)}"
            )
        if not 0.0 <= real("alpha_own", self.alpha_own) <= 1.0:
            raise ValueError(f"alpha_own must be in [0, 1], got {shown(self.alpha_own)}")
        # Not math.isfinite, which torch.compile of PyTorch 2.11 cannot trace.
        if not 0.0 < real("steepness", self.steepness) < math.inf:
            raise ValueError(f"steepness must be positive and finite, got {shown(self.steepness)}")

    def ratios(
        self, window: int, dtype: torch.dtype, device: torch.device, farthest: int | None = None
    ) -> Tensor:
        """`a(d)` for d = 0 .. n, at least two: a table, so that no kernel evaluates a sigmoid.

        `farthest`: the largest distance there is; a long table is cut off behind it. A window of 10^9 would have a table of 8 GB.

        The table is cached for good and shared by equal settings: do not write to it. A GPU gets one copy per process, so that calls wait
        for no copy and can be captured in a CUDA graph.
        """
        length = max(window, 1) + 1
        if farthest is not None and length > _SHORT_TABLE:
            # Whole vectors: the last elements of a tensor go through another exp, which may differ in the last bit.
            length = min(length, -(-(farthest + 1) // 64) * 64)
        alphas = float(self.alpha_min), float(self.alpha_max)
        settings = (*alphas, float(self.steepness), float(self.alpha_own), window, length)
        if torch.compiler.is_compiling() or type(torch.empty(0)) is not Tensor:  # traced, or without data
            return _ratio_table(*settings).to(device=device, dtype=dtype)
        key = (*settings, dtype, device)
        table = _tables.get(key)
        if table is None:
            with torch.inference_mode(False):  # training may use it next
                table = _ratio_table(*settings).to(device=device, dtype=dtype)
            # Nothing is dropped to make room: a captured graph may read it.
            if length <= _SHORT_TABLE and len(_tables) < _MAX_TABLES:
                _tables[key] = table
        return table


_tables: dict[tuple[Any, ...], Tensor] = {}


def _ratio_table(
    alpha_min: float, alpha_max: float, steepness: float, alpha_own: float, window: int, length: int
) -> Tensor:
    distance = torch.arange(length, dtype=torch.float64)
    logistic = torch.sigmoid((distance - window / 2) * steepness)
    ratio = alpha_min + (alpha_max - alpha_min) * logistic
    ratio[0] = alpha_own
    return ratio
