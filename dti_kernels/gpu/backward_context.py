"""Backward kernels of context rows: dQ over tiles of rows, dK/dV over tiles of keys (the maths: `backward.py`)."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from dti_kernels.gpu.isolation import mark
from dti_kernels.gpu.tile import (
    PER_BATCH,
    ROW_STOP,
    exponential,
    inner,
    key_ranges,
    lane_offsets,
    load_field,
    load_keys,
    load_tile,
    masked_keys,
    num_of_one_range,
    offsets,
    packed_base,
    packed_offsets,
    program_rows,
    row_spans,
    store_tile,
    tile_of_loop,
    to_exponent,
    visible,
)


@triton.jit
def accumulate_dq(dq, q, do, k, v, lse, delta, seen, exponent_scale, NATURAL: tl.constexpr):
    """dq before scaling after a tile of keys; `seen [M, N]`: which keys the rows see, None: all."""
    s = inner(q, k)  # [M, N]
    dp = inner(do, v)
    p = exponential(s * exponent_scale - lse[:, None], NATURAL)
    if seen is not None:
        p = tl.where(seen, p, 0.0)
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")


@triton.jit(do_not_specialize=PER_BATCH)
def ctx_dq_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, do_ptr, lse_ptr, delta_ptr, lse_tile_ptr, dq_ptr, row_marks_ptr, rows_ptr, num_rows, num_context, scale,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh, stride_dot, stride_doh,
    GROUP: tl.constexpr, PACK: tl.constexpr, HEAD_DIM: tl.constexpr, NATURAL: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq and delta of BLOCK_M // PACK context rows of PACK heads.

    Grid: (tiles of context rows, query heads / PACK). Reads q, do, out once and k, v over the tile's span; writes dq (laid
    out as out) and delta once.
    """
    first, last, row, head, valid = program_rows(0, num_context, PACK, BLOCK_M)
    q = load_tile(q_ptr, offsets(row, head, stride_qt, stride_qh), valid, HEAD_DIM, BLOCK_D, True)
    do = load_tile(do_ptr, offsets(row, head, stride_dot, stride_doh), valid, HEAD_DIM, BLOCK_D, True)
    out = load_tile(out_ptr, offsets(row, head, stride_ot, stride_oh), valid, HEAD_DIM, BLOCK_D, True)
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
    lse = to_exponent(tl.load(lse_ptr + offsets(row, head, 1, num_rows), mask=valid, other=0.0), NATURAL)
    group = tl.program_id(1) * PACK // GROUP
    offs_tile = packed_offsets(row, group, head - group * GROUP, first, num_rows, GROUP, PACK)
    tl.store(delta_ptr + offs_tile, delta, mask=valid)
    tl.store(lse_tile_ptr + offs_tile, lse, mask=valid)
    ranges = key_ranges(rows_ptr, num_rows, first, last, BLOCK_N)
    key_first, num_left, num_full, num_masked = ranges[2], ranges[5], ranges[6], ranges[7]
    k_ptr += tl.cast(group, tl.int64) * stride_kh
    v_ptr += tl.cast(group, tl.int64) * stride_vh
    offs_n = tl.arange(0, BLOCK_N)
    exponent_scale = to_exponent(scale, NATURAL)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    for i in range(0, num_full):
        key_0 = key_first + (num_left + i) * BLOCK_N
        k = load_keys(k_ptr, key_0, stride_kt, offs_n, HEAD_DIM, BLOCK_D, False)
        v = load_keys(v_ptr, key_0, stride_vt, offs_n, HEAD_DIM, BLOCK_D, False)
        dq = accumulate_dq(dq, q, do, k, v, lse, delta, None, exponent_scale, NATURAL)

    spans = row_spans(rows_ptr, num_rows, row, valid)  # loaded here: no registers held above
    num_simple = num_of_one_range(rows_ptr, num_rows, first, last, num_masked)
    for TWO_RANGES in tl.static_range(0, 2):
        for i in range(num_simple if TWO_RANGES else 0, num_masked if TWO_RANGES else num_simple):
            key_0, inside, seen = masked_keys(i, ranges, spans, TWO_RANGES, BLOCK_N)
            k = load_keys(k_ptr, key_0, stride_kt, inside, HEAD_DIM, BLOCK_D, True)
            v = load_keys(v_ptr, key_0, stride_vt, inside, HEAD_DIM, BLOCK_D, True)
            dq = accumulate_dq(dq, q, do, k, v, lse, delta, seen, exponent_scale, NATURAL)

    store_tile(dq_ptr, offsets(row, head, stride_ot, stride_oh), valid, dq * scale, HEAD_DIM, BLOCK_D)
    mark(row_marks_ptr, offsets(row, head, 1, num_rows), valid, dq)


@triton.jit(do_not_specialize=PER_BATCH)
def ctx_dkv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_tile_ptr, delta_ptr, dk_ptr, dv_ptr, dv_sum_ptr, context_marks_ptr, keys_ptr,
    num_rows, num_context, scale,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_dot, stride_doh, stride_dkt, stride_dkh,
    GROUP: tl.constexpr, PACK: tl.constexpr, HEAD_DIM: tl.constexpr, NATURAL: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dk and dv of BLOCK_N context keys of one key head; dv starts from what [SUM] rows contributed in float32.

    Grid: (tiles of keys, key heads). Reads k, v (and dv_sum) once and q, do, lse, delta of the context rows that see the
    tile, for every head of the group; writes dk and dv once.
    """
    key_0 = tl.program_id(0) * BLOCK_N
    key = key_0 + tl.arange(0, BLOCK_N)
    inside = key < num_context
    group = tl.program_id(1)
    k = load_tile(k_ptr, offsets(key, group, stride_kt, stride_kh), inside, HEAD_DIM, BLOCK_D, True)
    v = load_tile(v_ptr, offsets(key, group, stride_vt, stride_vh), inside, HEAD_DIM, BLOCK_D, True)
    row_stop = load_field(keys_ptr, ROW_STOP, num_context, key, inside)
    offs_dk = offsets(key, group, stride_dkt, stride_dkh)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    if dv_sum_ptr is not None:
        dv = load_tile(dv_sum_ptr, offs_dk, inside, HEAD_DIM, BLOCK_D, True)
    else:
        dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    exponent_scale = to_exponent(scale, NATURAL)
    # Rows are counted in lanes from key_0 on, PACK a row, and tiles are BLOCK_M lanes: no tile is padded where PACK does not divide it,
    # and no lane is divided by PACK to know what it sees. A key beyond the last is seen by none.
    lane = tl.arange(0, BLOCK_M)
    lane_first = (key - key_0) * PACK
    lane_stop = (tl.maximum(row_stop, key) - key_0) * PACK
    num_tiles = tl.cdiv((tl.max(row_stop, 0) - key_0) * PACK, BLOCK_M)
    offs_q = lane_offsets(lane, stride_qt, stride_qh, PACK)
    offs_do = lane_offsets(lane, stride_dot, stride_doh, PACK)

    for i in range(0, num_tiles * (GROUP // PACK)):
        tile, head_0 = tile_of_loop(i, num_tiles, GROUP, PACK)
        lane_0 = tile * BLOCK_M
        first = key_0 + lane_0 // PACK
        of_first = lane + lane_0 % PACK  # counted from the first head of the row that the tile begins in
        if BLOCK_M % PACK != 0:
            offs_q = lane_offsets(of_first, stride_qt, stride_qh, PACK)
            offs_do = lane_offsets(of_first, stride_dot, stride_doh, PACK)
        valid = of_first < tl.minimum(num_context - first, BLOCK_M) * PACK
        base_q = offsets(first, group * GROUP + head_0, stride_qt, stride_qh)
        base_do = offsets(first, group * GROUP + head_0, stride_dot, stride_doh)
        q = load_tile(q_ptr + base_q, offs_q, valid, HEAD_DIM, BLOCK_D, True)  # [M, D]
        do = load_tile(do_ptr + base_do, offs_do, valid, HEAD_DIM, BLOCK_D, True)
        base_tile = packed_base(group, num_rows, GROUP)
        if PACK == GROUP:  # no mask, which would be a predicate for every lane: what is not valid is not seen
            offs_tile = base_tile + tl.cast(key_0, tl.int64) * GROUP + lane_0 + lane
            lse = tl.load(lse_tile_ptr + offs_tile)
            delta = tl.load(delta_ptr + offs_tile)
        else:
            row = first + of_first // PACK
            offs_tile = base_tile + tl.cast(row, tl.int64) * GROUP + head_0 + of_first % PACK
            lse = tl.load(lse_tile_ptr + offs_tile, mask=valid, other=0.0)
            delta = tl.load(delta_ptr + offs_tile, mask=valid, other=0.0)
        s = inner(k, q)  # [N, M]
        p = exponential(s * exponent_scale - lse[None, :], NATURAL)
        p = tl.where(visible((lane + lane_0)[None, :], lane_first[:, None], lane_stop[:, None]), p, 0.0)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
        dp = inner(v, do)
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")

    store_tile(dk_ptr, offs_dk, inside, dk * scale, HEAD_DIM, BLOCK_D)
    store_tile(dv_ptr, offs_dk, inside, dv, HEAD_DIM, BLOCK_D)
    mark(context_marks_ptr, offsets(key, group, 1, num_context), inside, dk + dv)
