"""Rows and keys that are not finite are computed again, so that NaN and infinity reach the rows that may see them and no others.

A tile multiplies what a row does not see by a probability of 0, and 0 x inf is NaN. Kernels therefore mark the rows that they computed
and that are not finite. The kernels here compute those again, one row or key at a time, and load nothing but what that row sees, or the
rows that see that key. If all is finite, they read one byte a row and end. Log-sum-exp and delta of a row depend on nothing that it does
not see: where they are not finite, the row is rightly so and stays as it is.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from dti_kernels.gpu.tile import (
    PER_BATCH,
    PREFIX_STOP,
    PROMPT_FIRST,
    RESET_ID,
    ROW_STOP,
    START,
    STOP,
    SUM_START,
    SUM_STOP,
    alibi_distance,
    blend,
    field,
    load_field,
    load_keys,
    load_tile,
    offsets,
    packed_base,
    reset_ratio,
    to_natural,
)
from dti_kernels.gpu.tiles import Tile

# Rows whose marks a program reads and keys that it then loads at a time, and the other way round.
ROWS_TILE = Tile(128, 16, 4, 1, pack=1)
KEYS_TILE = Tile(16, 128, 4, 1)


@triton.jit
def mark(marks_ptr, offs, valid, x):
    """Mark the rows of `x [rows, D]` that hold a number that is not finite."""
    tl.store(marks_ptr + offs, (tl.sum(x * 0.0, 1) != 0.0).to(tl.int8), mask=valid)


@triton.jit
def load_row(ptr, row, head, stride_t, stride_h, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """`[BLOCK_D]` in float32."""
    offs_d = tl.arange(0, BLOCK_D)
    ptrs = ptr + offsets(row, head, stride_t, stride_h) + offs_d
    return tl.load(ptrs, mask=offs_d < HEAD_DIM, other=0.0).to(tl.float32)


@triton.jit
def store_row(ptr, offset, x, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write `[BLOCK_D]` in the dtype of `ptr`."""
    offs_d = tl.arange(0, BLOCK_D)
    tl.store(ptr + offset + offs_d, x.to(ptr.dtype.element_ty), mask=offs_d < HEAD_DIM)


@triton.jit
def isolated_row(
    row, q, do, lse, delta, slope, k_ptr, v_ptr, k_initial_ptr, v_initial_ptr, ratios_ptr, rows_ptr,
    num_rows, num_ratios, scale, stride_kt, stride_vt, stride_k0t, stride_v0t,
    IS_SUM: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """`[BLOCK_D]`: the output of a row, or where there is `do [BLOCK_D]` its dq before scaling. Pointers are those of its key head."""
    result = tl.zeros([BLOCK_D], tl.float32)
    start = tl.load(field(rows_ptr, START, num_rows) + row)
    stop = tl.load(field(rows_ptr, STOP, num_rows) + row)
    prefix_first = tl.load(field(rows_ptr, PROMPT_FIRST, num_rows) + row)
    prefix_stop = tl.load(field(rows_ptr, PREFIX_STOP, num_rows) + row)
    if IS_SUM:
        k_own = load_row(k_ptr, row, 0, stride_kt, 0, HEAD_DIM, BLOCK_D)
        v_own = load_row(v_ptr, row, 0, stride_vt, 0, HEAD_DIM, BLOCK_D)
        p_own = tl.exp(tl.sum(q * k_own, 0) * scale - lse)
        if do is not None:
            result += p_own * (tl.sum(do * v_own, 0) - delta) * k_own
        else:
            result += p_own * v_own
    # Tiles of the prefix, then of the span.
    num_prefix = tl.cdiv(prefix_stop - prefix_first, BLOCK_N)
    for i in range(0, num_prefix + tl.cdiv(stop - start, BLOCK_N)):
        in_prefix = i < num_prefix
        key_0 = tl.where(in_prefix, prefix_first + i * BLOCK_N, start + (i - num_prefix) * BLOCK_N)
        key = key_0 + tl.arange(0, BLOCK_N)
        inside = key < tl.where(in_prefix, prefix_stop, stop)
        k = load_keys(k_ptr, key_0, stride_kt, inside, HEAD_DIM, BLOCK_D, True).to(tl.float32)
        v = load_keys(v_ptr, key_0, stride_vt, inside, HEAD_DIM, BLOCK_D, True).to(tl.float32)
        if ratios_ptr is not None:
            reset_id = tl.load(field(rows_ptr, RESET_ID, num_rows) + row)
            key_reset_id = load_field(rows_ptr, RESET_ID, num_rows, key, inside)
            ratio = reset_ratio(ratios_ptr, num_ratios, reset_id, key_reset_id)[:, None]
            k_0 = load_keys(k_initial_ptr, key_0, stride_k0t, inside, HEAD_DIM, BLOCK_D, True)
            v_0 = load_keys(v_initial_ptr, key_0, stride_v0t, inside, HEAD_DIM, BLOCK_D, True)
            k, v = blend(k, k_0.to(tl.float32), ratio), blend(v, v_0.to(tl.float32), ratio)
        s = tl.sum(q[None, :] * k, 1) * scale
        if slope is not None:
            s -= slope * alibi_distance(key, prefix_stop, start, stop)
        p = tl.where(inside, tl.exp(s - lse), 0.0)
        if do is not None:
            ds = p * (tl.sum(do[None, :] * v, 1) - delta)
            result += tl.sum(ds[:, None] * k, 0)
        else:
            result += tl.sum(p[:, None] * v, 0)
    return result


@triton.jit(do_not_specialize=PER_BATCH)
def isolated_rows_kernel(
    q_ptr, k_ptr, k_sum_ptr, v_ptr, k_initial_ptr, v_initial_ptr, ratios_ptr, slopes_ptr, do_ptr,
    lse_ptr, delta_ptr, row_marks_ptr, written_ptr, rows_ptr, num_rows, num_queries, num_context, num_ratios, scale,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_kst, stride_ksh, stride_vt, stride_vh,
    stride_k0t, stride_k0h, stride_v0t, stride_v0h, stride_dot, stride_doh, stride_ot, stride_oh,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Marked rows of the output, or where there is `do` of dq, again.

    Grid: (tiles of queries, query heads). Reads a byte a row where none is marked.
    """
    query_0, head = tl.program_id(0) * BLOCK_M, tl.program_id(1)
    queries = query_0 + tl.arange(0, BLOCK_M)
    row_marks_ptr += tl.cast(head, tl.int64) * num_queries
    marks = tl.load(row_marks_ptr + queries, mask=queries < num_queries, other=0).to(tl.int32)
    if tl.max(marks, 0) > 0:
        group = tl.cast(head // GROUP, tl.int64)
        for query in range(query_0, tl.minimum(query_0 + BLOCK_M, num_queries)):
            row = query + num_rows - num_queries
            lse = tl.load(lse_ptr + offsets(query, head, 1, num_queries))
            delta, do, slope = 0.0, None, None
            if do_ptr is not None:
                offs_tile = packed_base(head // GROUP, num_queries, GROUP) + tl.cast(query, tl.int64) * GROUP
                delta = tl.load(delta_ptr + offs_tile + head % GROUP)
                do = load_row(do_ptr, query, head, stride_dot, stride_doh, HEAD_DIM, BLOCK_D)
            if slopes_ptr is not None:
                slope = tl.load(slopes_ptr + head).to(tl.float32)
            if (tl.load(row_marks_ptr + query) != 0) & ((lse + delta) * 0.0 == 0.0):
                q = load_row(q_ptr, query, head, stride_qt, stride_qh, HEAD_DIM, BLOCK_D)
                if row < num_context:
                    result = isolated_row(
                        row, q, do, lse, delta, None, k_ptr + group * stride_kh, v_ptr + group * stride_vh,
                        None, None, None, rows_ptr, num_rows, num_ratios, scale, stride_kt, stride_vt, 0, 0,
                        False, HEAD_DIM, BLOCK_D, BLOCK_N,
                    )  # fmt: skip
                else:
                    k_0, v_0 = None, None
                    if ratios_ptr is not None:
                        k_0, v_0 = k_initial_ptr + group * stride_k0h, v_initial_ptr + group * stride_v0h
                    result = isolated_row(
                        row, q, do, lse, delta, slope, k_sum_ptr + group * stride_ksh, v_ptr + group * stride_vh,
                        k_0, v_0, ratios_ptr, rows_ptr, num_rows, num_ratios, scale,
                        stride_kst, stride_vt, stride_k0t, stride_v0t, True, HEAD_DIM, BLOCK_D, BLOCK_N,
                    )  # fmt: skip
                if do_ptr is not None:
                    result *= scale
                store_row(written_ptr, offsets(query, head, stride_ot, stride_oh), result, HEAD_DIM, BLOCK_D)


@triton.jit
def seen_by_finite(lse_tile_ptr, delta_ptr, base, first, stop, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """Whether log-sum-exp and delta of all heads of the queries `[first, stop)` are finite."""
    zeros = tl.zeros([BLOCK_M], tl.float32)
    for lane_0 in range(first * GROUP, stop * GROUP, BLOCK_M):
        lane = lane_0 + tl.arange(0, BLOCK_M)
        seen = lane < stop * GROUP
        zeros += tl.load(lse_tile_ptr + base + lane, mask=seen, other=0.0) * 0.0
        zeros += tl.load(delta_ptr + base + lane, mask=seen, other=0.0) * 0.0
    return tl.sum(zeros, 0) == 0.0


@triton.jit
def isolated_key(
    key, first_row, stop_row, group, k, v, k_initial, v_initial,
    q_ptr, do_ptr, lse_tile_ptr, delta_ptr, ratios_ptr, slopes_ptr, rows_ptr, num_rows, num_queries, num_ratios, scale,
    stride_qt, stride_qh, stride_dot, stride_doh,
    NATURAL: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """`dk, dv, dk_initial, dv_initial [BLOCK_D]` of a context key from the rows `[first_row, stop_row)`, which see it."""
    dk, dv = tl.zeros([BLOCK_D], tl.float32), tl.zeros([BLOCK_D], tl.float32)
    dk_initial, dv_initial = tl.zeros([BLOCK_D], tl.float32), tl.zeros([BLOCK_D], tl.float32)
    num_tiles = tl.cdiv(stop_row - first_row, BLOCK_M)
    for i in range(0, num_tiles * GROUP):
        row = first_row + i % num_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
        seen, query, head = row < stop_row, row - (num_rows - num_queries), group * GROUP + i // num_tiles
        q = load_tile(q_ptr, offsets(query, head, stride_qt, stride_qh), seen, HEAD_DIM, BLOCK_D, True)
        do = load_tile(do_ptr, offsets(query, head, stride_dot, stride_doh), seen, HEAD_DIM, BLOCK_D, True)
        q, do = q.to(tl.float32), do.to(tl.float32)
        base = packed_base(group, num_queries, GROUP) + i // num_tiles
        offs_tile = base + tl.cast(query, tl.int64) * GROUP
        lse = to_natural(tl.load(lse_tile_ptr + offs_tile, mask=seen, other=0.0), NATURAL)
        delta = tl.load(delta_ptr + offs_tile, mask=seen, other=0.0)
        s, dp = tl.sum(q * k[None, :], 1), tl.sum(do * v[None, :], 1)
        if ratios_ptr is not None:
            reset_id = load_field(rows_ptr, RESET_ID, num_rows, row, seen)
            key_reset_id = tl.load(field(rows_ptr, RESET_ID, num_rows) + key)
            ratio = reset_ratio(ratios_ptr, num_ratios, reset_id, key_reset_id)
            s = blend(s, tl.sum(q * k_initial[None, :], 1), ratio)
            dp = blend(dp, tl.sum(do * v_initial[None, :], 1), ratio)
        s *= scale
        if slopes_ptr is not None:
            start = load_field(rows_ptr, START, num_rows, row, seen)
            stop = load_field(rows_ptr, STOP, num_rows, row, seen)
            prefix_stop = load_field(rows_ptr, PREFIX_STOP, num_rows, row, seen)
            s -= tl.load(slopes_ptr + head).to(tl.float32) * alibi_distance(key, prefix_stop, start, stop)
        p = tl.where(seen, tl.exp(s - lse), 0.0)
        ds = tl.where(seen, p * (dp - delta), 0.0)
        if ratios_ptr is not None:
            dk_initial += tl.sum((ratio * ds)[:, None] * q, 0)
            dv_initial += tl.sum((ratio * p)[:, None] * do, 0)
            p *= 1.0 - ratio
            ds *= 1.0 - ratio
        dk += tl.sum(ds[:, None] * q, 0)
        dv += tl.sum(p[:, None] * do, 0)
    return dk * scale, dv, dk_initial * scale, dv_initial


@triton.jit(do_not_specialize=PER_BATCH)
def isolated_keys_kernel(
    q_ptr, k_ptr, k_sum_ptr, v_ptr, k_initial_ptr, v_initial_ptr, ratios_ptr, slopes_ptr, do_ptr,
    lse_tile_ptr, delta_ptr, context_marks_ptr, sum_marks_ptr, dk_ptr, dv_ptr, dk_sum_ptr, dk_initial_ptr, dv_initial_ptr,
    rows_ptr, keys_ptr, num_rows, num_queries, num_context, num_ratios, scale,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_kst, stride_ksh, stride_vt, stride_vh,
    stride_k0t, stride_k0h, stride_v0t, stride_v0h, stride_dot, stride_doh, stride_dkt, stride_dkh,
    NATURAL: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradients of marked context keys and values again. `context_marks_ptr` is None where context rows have no queries, `sum_marks_ptr`
    where there are no [SUM] rows.

    Grid: (tiles of keys, key heads). Reads one or two bytes a key where none is marked.
    """
    key_0, group = tl.program_id(0) * BLOCK_N, tl.program_id(1)
    keys = key_0 + tl.arange(0, BLOCK_N)
    inside = keys < num_context
    offs_marks = tl.cast(group, tl.int64) * num_context
    marks = tl.zeros([BLOCK_N], tl.int32)
    if context_marks_ptr is not None:
        marks += tl.load(context_marks_ptr + offs_marks + keys, mask=inside, other=0)
    if sum_marks_ptr is not None:
        marks += tl.load(sum_marks_ptr + offs_marks + keys, mask=inside, other=0)
    if tl.max(marks, 0) > 0:
        base, skipped = packed_base(group, num_queries, GROUP), num_rows - num_queries
        for key in range(key_0, tl.minimum(key_0 + BLOCK_N, num_context)):
            offs_dk = offsets(key, group, stride_dkt, stride_dkh)
            v = load_row(v_ptr, key, group, stride_vt, stride_vh, HEAD_DIM, BLOCK_D)
            dv = tl.zeros([BLOCK_D], tl.float32)
            marked = tl.sum(tl.where(keys == key, marks, 0), 0) > 0
            finite = marked  # and seen by rows that are finite
            if context_marks_ptr is not None:
                stop = tl.load(field(keys_ptr, ROW_STOP, num_context) + key)
                by_context = marked & seen_by_finite(lse_tile_ptr, delta_ptr, base, key, stop, GROUP, BLOCK_M)
                finite = by_context
                if by_context:
                    k = load_row(k_ptr, key, group, stride_kt, stride_kh, HEAD_DIM, BLOCK_D)
                    dk, dv_context, _, _ = isolated_key(
                        key, key, stop, group, k, v, k, v,
                        q_ptr, do_ptr, lse_tile_ptr, delta_ptr, None, None, rows_ptr, num_rows, num_queries, 0, scale,
                        stride_qt, stride_qh, stride_dot, stride_doh, NATURAL, GROUP, HEAD_DIM, BLOCK_D, BLOCK_M,
                    )  # fmt: skip
                    store_row(dk_ptr, offs_dk, dk, HEAD_DIM, BLOCK_D)
                    dv += dv_context
            if sum_marks_ptr is not None:
                sum_first = num_context + tl.load(field(keys_ptr, SUM_START, num_context) + key)
                sum_stop = num_context + tl.load(field(keys_ptr, SUM_STOP, num_context) + key)
                by_sums = marked & seen_by_finite(
                    lse_tile_ptr, delta_ptr, base, sum_first - skipped, sum_stop - skipped, GROUP, BLOCK_M
                )
                finite = finite & by_sums
                if by_sums:
                    k_sum = load_row(k_sum_ptr, key, group, stride_kst, stride_ksh, HEAD_DIM, BLOCK_D)
                    k_0, v_0 = k_sum, v
                    if ratios_ptr is not None:
                        k_0 = load_row(k_initial_ptr, key, group, stride_k0t, stride_k0h, HEAD_DIM, BLOCK_D)
                        v_0 = load_row(v_initial_ptr, key, group, stride_v0t, stride_v0h, HEAD_DIM, BLOCK_D)
                    dk_sum, dv_sum, dk_initial, dv_initial = isolated_key(
                        key, sum_first, sum_stop, group, k_sum, v, k_0, v_0, q_ptr, do_ptr, lse_tile_ptr, delta_ptr,
                        ratios_ptr, slopes_ptr, rows_ptr, num_rows, num_queries, num_ratios, scale,
                        stride_qt, stride_qh, stride_dot, stride_doh, True, GROUP, HEAD_DIM, BLOCK_D, BLOCK_M,
                    )  # fmt: skip
                    store_row(dk_sum_ptr, offs_dk, dk_sum, HEAD_DIM, BLOCK_D)
                    if ratios_ptr is not None:
                        store_row(dk_initial_ptr, offs_dk, dk_initial, HEAD_DIM, BLOCK_D)
                        store_row(dv_initial_ptr, offs_dk, dv_initial, HEAD_DIM, BLOCK_D)
                    dv += dv_sum
            if finite:
                store_row(dv_ptr, offs_dk, dv, HEAD_DIM, BLOCK_D)
