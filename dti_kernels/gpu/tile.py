"""Device functions that kernels share: the rows and keys of a tile, the rule of visibility, scores.

A tile of rows holds `BLOCK_M // PACK` neighbouring rows of the batch times `PACK` query heads that read the same key head: its lanes.
Packing heads keeps the rows of a tile close together, so that the span a tile visits is little longer than one row's span.

A tile of rows visits at most two ranges of keys, found from its first and last row because spans never decrease:

    prefix   [prompt_first, prefix_stop) of the first row: the prefix of a later prompt lies inside the next range
    span     [start of the first row, stop of the last row)
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from dti_kernels import layout

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
PER_BATCH = ["num_rows", "num_queries", "num_context", "num_ratios", "scale"]
PER_BATCH += ["rows_ptr", "keys_ptr", "lse_ptr"]


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
def program_rows(begin, stop, PACK: tl.constexpr, BLOCK_M: tl.constexpr):
    """This program's tile of the rows `[begin, stop)`: first and last row, rows and heads `[M]` of its lanes, and which lanes are used."""
    first = begin + tl.program_id(0) * (BLOCK_M // PACK)
    last = tl.minimum(first + BLOCK_M // PACK, stop) - 1
    row, lane = tile_rows(first, stop, PACK, BLOCK_M)
    return first, last, row, tl.program_id(1) * PACK + lane, row < stop


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
    """Offset of a key head's lanes in scratch `(G, rows x GROUP)`: a multiple of 16 bytes."""
    return tl.cast(group, tl.int64) * ((tl.cast(num_queries, tl.int64) * GROUP + 3) // 4 * 4)


@triton.jit
def packed_offsets(row, group, lane, first, num_queries, GROUP: tl.constexpr, PACK: tl.constexpr):
    """Offsets in scratch of the lanes of a tile of whole rows from `first` on; `lane` counts the heads of the group from its first.

    Scratch is laid out like a tile, so that a tile of whole groups is contiguous. dK/dV of context rows reads the last tile of a key head
    without a mask: up to `BLOCK_M - 1` lanes behind it, which are the next head's or, behind the last, zeros.
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
    mask = valid[:, None] if MASKED else None
    if HEAD_DIM != BLOCK_D:
        in_head = (offs_d < HEAD_DIM)[None, :]
        mask = mask & in_head if MASKED else in_head
    return tl.load(ptrs, mask=mask, other=None if mask is None else 0.0)


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
    # If the tile holds a second prompt, its last row's start lies beyond this: no tile is seen by all.
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
    """Number of masked tiles that hold keys of one range of each row only: all, or none where rows have different prefixes, so that the
    prefix of some lies in the span of others."""
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
    """a(d): the share of the initial state that a [SUM] reads of a key, from a table; its first entry at distance <= 0. Shapes broadcast."""
    distance = tl.minimum(tl.maximum(row_reset_id - key_reset_id, 0), num_ratios - 1)
    return tl.load(ratios_ptr + distance)


@triton.jit
def sum_scores(
    i, ranges, spans, reset_id, slope, q, k_ptr, v_ptr, k_initial_ptr, ratios_ptr, rows_ptr, num_rows, num_ratios, scale,
    stride_kt, stride_vt, stride_k0t, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Natural scores `[M, N]` of [SUM] rows with the i-th tile of their keys.

    Returns the first key, which keys exist, k, v, the initial k and its ratio (k and 0 without a reset), the scores, their ALiBi
    distances (0 without slopes), and which keys the rows see.
    """
    key_0, key_bound = masked_tile(i, *ranges[:5], 0, 0, BLOCK_N)
    key = key_0 + tl.arange(0, BLOCK_N)
    inside = key < key_bound
    k = load_keys(k_ptr, key_0, stride_kt, inside, HEAD_DIM, BLOCK_D, True)  # [N, D]
    v = load_keys(v_ptr, key_0, stride_vt, inside, HEAD_DIM, BLOCK_D, True)
    k_initial, ratio, distance = k, 0.0, 0.0
    s = inner(q, k)
    if ratios_ptr is not None:
        key_reset_id = load_field(rows_ptr, RESET_ID, num_rows, key, inside)
        ratio = reset_ratio(ratios_ptr, num_ratios, reset_id[:, None], key_reset_id[None, :])
        k_initial = load_keys(k_initial_ptr, key_0, stride_k0t, inside, HEAD_DIM, BLOCK_D, True)
        s = blend(s, inner(q, k_initial), ratio)
    s *= scale
    if slope is not None:
        distance = alibi_distance(key[None, :], spans[1][:, None], spans[2][:, None], spans[3][:, None])
        s -= slope[:, None] * distance
    return key_0, inside, k, v, k_initial, ratio, s, distance, visible_keys(spans, key, inside)


@triton.jit
def tile_of_loop(i, num_tiles, GROUP: tl.constexpr, PACK: tl.constexpr):
    """The row tile and the first head in the group of iteration `i`: all tiles of one pack of heads, then the next pack."""
    if PACK == GROUP:
        return i, 0
    else:
        return i % num_tiles, i // num_tiles * PACK
