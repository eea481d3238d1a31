"""What the Triton kernels share: the rows and keys of a tile, the rule of visibility, and how a launch is written down.

A tile of rows holds `BLOCK_M // PACK` neighbouring rows of the batch times `PACK` query heads that read the same key head: its lanes.
Packing heads keeps the rows of a tile close together, so that the span a tile visits is little longer than one row's span.

A tile of rows visits at most two ranges of keys, found from its first and last row because spans never decrease:

    prefix   [prompt_first, prefix_stop) of the first row: the prefix of a later prompt lies inside the next range
    span     [start of the first row, stop of the last row)
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import functools
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dti_kernels import layout
from dti_kernels.gpu.tiles import MAX_PACK, Tile, choose_tile
from dti_kernels.inputs import Inputs

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
PER_BATCH = [
    "num_rows",
    "num_queries",
    "num_context",
    "num_ratios",
    "rows_ptr",
    "keys_ptr",
    "lse_ptr",
    "scale",
]
# Rows of the largest tile. Rows are addressed with 32-bit offsets inside the tile (64-bit between tiles).
MAX_BLOCK_M = 512
MAX_ROW_STRIDE = 2**31 // MAX_BLOCK_M
MAX_HEAD_STRIDE = 2**31 // MAX_PACK
# Beyond this an accumulator of 16 rows no longer fits beside its operands.
MAX_HEAD_DIM = 256


@triton.jit
def visible(index, first, stop):
    """The rule of visibility: does `index` lie in the span `[first, stop)`, where `first <= stop`?

    Forward and dQ ask it of a key and a row's spans, dK/dV of a row and the key's inverse span. One comparison: below `first` the
    difference wraps to a large number.
    """
    return (index - first).to(tl.uint32) < (stop - first).to(tl.uint32)


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
def lane_offsets(lane, stride_t, stride_h, PACK: tl.constexpr):
    """Element offsets `[M]` of lanes counted from a row's first head, PACK heads a row: 32 bits."""
    return lane // PACK * stride_t + lane % PACK * stride_h


@triton.jit
def packed_base(group, num_queries, GROUP: tl.constexpr):
    """Where scratch `(G, rows x GROUP)` keeps a key head's lanes: each begins at a multiple of 16 bytes."""
    return tl.cast(group, tl.int64) * ((tl.cast(num_queries, tl.int64) * GROUP + 3) // 4 * 4)


@triton.jit
def packed_offsets(row, group, lane, first, num_queries, GROUP: tl.constexpr, PACK: tl.constexpr):
    """Where scratch keeps the lanes of a tile of whole rows from `first` on; `lane` counts the heads of the group from its first.

    Laid out like a tile, so that a tile of whole groups is contiguous. dK/dV of context rows reads the last tile of a key head without a mask:
    up to `BLOCK_M - 1` lanes behind it, which are the next head's or, behind the last, zeros.
    """
    base = packed_base(group, num_queries, GROUP)
    if PACK == GROUP:  # lanes behind the tile's last whole row are masked
        return base + tl.cast(first, tl.int64) * GROUP + tl.arange(0, row.shape[0])
    else:
        return base + tl.cast(row, tl.int64) * GROUP + lane


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
def load_keys(
    ptr, key_0, stride_t, inside, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr
):
    """`[N, BLOCK_D]`, the keys or values from row `key_0` on; zeros where not `inside` (read only if MASKED)."""
    offs = tl.arange(0, inside.shape[0]) * stride_t
    return load_tile(ptr + tl.cast(key_0, tl.int64) * stride_t, offs, inside, HEAD_DIM, BLOCK_D, MASKED)


@triton.jit
def load_field(array_ptr, FIELD: tl.constexpr, length, index, inside):
    """Column `FIELD` of `layout.rows` or `layout.keys` at `index`, 0 where not `inside`."""
    return tl.load(field(array_ptr, FIELD, length) + index, mask=inside, other=0)


@triton.jit
def row_spans(rows_ptr, num_rows, row, valid):
    """`prompt_first, prefix_stop, start, stop` of rows `[M]`; rows that are not valid see nothing."""
    return (
        load_field(rows_ptr, PROMPT_FIRST, num_rows, row, valid),
        load_field(rows_ptr, PREFIX_STOP, num_rows, row, valid),
        load_field(rows_ptr, START, num_rows, row, valid),
        load_field(rows_ptr, STOP, num_rows, row, valid),
    )


@triton.jit
def visible_keys(spans, key, inside):
    """`[M, N]`: which keys the rows of `row_spans` see; none where not `inside` the tile's range."""
    key = key[None, :]
    in_span = visible(key, spans[2][:, None], spans[3][:, None])
    return (in_span | visible(key, spans[0][:, None], spans[1][:, None])) & inside[None, :]


@triton.jit
def key_ranges(rows_ptr, num_rows, first, last, BLOCK_N: tl.constexpr):
    """The keys that the rows `first .. last` visit, in tiles of BLOCK_N:

    `num_prefix` masked tiles from `prefix_first` (keys below `prefix_stop`), then from `key_first` to `key_stop`:
    `num_left` masked tiles, `num_full` tiles that every row sees, and masked tiles; `num_masked` of them altogether.
    """
    prefix_first = tl.load(field(rows_ptr, PROMPT_FIRST, num_rows) + first)
    prefix_stop = tl.load(field(rows_ptr, PREFIX_STOP, num_rows) + first)
    key_first = tl.load(field(rows_ptr, START, num_rows) + first)
    key_stop = tl.load(field(rows_ptr, STOP, num_rows) + last)
    all_first = tl.load(field(rows_ptr, START, num_rows) + last)
    # Where the tile holds a second prompt, its last row's start lies beyond this: no tile is seen by all.
    all_stop = tl.load(field(rows_ptr, STOP, num_rows) + first)
    num_prefix = tl.cdiv(prefix_stop - prefix_first, BLOCK_N)
    num_left = tl.cdiv(all_first - key_first, BLOCK_N)
    full_first = key_first + num_left * BLOCK_N
    num_full = tl.maximum(all_stop - full_first, 0) // BLOCK_N
    num_right = tl.cdiv(tl.maximum(key_stop - full_first - num_full * BLOCK_N, 0), BLOCK_N)
    num_masked = num_prefix + num_left + num_right
    return prefix_first, prefix_stop, key_first, key_stop, num_prefix, num_left, num_full, num_masked


@triton.jit
def masked_tile(
    i, prefix_first, prefix_stop, key_first, key_stop, num_prefix, num_left, num_full, BLOCK_N: tl.constexpr
):
    """First key and bound of the i-th masked tile of `key_ranges`; with `num_left = num_full = 0` of the i-th tile."""
    j = i - num_prefix
    in_span = key_first + (j + tl.where(j < num_left, 0, num_full)) * BLOCK_N
    return tl.where(j < 0, prefix_first + i * BLOCK_N, in_span), tl.where(j < 0, prefix_stop, key_stop)


@triton.jit
def num_of_one_range(rows_ptr, num_rows, first, last, num_masked):
    """How many of a tile's masked tiles hold keys of one range of each row only: all, or none where the tile's rows have different
    prefixes, so that the prefix of some lies in the span of others."""
    first_prompt = tl.load(field(rows_ptr, PROMPT_FIRST, num_rows) + first)
    last_prompt = tl.load(field(rows_ptr, PROMPT_FIRST, num_rows) + last)
    first_prefix = tl.load(field(rows_ptr, PREFIX_STOP, num_rows) + first)
    last_prefix = tl.load(field(rows_ptr, PREFIX_STOP, num_rows) + last)
    return tl.where((first_prompt == last_prompt) & (first_prefix == last_prefix), num_masked, 0)


@triton.jit
def masked_keys(i, ranges, spans, TWO_RANGES: tl.constexpr, BLOCK_N: tl.constexpr):
    """First key of the i-th masked tile of `key_ranges`, which keys `[N]` to read, and which `[M, N]` the rows of `row_spans` see.

    Without TWO_RANGES the tile holds keys of the prefix only or of the spans only: one comparison a score instead of two.
    """
    key_0, key_bound = masked_tile(i, *ranges[:7], BLOCK_N)
    key = key_0 + tl.arange(0, BLOCK_N)
    inside = key < key_bound
    if TWO_RANGES:
        seen = visible_keys(spans, key, inside)
    else:
        in_prefix = i < ranges[4]
        first = tl.where(in_prefix, spans[0], spans[2])
        stop = tl.where(in_prefix, spans[1], spans[3])
        seen = visible(key[None, :], first[:, None], stop[:, None])
    return key_0, inside, seen


@triton.jit
def inner(a, b):
    """`a @ b.T`, over head_dim; float32 without tensor-float rounding."""
    return tl.dot(a, tl.trans(b), input_precision="ieee")


@triton.jit
def blend(near, initial, ratio):
    """`(1 - ratio) near + ratio initial`."""
    return near + ratio * (initial - near)


@triton.jit
def to_exponent(x, NATURAL: tl.constexpr):
    """A natural score or its log-sum-exp in the units that `exponential` takes."""
    return x if NATURAL else x * LOG2E


@triton.jit
def to_natural(x, NATURAL: tl.constexpr):
    """The inverse of `to_exponent`."""
    return x if NATURAL else x * LN2


@triton.jit
def exponential(x, NATURAL: tl.constexpr):
    """exp(x), or 2**x where x carries log2(e) already: one multiply-add from dot product to exp2, at the cost of a digit."""
    return tl.exp2(x * LOG2E) if NATURAL else tl.exp2(x)


@triton.jit
def alibi_distance(key, prefix_stop, start, stop):
    """Tokens from a [SUM] back to a key; a prefix key outside the span sits right before it. Shapes broadcast."""
    return tl.where(key < prefix_stop, (stop - start) + (prefix_stop - key), stop - key).to(tl.float32)


@triton.jit
def reset_ratio(ratios_ptr, num_ratios, row_reset_id, key_reset_id):
    """a(d): how much of the initial state a [SUM] reads of a key, from a table; its first entry at distance <= 0. Shapes broadcast."""
    distance = tl.minimum(tl.maximum(row_reset_id - key_reset_id, 0), num_ratios - 1)
    return tl.load(ratios_ptr + distance)


@triton.jit
def tile_of_loop(i, num_tiles, GROUP: tl.constexpr, PACK: tl.constexpr):
    """The row tile and the first head in the group of iteration `i`: all tiles of one pack of heads, then the next pack."""
    if PACK == GROUP:
        return i, 0
    else:
        return i % num_tiles, i // num_tiles * PACK


def heads_per_tile(group: int, tile: Tile) -> int:
    """How many heads of a group of `group` share a tile: the largest divisor of the group within the tile's limit."""
    limit = min(group, tile.pack, tile.block_m)
    return max(pack for pack in range(1, limit + 1) if group % pack == 0)


def padded_head_dim(head_dim: int) -> int:
    """`BLOCK_D`: the power of two that a tile holds; matrix units need 16."""
    return max(16, 1 << (head_dim - 1).bit_length())


def addressable(x: Tensor) -> Tensor:
    """`x` itself, or a copy where head_dim is not contiguous or one tile would pass 2**31 elements."""
    fits = x.stride(0) <= MAX_ROW_STRIDE and x.stride(1) <= MAX_HEAD_STRIDE
    if fits and x.stride(-1) == 1:
        return x
    return x.contiguous()


def strides(**tensors: Tensor | None) -> dict[str, int]:
    """Row and head strides as kernel arguments: `strides(q=q)` is `stride_qt`, `stride_qh`; 0 where there is no tensor."""
    result = {}
    for name, x in tensors.items():
        result[f"stride_{name}t"], result[f"stride_{name}h"] = (0, 0) if x is None else x.stride()[:2]
    return result


@dataclass(frozen=True)
class Launch:
    """One kernel launch as data, so that what runs, what is compiled ahead of time and what is tuned are the same thing."""

    kernel: Any
    grid: tuple[int, int]
    arguments: dict[str, Any]
    tile: Tile

    def run(self) -> None:
        """Launch on the current stream of the current device."""
        # Triton announces another default for fp fusion; a * b - c is one instruction here whatever the default.
        self.kernel[self.grid](
            **self.arguments, num_warps=self.tile.warps, num_stages=self.tile.stages, enable_fp_fusion=True
        )


def run_all(launches: list[Launch], device: torch.device) -> None:
    """Launch in order on `device`; a CPU means Triton's interpreter."""
    if device.type == "cpu":
        if isinstance(visible, triton.JITFunction):
            raise RuntimeError("set TRITON_INTERPRET=1 before the first kernel is launched, or not at all")
        repair_interpreter()
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        for launch in launches:
            launch.run()


@dataclass(frozen=True)
class Batch:
    """The operators' inputs, ready to be launched on."""

    q: Tensor  # (T, H, D), or (S, H, D)
    k: Tensor  # (T, G, D), as v and k_sum
    v: Tensor
    k_sum: Tensor
    k_initial: Tensor | None  # (C, G, D), as v_initial
    v_initial: Tensor | None
    ratios: Tensor | None
    slopes: Tensor | None
    rows: Tensor
    keys: Tensor
    scale: float
    mean_span: int

    @staticmethod
    def of(x: Inputs) -> Batch:
        if x.q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            raise TypeError(
                f"the GPU kernels take float16, bfloat16 or float32, got {x.q.dtype}: "
                "convert the inputs, or use windowed_attn_reference"
            )
        if x.q.shape[-1] > MAX_HEAD_DIM:
            raise ValueError(
                f"the GPU kernels take a head_dim of at most {MAX_HEAD_DIM}, got {x.q.shape[-1]}: "
                "use windowed_attn_reference"
            )
        k = addressable(x.k)
        return Batch(
            q=addressable(x.q),
            k=k,
            v=addressable(x.v),
            k_sum=k if x.k_sum is None else addressable(x.k_sum),
            k_initial=None if x.k_initial is None else addressable(x.k_initial),
            v_initial=None if x.v_initial is None else addressable(x.v_initial),
            ratios=x.ratios,
            slopes=None if x.slopes is None else x.slopes.contiguous(),
            rows=x.rows.contiguous(),
            keys=x.keys.contiguous(),
            scale=x.scale,
            mean_span=x.mean_span,
        )

    @property
    def num_rows(self) -> int:
        """`T`."""
        return self.rows.shape[1]

    @property
    def num_context(self) -> int:
        """`C`."""
        return self.keys.shape[1]

    @property
    def num_sum(self) -> int:
        """`S`."""
        return self.num_rows - self.num_context

    @property
    def has_context_queries(self) -> bool:
        """False where q holds the [SUM] rows only, or there are no context rows."""
        return self.q.shape[0] > self.num_sum

    @property
    def group(self) -> int:
        """Query heads per key head."""
        return self.q.shape[1] // self.k.shape[1]

    def tile(self, kernel: str) -> Tile:
        """The tile of the table for this batch and device."""
        return choose_tile(kernel, self.q.device, self.q.shape[2], self.q.dtype, self.mean_span)

    def sizes(self, tile: Tile) -> dict[str, Any]:
        """The arguments that every kernel takes."""
        return {
            "rows_ptr": self.rows,
            "num_rows": self.num_rows,
            "num_context": self.num_context,
            "scale": self.scale,
            "GROUP": self.group,
            "PACK": heads_per_tile(self.group, tile),
            "HEAD_DIM": self.q.shape[2],
            "BLOCK_D": padded_head_dim(self.q.shape[2]),
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
        }

    def context_inputs(self) -> dict[str, Any]:
        """The key stream of context rows, and how their scores are exponentiated."""
        # float32 inputs get float32 digits; elsewhere the rounding of scale * log2(e) is nothing.
        return {"k_ptr": self.k, **strides(k=self.k), "NATURAL": self.q.dtype == torch.float32}

    def sum_inputs(self) -> dict[str, Any]:
        """The key streams of [SUM] rows, and what their scores need besides."""
        return {
            "k_ptr": self.k_sum,
            "k_initial_ptr": self.k_initial,
            "v_initial_ptr": self.v_initial,
            "ratios_ptr": self.ratios,
            "slopes_ptr": self.slopes,
            "num_queries": self.q.shape[0],
            "num_ratios": 0 if self.ratios is None else len(self.ratios),
            **strides(k=self.k_sum, k0=self.k_initial, v0=self.v_initial),
        }

    def row_grid(self, num_rows: int, tile: Tile) -> tuple[int, int]:
        """Tiles of rows by packs of query heads."""
        pack = heads_per_tile(self.group, tile)
        return -(-num_rows // (tile.block_m // pack)), self.q.shape[1] // pack

    def key_grid(self, tile: Tile) -> tuple[int, int]:
        """Tiles of context keys by key heads."""
        return -(-self.num_context // tile.block_n), self.k.shape[1]


@functools.cache
def repair_interpreter() -> None:
    """Let Triton's interpreter (TRITON_INTERPRET=1) loop over run-time ranges under NumPy 2.4 and later.

    Its scalars are arrays of shape (1,), which `int` refuses since NumPy 2.4; Triton up to 3.8 does not squeeze them.
    """
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_with_index(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_with_index
