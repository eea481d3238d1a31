"""Tiles of our kernels: those worth timing, how rows write them, and how many of the pairs that they compute are visible."""

from __future__ import annotations

import dataclasses

import numpy as np

from benchmarks.attention.workloads import Workload
from dti_kernels import StreamLayout
from dti_kernels.gpu import Tile
from dti_kernels.layout import PREFIX_STOP, PROMPT_FIRST, ROW_STOP, START, STOP, SUM_START, SUM_STOP

_Shape = tuple[int, int, int, int]
# (rows, keys, warps, stages) by kernel and head_dim (up to), the likely ones first, since time may run out. What lost by a third or more
# on an H200 is not among them (results/gpu-h200.jsonl): eight warps over 64 x 64 or 64 x 128, and two stages where three fit; nor is
# what spills more than 160 bytes.
_CANDIDATES: dict[str, dict[int, list[_Shape]]] = {
    "ctx_fwd": {
        64: [(64, 64, 4, 3), (128, 64, 4, 3), (64, 64, 4, 4), (64, 64, 4, 2), (64, 128, 4, 3), (128, 64, 8, 3)],
        128: [(64, 64, 4, 3), (64, 64, 4, 2), (64, 32, 4, 4), (64, 128, 4, 2), (128, 64, 8, 3)],
        256: [(128, 64, 8, 2), (64, 64, 4, 2), (128, 32, 8, 2)],
    },
    "ctx_dq": {
        64: [(64, 64, 4, 3), (64, 64, 4, 4), (64, 32, 4, 4), (64, 64, 4, 2)],
        128: [(128, 64, 8, 3), (64, 64, 4, 2), (64, 32, 4, 3), (64, 32, 4, 4), (128, 32, 8, 3)],
        256: [(64, 64, 8, 1), (64, 32, 4, 2), (64, 32, 8, 2)],
    },
    "ctx_dkv": {
        64: [(64, 64, 4, 3), (64, 64, 4, 4), (32, 64, 4, 4), (32, 64, 4, 3)],
        128: [(32, 64, 4, 3), (32, 64, 4, 4), (16, 64, 4, 4), (32, 128, 8, 3)],
        256: [(64, 64, 8, 1), (32, 64, 8, 2), (32, 64, 4, 2)],
    },
    "sum_fwd": {256: [(16, 64, 4, 2), (16, 64, 4, 3), (16, 64, 8, 2), (16, 32, 4, 3), (32, 64, 4, 2)]},
    "sum_dq": {256: [(16, 64, 4, 2), (16, 64, 8, 2), (16, 32, 4, 3), (32, 64, 4, 2)]},
    "sum_dkv": {256: [(32, 32, 4, 2), (32, 32, 4, 3), (32, 16, 4, 3), (16, 32, 4, 2)]},
}  # fmt: skip
# Of the forward's, those that are timed with the next tile's scores computed ahead too; it needs registers for a second tile of scores.
_AHEAD: dict[int, list[_Shape]] = {64: [(64, 64, 4, 3)]}


def _up_to(by_head_dim: dict[int, list[_Shape]], head_dim: int) -> list[Tile]:
    found = (shapes for largest, shapes in sorted(by_head_dim.items()) if head_dim <= largest)
    return [Tile(*shape) for shape in next(found, [])]


def candidates_of(kernel: str, head_dim: int) -> list[Tile]:
    """Tiles of one of `KERNELS` that a sweep times beside the table's own, each once, likely ones first."""
    ahead = _up_to(_AHEAD, head_dim) if kernel == "ctx_fwd" else []
    ahead = [dataclasses.replace(tile, ahead=True) for tile in ahead]
    return [*ahead, *_up_to(_CANDIDATES[kernel], head_dim)]


def numbers_of(tile: Tile) -> list[int]:
    """A tile as rows and DTI_TILES have it: rows, keys, warps, stages, pack, and 1 where scores are computed ahead."""
    numbers = [tile.block_m, tile.block_n, tile.warps, tile.stages, tile.pack]
    return [*numbers, 1] if tile.ahead else numbers


def visited_pairs(layout: StreamLayout, kernel: str, tile: Tile, group: int) -> int:
    """(row, key) pairs in the tiles that a kernel visits, for one head: what it computes, masked or not."""
    rows, keys = layout.rows.numpy().astype(np.int64), layout.keys.numpy().astype(np.int64)
    pack = tile.heads(group)
    tokens, num_context = tile.block_m // pack, layout.num_context
    per_tile = tile.block_m * tile.block_n / pack  # lanes that hold no row are computed too
    if kernel.endswith("dkv"):
        first = np.arange(0, num_context, tile.block_n)
        if kernel == "ctx_dkv":  # its tiles count lanes
            lanes = (np.maximum.reduceat(keys[ROW_STOP], first) - first) * pack
            return int((-(-lanes // tile.block_m)).sum() * per_tile)
        start = np.minimum.reduceat(keys[SUM_START], first)
        stop = np.maximum.reduceat(keys[SUM_STOP], first)
        return int((-(-np.maximum(stop - start, 0) // tokens)).sum() * per_tile)
    begin, end = (0, num_context) if kernel.startswith("ctx") else (num_context, layout.num_rows)
    first = np.arange(begin, end, tokens)
    last = np.minimum(first + tokens, end) - 1
    prefix = -(-(rows[PREFIX_STOP, first] - rows[PROMPT_FIRST, first]) // tile.block_n)
    span = -(-(rows[STOP, last] - rows[START, first]) // tile.block_n)
    visited = prefix + span
    if tile.ahead and kernel == "ctx_fwd":  # an empty tile where none is seen by all rows
        left = -(-(rows[START, last] - rows[START, first]) // tile.block_n)
        visited += rows[STOP, first] - rows[START, first] - left * tile.block_n < tile.block_n
    return int(visited.sum() * per_tile)


def visible_pairs(layout: StreamLayout, kernel: str) -> int:
    """(row, key) pairs that count, of the rows a kernel works on; a [SUM]'s own key apart."""
    begin, end = (
        (0, layout.num_context) if kernel.startswith("ctx") else (layout.num_context, layout.num_rows)
    )
    rows = layout.rows[:, begin:end].long()
    return int((rows[STOP] - rows[START] + rows[PREFIX_STOP] - rows[PROMPT_FIRST]).sum())


def useful_fraction(workload: Workload, kernel: str, tile: Tile) -> float:
    """Visible share of the visited pairs."""
    layout = workload.layout()
    group = workload.num_heads // workload.num_groups
    return visible_pairs(layout, kernel) / visited_pairs(layout, kernel, tile, group)
