"""Backward kernels of [SUM] rows: dQ and the slopes' summands over tiles of rows, dK/dV over tiles of context keys, and dK/dV of their
own keys (the maths: `backward.py`)."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from dti_kernels.gpu.isolation import mark
from dti_kernels.gpu.tile import (
    PER_BATCH,
    RESET_ID,
    SUM_START,
    SUM_STOP,
    alibi_distance,
    blend,
    exponential,
    inner,
    key_ranges,
    lane_offsets,
    load_field,
    load_keys,
    load_tile,
    offsets,
    packed_offsets,
    program_rows,
    reset_ratio,
    row_spans,
    store_tile,
    sum_scores,
    tile_of_loop,
    tile_rows,
    visible,
)


@triton.jit(do_not_specialize=PER_BATCH)
def sum_dq_kernel(
    q_ptr, k_sum_ptr, v_ptr, k_initial_ptr, v_initial_ptr, ratios_ptr, slopes_ptr,
    out_ptr, do_ptr, lse_ptr, delta_ptr, lse_tile_ptr, dq_ptr, dslopes_ptr, row_marks_ptr, rows_ptr,
    num_rows, num_queries, num_context, num_ratios, scale,
    stride_qt, stride_qh, stride_kst, stride_ksh, stride_vt, stride_vh,
    stride_k0t, stride_k0h, stride_v0t, stride_v0h, stride_ot, stride_oh, stride_dot, stride_doh,
    GROUP: tl.constexpr, PACK: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq, delta and the slope gradient's summands of BLOCK_M // PACK [SUM] rows of PACK heads.

    Grid: (tiles of [SUM] rows, query heads / PACK). Reads q, do, out and the rows' own k, v once, and k, v (with a reset
    also the initial ones) over the tile's span; writes dq, delta and `dslopes (H, S)` once.
    """
    first, last, row, head, valid = program_rows(num_context, num_rows, PACK, BLOCK_M)
    query = row - (num_rows - num_queries)
    spans = row_spans(rows_ptr, num_rows, row, valid)
    q = load_tile(q_ptr, offsets(query, head, stride_qt, stride_qh), valid, HEAD_DIM, BLOCK_D, True)
    do = load_tile(do_ptr, offsets(query, head, stride_dot, stride_doh), valid, HEAD_DIM, BLOCK_D, True)
    out = load_tile(out_ptr, offsets(query, head, stride_ot, stride_oh), valid, HEAD_DIM, BLOCK_D, True)
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
    lse = tl.load(lse_ptr + offsets(query, head, 1, num_queries), mask=valid, other=0.0)
    group = tl.program_id(1) * PACK // GROUP
    first_query = first - (num_rows - num_queries)
    offs_tile = packed_offsets(query, group, head - group * GROUP, first_query, num_queries, GROUP, PACK)
    tl.store(delta_ptr + offs_tile, delta, mask=valid)
    tl.store(lse_tile_ptr + offs_tile, lse, mask=valid)
    ranges = key_ranges(rows_ptr, num_rows, first, last, BLOCK_N)
    num_tiles = ranges[4] + tl.cdiv(ranges[3] - ranges[2], BLOCK_N)
    k_sum_ptr += tl.cast(group, tl.int64) * stride_ksh
    v_ptr += tl.cast(group, tl.int64) * stride_vh
    offs_self = offsets(row, 0, stride_kst, 0)
    k_self = load_tile(k_sum_ptr, offs_self, valid, HEAD_DIM, BLOCK_D, True).to(tl.float32)
    v_self = load_tile(v_ptr, offsets(row, 0, stride_vt, 0), valid, HEAD_DIM, BLOCK_D, True).to(tl.float32)
    p_self = exponential(tl.sum(q.to(tl.float32) * k_self, 1) * scale - lse, True)
    ds_self = p_self * (tl.sum(do.to(tl.float32) * v_self, 1) - delta)
    dq = ds_self[:, None] * k_self
    dslope = tl.zeros([BLOCK_M], tl.float32)
    mean_distance = tl.zeros([BLOCK_M], tl.float32)
    ds_total = ds_self
    slope, reset_id = None, None
    if slopes_ptr is not None:
        slope = tl.load(slopes_ptr + head).to(tl.float32)
    if ratios_ptr is not None:
        k_initial_ptr += tl.cast(group, tl.int64) * stride_k0h
        v_initial_ptr += tl.cast(group, tl.int64) * stride_v0h
        reset_id = load_field(rows_ptr, RESET_ID, num_rows, row, valid)

    for i in range(0, num_tiles):
        key_0, inside, k, v, k_initial, ratio, s, distance, seen = sum_scores(
            i, ranges, spans, reset_id, slope, q, k_sum_ptr, v_ptr, k_initial_ptr, ratios_ptr, rows_ptr, num_rows, num_ratios, scale,
            stride_kst, stride_vt, stride_k0t, HEAD_DIM, BLOCK_D, BLOCK_N,
        )  # fmt: skip
        dp = inner(do, v)
        if ratios_ptr is not None:
            v_initial = load_keys(v_initial_ptr, key_0, stride_v0t, inside, HEAD_DIM, BLOCK_D, True)
            dp = blend(dp, inner(do, v_initial), ratio)
        p = tl.where(seen, exponential(s - lse[:, None], True), 0.0)
        # The slopes' summands are not computed again: 0 x inf must not reach them.
        ds = tl.where(seen, p * (dp - delta[:, None]), 0.0)
        if slopes_ptr is not None:
            dslope -= tl.sum(ds * distance, 1)
            mean_distance += tl.sum(p * distance, 1)
            ds_total += tl.sum(ds, 1)
        if ratios_ptr is not None:
            dq = tl.dot((ratio * ds).to(k.dtype), k_initial, dq, input_precision="ieee")
            ds *= 1.0 - ratio
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")

    store_tile(dq_ptr, offsets(query, head, stride_ot, stride_oh), valid, dq * scale, HEAD_DIM, BLOCK_D)
    mark(row_marks_ptr, offsets(query, head, 1, num_queries), valid, dq)
    if slopes_ptr is not None:
        offs_dslopes = offsets(row - num_context, head, 1, num_rows - num_context)
        # ds would add up to zero if delta were exact, but it comes from the rounded output: distances of hundreds of tokens
        # would multiply that error.
        tl.store(dslopes_ptr + offs_dslopes, dslope + ds_total * mean_distance, mask=valid)


@triton.jit(do_not_specialize=PER_BATCH)
def sum_dkv_kernel(
    q_ptr, k_sum_ptr, v_ptr, k_initial_ptr, v_initial_ptr, ratios_ptr, slopes_ptr,
    do_ptr, lse_tile_ptr, delta_ptr, dk_sum_ptr, dv_sum_ptr, dk_initial_ptr, dv_initial_ptr, sum_marks_ptr, rows_ptr, keys_ptr,
    num_rows, num_queries, num_context, num_ratios, scale,
    stride_qt, stride_qh, stride_kst, stride_ksh, stride_vt, stride_vh,
    stride_k0t, stride_k0h, stride_v0t, stride_v0h, stride_dot, stride_doh, stride_dkt, stride_dkh,
    GROUP: tl.constexpr, PACK: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradients of BLOCK_N context keys of one key head from [SUM] rows: dk of their key stream, dv in float32, and with a reset
    dk_initial and dv_initial.

    Grid: (tiles of keys, key heads). Reads the key streams once and q, do, lse, delta of the [SUM] rows that see the tile,
    for every head of the group; writes each gradient once.
    """
    key_0 = tl.program_id(0) * BLOCK_N
    key = key_0 + tl.arange(0, BLOCK_N)
    inside = key < num_context
    group = tl.program_id(1)
    k = load_tile(k_sum_ptr, offsets(key, group, stride_kst, stride_ksh), inside, HEAD_DIM, BLOCK_D, True)
    v = load_tile(v_ptr, offsets(key, group, stride_vt, stride_vh), inside, HEAD_DIM, BLOCK_D, True)
    sum_start = load_field(keys_ptr, SUM_START, num_context, key, inside)
    sum_stop = load_field(keys_ptr, SUM_STOP, num_context, key, inside)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    if ratios_ptr is not None:
        offs_k0 = offsets(key, group, stride_k0t, stride_k0h)
        k_initial = load_tile(k_initial_ptr, offs_k0, inside, HEAD_DIM, BLOCK_D, True)
        offs_v0 = offsets(key, group, stride_v0t, stride_v0h)
        v_initial = load_tile(v_initial_ptr, offs_v0, inside, HEAD_DIM, BLOCK_D, True)
        key_reset_id = load_field(rows_ptr, RESET_ID, num_rows, key, inside)
        dk_initial = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        dv_initial = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    first_sum = tl.min(tl.where(inside, sum_start, num_rows), 0)
    num_tiles = tl.maximum(tl.cdiv(tl.max(sum_stop, 0) - first_sum, BLOCK_M // PACK), 0)

    lanes = tl.arange(0, BLOCK_M)
    offs_q = lane_offsets(lanes, stride_qt, stride_qh, PACK)
    offs_do = lane_offsets(lanes, stride_dot, stride_doh, PACK)

    for i in range(0, num_tiles * (GROUP // PACK)):
        tile, head_0 = tile_of_loop(i, num_tiles, GROUP, PACK)
        first = num_context + first_sum + tile * (BLOCK_M // PACK)
        row, lane = tile_rows(first, num_rows, PACK, BLOCK_M)
        valid = row < num_rows
        query, query_0 = row - (num_rows - num_queries), first - (num_rows - num_queries)
        base_q = offsets(query_0, group * GROUP + head_0, stride_qt, stride_qh)
        base_do = offsets(query_0, group * GROUP + head_0, stride_dot, stride_doh)
        q = load_tile(q_ptr + base_q, offs_q, valid, HEAD_DIM, BLOCK_D, True)  # [M, D]
        do = load_tile(do_ptr + base_do, offs_do, valid, HEAD_DIM, BLOCK_D, True)
        offs_tile = packed_offsets(query, group, head_0 + lane, query_0, num_queries, GROUP, PACK)
        lse = tl.load(lse_tile_ptr + offs_tile, mask=valid, other=0.0)
        delta = tl.load(delta_ptr + offs_tile, mask=valid, other=0.0)
        s = inner(k, q)  # [N, M]
        if ratios_ptr is not None:
            reset_id = load_field(rows_ptr, RESET_ID, num_rows, row, valid)
            ratio = reset_ratio(ratios_ptr, num_ratios, reset_id[None, :], key_reset_id[:, None])
            s = blend(s, inner(k_initial, q), ratio)
        dp = inner(v, do)
        if ratios_ptr is not None:
            dp = blend(dp, inner(v_initial, do), ratio)
        s = s * scale
        if slopes_ptr is not None:
            spans = row_spans(rows_ptr, num_rows, row, valid)
            slope = tl.load(slopes_ptr + group * GROUP + head_0 + lane).to(tl.float32)
            distance = alibi_distance(key[:, None], spans[1][None, :], spans[2][None, :], spans[3][None, :])
            s -= slope[None, :] * distance
        seen = visible((row - num_context)[None, :], sum_start[:, None], sum_stop[:, None])
        p = tl.where(seen, exponential(s - lse[None, :], True), 0.0)
        ds = p * (dp - delta[None, :])
        if ratios_ptr is not None:
            dv_initial = tl.dot((ratio * p).to(do.dtype), do, dv_initial, input_precision="ieee")
            dk_initial = tl.dot((ratio * ds).to(q.dtype), q, dk_initial, input_precision="ieee")
            p *= 1.0 - ratio
            ds *= 1.0 - ratio
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")

    offs_dk = offsets(key, group, stride_dkt, stride_dkh)
    store_tile(dk_sum_ptr, offs_dk, inside, dk * scale, HEAD_DIM, BLOCK_D)
    store_tile(dv_sum_ptr, offs_dk, inside, dv, HEAD_DIM, BLOCK_D)
    if ratios_ptr is not None:
        store_tile(dk_initial_ptr, offs_dk, inside, dk_initial * scale, HEAD_DIM, BLOCK_D)
        store_tile(dv_initial_ptr, offs_dk, inside, dv_initial, HEAD_DIM, BLOCK_D)
        dk += dk_initial
        dv += dv_initial
    mark(sum_marks_ptr, offsets(key, group, 1, num_context), inside, dk + dv)


@triton.jit(do_not_specialize=PER_BATCH)
def sum_self_kernel(
    q_ptr, k_sum_ptr, v_ptr, do_ptr, lse_tile_ptr, delta_ptr, dk_ptr, dk_sum_ptr, dv_ptr,
    num_rows, num_queries, num_context, scale,
    stride_qt, stride_qh, stride_kst, stride_ksh, stride_vt, stride_vh, stride_dot, stride_doh, stride_dkt, stride_dkh,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Gradients of the own keys and values of BLOCK_M [SUM] rows of one key head, and zeros for the keys nobody reads.

    Grid: (tiles of [SUM] rows, key heads). Reads q, do, lse, delta of every head of the group and k, v once; writes the
    [SUM] rows of dk_sum, dv and dk once.
    """
    row = num_context + tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = row < num_rows
    query = row - (num_rows - num_queries)
    group = tl.program_id(1)
    k = load_tile(k_sum_ptr, offsets(row, group, stride_kst, stride_ksh), valid, HEAD_DIM, BLOCK_D, True)
    v = load_tile(v_ptr, offsets(row, group, stride_vt, stride_vh), valid, HEAD_DIM, BLOCK_D, True)
    k, v = k.to(tl.float32), v.to(tl.float32)
    dk = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for i in range(0, GROUP):
        head = group * GROUP + i
        q = load_tile(q_ptr, offsets(query, head, stride_qt, stride_qh), valid, HEAD_DIM, BLOCK_D, True)
        do = load_tile(do_ptr, offsets(query, head, stride_dot, stride_doh), valid, HEAD_DIM, BLOCK_D, True)
        q, do = q.to(tl.float32), do.to(tl.float32)
        offs_tile = packed_offsets(query, group, i, 0, num_queries, GROUP, 0)
        lse = tl.load(lse_tile_ptr + offs_tile, mask=valid, other=0.0)
        delta = tl.load(delta_ptr + offs_tile, mask=valid, other=0.0)
        p = exponential(tl.sum(q * k, 1) * scale - lse, True)
        dv += p[:, None] * do
        dk += (p * (tl.sum(do * v, 1) - delta))[:, None] * q
    offs_dk = offsets(row, group, stride_dkt, stride_dkh)
    store_tile(dk_sum_ptr, offs_dk, valid, dk * scale, HEAD_DIM, BLOCK_D)
    store_tile(dv_ptr, offs_dk, valid, dv, HEAD_DIM, BLOCK_D)
    store_tile(dk_ptr, offs_dk, valid, tl.zeros([BLOCK_M, BLOCK_D], tl.float32), HEAD_DIM, BLOCK_D)
