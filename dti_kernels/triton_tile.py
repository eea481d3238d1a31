"""What the Triton kernels share: the rows and keys of a tile, the rule of visibility, and how a launch is written down.

A tile of rows holds `BLOCK_M // PACK` neighbouring rows of the batch times `PACK` query heads that read the same key head.
Packing heads keeps the rows of a tile close together, so that the span a tile visits is little longer than one row's span.

A tile of rows visits at most two ranges of keys, found from its first and last row because spans never decrease:

    prefix   [prompt_first, prefix_stop) of the first row: the prefix of a later prompt lies inside the next range
    span     [start of the first row, stop of the last row)
"""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dti_kernels import layout
from dti_kernels.tiles import Tile

PROMPT_FIRST = tl.constexpr(layout.PROMPT_FIRST)
PREFIX_STOP = tl.constexpr(layout.PREFIX_STOP)
START = tl.constexpr(layout.START)
STOP = tl.constexpr(layout.STOP)
RESET_ID = tl.constexpr(layout.RESET_ID)
ROW_STOP = tl.constexpr(layout.ROW_STOP)
SUM_START = tl.constexpr(layout.SUM_START)
SUM_STOP = tl.constexpr(layout.SUM_STOP)
# exp2 is the hardware's exponential: scores carry log2(e), the log-sum-exp in memory is natural.
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# Arguments that change from batch to batch: compiled once, whatever their value or alignment.
PER_BATCH = ["num_rows", "num_context", "num_ratios", "rows_ptr", "keys_ptr", "lse_ptr", "delta_ptr", "scale"]
# A tile's rows are addressed with 32-bit offsets inside the tile (64-bit between tiles).
MAX_ROW_STRIDE = 2**31 // 256


@triton.jit
def visible(index, first, stop):
    """The rule of visibility: does `index` lie in the span `[first, stop)`?

    Forward and dQ ask it of a key and a row's spans, dK/dV of a row and the key's inverse span.
    """
    return (index >= first) & (index < stop)


@triton.jit
def field(array_ptr, FIELD: tl.constexpr, length):
    """Column `FIELD` of `layout.rows` (length T) or `layout.keys` (length C)."""
    return array_ptr + tl.cast(length, tl.int64) * FIELD


@triton.jit
def tile_rows(first, stop, PACK: tl.constexpr, BLOCK_M: tl.constexpr):
    """Rows and head lanes `[M]` of the tile that starts at row `first`; unused lanes get the row `stop`."""
    lane = tl.arange(0, BLOCK_M)
    row = first + lane // PACK
    if BLOCK_M % PACK != 0:
        row = tl.where(lane < (BLOCK_M // PACK) * PACK, row, stop)
    return tl.minimum(row, stop), lane % PACK


@triton.jit
def offsets(row, head, stride_t, stride_h):
    """Element offsets `[M]` of (row, head): 64 bits, a packed batch may pass 2**31 elements."""
    return tl.cast(row, tl.int64) * stride_t + tl.cast(head, tl.int64) * stride_h


@triton.jit
def load_tile(ptr, offs, valid, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """`[rows, BLOCK_D]`; zeros where not `valid` (read only if MASKED) and in the padding of an odd head_dim."""
    offs_d = tl.arange(0, BLOCK_D)
    ptrs = ptr + offs[:, None] + offs_d[None, :]
    if HEAD_DIM == BLOCK_D:
        if MASKED:
            return tl.load(ptrs, mask=valid[:, None], other=0.0)
        else:
            return tl.load(ptrs)
    else:
        if MASKED:
            return tl.load(ptrs, mask=valid[:, None] & (offs_d < HEAD_DIM)[None, :], other=0.0)
        else:
            return tl.load(ptrs, mask=(offs_d < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def store_tile(ptr, offs, valid, x, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write `[rows, BLOCK_D]` in the dtype of `ptr` where `valid`."""
    offs_d = tl.arange(0, BLOCK_D)
    inside = valid[:, None] & (offs_d < HEAD_DIM)[None, :]
    tl.store(ptr + offs[:, None] + offs_d[None, :], x.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def row_spans(rows_ptr, num_rows, row, valid):
    """`prompt_first, prefix_stop, start, stop` of rows `[M]`; rows that are not valid see nothing."""
    return (
        tl.load(field(rows_ptr, PROMPT_FIRST, num_rows) + row, mask=valid, other=0),
        tl.load(field(rows_ptr, PREFIX_STOP, num_rows) + row, mask=valid, other=0),
        tl.load(field(rows_ptr, START, num_rows) + row, mask=valid, other=0),
        tl.load(field(rows_ptr, STOP, num_rows) + row, mask=valid, other=0),
    )


@triton.jit
def key_ranges(rows_ptr, num_rows, first, last, BLOCK_N: tl.constexpr):
    """The keys that the rows `first .. last` visit, as tiles of BLOCK_N keys:

    `num_prefix` masked tiles from `prefix_first` (keys below `prefix_stop`), then from `key_first` to `key_stop`:
    `num_left` masked tiles, `num_full` tiles that every row sees, and masked tiles; `num_edge` masked tiles altogether.
    """
    prefix_first = tl.load(field(rows_ptr, PROMPT_FIRST, num_rows) + first)
    prefix_stop = tl.load(field(rows_ptr, PREFIX_STOP, num_rows) + first)
    key_first = tl.load(field(rows_ptr, START, num_rows) + first)
    key_stop = tl.load(field(rows_ptr, STOP, num_rows) + last)
    all_first = tl.load(field(rows_ptr, START, num_rows) + last)
    # Where the tile holds a second prompt, its first row's start lies beyond this: no tile is seen by all.
    all_stop = tl.load(field(rows_ptr, STOP, num_rows) + first)
    num_prefix = tl.cdiv(prefix_stop - prefix_first, BLOCK_N)
    num_left = tl.cdiv(all_first - key_first, BLOCK_N)
    full_first = key_first + num_left * BLOCK_N
    num_full = tl.maximum(all_stop - full_first, 0) // BLOCK_N
    num_right = tl.cdiv(tl.maximum(key_stop - full_first - num_full * BLOCK_N, 0), BLOCK_N)
    num_edge = num_prefix + num_left + num_right
    return prefix_first, prefix_stop, key_first, key_stop, num_prefix, num_left, num_full, num_edge


@triton.jit
def edge_tile(
    i, prefix_first, prefix_stop, key_first, key_stop, num_prefix, num_left, num_full, BLOCK_N: tl.constexpr
):
    """First key and bound of the i-th masked tile of `key_ranges`."""
    j = i - num_prefix
    in_span = key_first + (j + tl.where(j < num_left, 0, num_full)) * BLOCK_N
    return tl.where(j < 0, prefix_first + i * BLOCK_N, in_span), tl.where(j < 0, prefix_stop, key_stop)


@triton.jit
def alibi_distance(key, start, stop, prefix_stop):
    """Tokens from a [SUM] back to a key; a prefix key outside the span sits right before it. Shapes broadcast."""
    return tl.where(key < prefix_stop, (stop - start) + (prefix_stop - key), stop - key).to(tl.float32)


@triton.jit
def reset_ratio(ratios_ptr, num_ratios, row_reset_id, key_reset_id):
    """a(d): how much of the initial state a [SUM] reads of a key, from a table; 0 at distance <= 0. Shapes broadcast."""
    distance = tl.minimum(tl.maximum(row_reset_id - key_reset_id, 0), num_ratios - 1)
    return tl.load(ratios_ptr + distance)


@dataclass(frozen=True)
class Launch:
    """One kernel launch as data, so that what runs, what is compiled ahead of time and what is tuned are the same thing."""

    kernel: Any
    grid: tuple[int, int]
    arguments: dict[str, Any]
    tile: Tile

    def run(self) -> None:
        """Launch on the current stream of the arguments' device."""
        # enable_fp_fusion: Triton announces another default; a * b - c must stay one instruction here.
        self.kernel[self.grid](
            **self.arguments,
            num_warps=self.tile.warps,
            num_stages=self.tile.stages,
            enable_fp_fusion=True,
        )


def run_all(launches: list[Launch], device: torch.device) -> None:
    """Launch in order on `device` (Triton launches on the current device)."""
    if device.type == "cpu":
        for launch in launches:
            launch.run()
        return
    with torch.cuda.device(device):
        for launch in launches:
            launch.run()


def heads_per_tile(group: int, tile: Tile) -> int:
    """How many heads of a group of `group` share a tile: the largest divisor of the group within the tile's limit."""
    limit = min(tile.pack, tile.block_m)
    return max(pack for pack in range(1, min(group, limit) + 1) if group % pack == 0)


def padded_head_dim(head_dim: int) -> int:
    """`BLOCK_D`: the power of two that a tile holds; matrix units need 16."""
    return max(16, 1 << (head_dim - 1).bit_length())


def addressable(x: Tensor) -> Tensor:
    """`x` itself, or a copy where head_dim is not contiguous or one tile would pass 2**31 elements."""
    if x.stride(-1) == 1 and x.stride(0) < MAX_ROW_STRIDE:
        return x
    return x.contiguous()
