"""Forward kernels: one launch over context rows, one over [SUM] rows, and one over the rows that turned out not to be finite.

    m, l, acc = running maximum, sum of exp2(s - m) and sum of exp2(s - m) v       out = acc / l,  lse = m ln 2 + ln l

exp2 serves as exponential. In 16 bits, scores of context rows carry log2(e) from the start, which leaves one instruction
before exp2; those of [SUM] rows are natural, because a large ALiBi term times a rounded slope * log2(e) would cost digits.
A [SUM]'s own key initialises the running softmax (m = s_self, l = 1, acc = v_self): no extra tile, and no row without a key.
A context row always sees itself.

Cost: the keys of a tile's span are read once per tile of rows; scores never leave the registers.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dti_kernels.gpu.isolation import ROWS_TILE, isolated_rows_kernel, mark
from dti_kernels.gpu.launch import Arguments, Batch, Launch, strides
from dti_kernels.gpu.replay import distinct, plan_of
from dti_kernels.gpu.tile import (
    LN2,
    PER_BATCH,
    RESET_ID,
    exponential,
    inner,
    key_ranges,
    load_field,
    load_keys,
    load_tile,
    masked_keys,
    num_of_one_range,
    offsets,
    program_rows,
    row_spans,
    store_tile,
    sum_scores,
    to_exponent,
    to_natural,
)
from dti_kernels.inputs import Inputs


@triton.jit
def accumulate(s, v, m_i, l_i, acc, exponent_scale, NATURAL: tl.constexpr, MASKED: tl.constexpr):
    """Maximum, sum and weighted values after a tile of scores `[M, N]`.

    MASKED scores are scaled already, and -inf where a row does not see the key; a row may have seen none yet.
    """
    if MASKED:
        m_new = tl.maximum(m_i, tl.max(s, 1))
        pivot = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = exponential(s - pivot[:, None], NATURAL)
    else:
        m_new = tl.maximum(m_i, tl.max(s, 1) * exponent_scale)
        pivot = m_new
        p = exponential(s * exponent_scale - pivot[:, None], NATURAL)
    alpha = exponential(m_i - pivot, NATURAL)
    l_i = l_i * alpha + tl.sum(p, 1)
    return m_new, l_i, tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")


@triton.jit(do_not_specialize=PER_BATCH)
def ctx_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, row_marks_ptr, rows_ptr, num_rows, num_context, scale,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh,
    GROUP: tl.constexpr, PACK: tl.constexpr, HEAD_DIM: tl.constexpr, NATURAL: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of BLOCK_M // PACK context rows of PACK heads.

    Grid: (tiles of context rows, query heads / PACK). Reads q once and k, v over the tile's span; writes out and lse once.
    """
    first, last, row, head, valid = program_rows(0, num_context, PACK, BLOCK_M)
    q = load_tile(q_ptr, offsets(row, head, stride_qt, stride_qh), valid, HEAD_DIM, BLOCK_D, True)
    ranges = key_ranges(rows_ptr, num_rows, first, last, BLOCK_N)
    key_first, num_left, num_full, num_masked = ranges[2], ranges[5], ranges[6], ranges[7]
    group = tl.cast(tl.program_id(1) * PACK // GROUP, tl.int64)
    k_ptr += group * stride_kh
    v_ptr += group * stride_vh
    offs_n = tl.arange(0, BLOCK_N)
    exponent_scale = to_exponent(scale, NATURAL)
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    full_first = key_first + num_left * BLOCK_N
    if AHEAD:
        # The next tile is multiplied while this one's softmax runs. There is no branch around the loop: ptxas would wait for every matrix
        # instruction by itself. If no tile is full, the one behind the loop has masked loads and probabilities of zero.
        any_full = offs_n < num_full * BLOCK_N
        k = load_keys(k_ptr, full_first, stride_kt, any_full, HEAD_DIM, BLOCK_D, True)  # [N, D]
        s = inner(q, k)  # [M, N]
        for i in range(1, num_full):
            key_0 = full_first + i * BLOCK_N
            k = load_keys(k_ptr, key_0, stride_kt, offs_n, HEAD_DIM, BLOCK_D, False)
            v = load_keys(v_ptr, key_0 - BLOCK_N, stride_vt, offs_n, HEAD_DIM, BLOCK_D, False)
            s_next = inner(q, k)
            m_i, l_i, acc = accumulate(s, v, m_i, l_i, acc, exponent_scale, NATURAL, False)
            s = s_next
        last_full = full_first + (num_full - 1) * BLOCK_N
        v = load_keys(v_ptr, last_full, stride_vt, any_full, HEAD_DIM, BLOCK_D, True)
        s = tl.where(num_full > 0, s * exponent_scale, float("-inf"))
        m_i, l_i, acc = accumulate(s, v, m_i, l_i, acc, exponent_scale, NATURAL, True)
    else:
        for i in range(0, num_full):
            key_0 = full_first + i * BLOCK_N
            k = load_keys(k_ptr, key_0, stride_kt, offs_n, HEAD_DIM, BLOCK_D, False)
            v = load_keys(v_ptr, key_0, stride_vt, offs_n, HEAD_DIM, BLOCK_D, False)
            s = inner(q, k)
            m_i, l_i, acc = accumulate(s, v, m_i, l_i, acc, exponent_scale, NATURAL, False)

    spans = row_spans(rows_ptr, num_rows, row, valid)  # loaded here: no registers held above
    num_simple = num_of_one_range(rows_ptr, num_rows, first, last, num_masked)
    for TWO_RANGES in tl.static_range(0, 2):
        for i in range(num_simple if TWO_RANGES else 0, num_masked if TWO_RANGES else num_simple):
            key_0, inside, seen = masked_keys(i, ranges, spans, TWO_RANGES, BLOCK_N)
            k = load_keys(k_ptr, key_0, stride_kt, inside, HEAD_DIM, BLOCK_D, True)
            v = load_keys(v_ptr, key_0, stride_vt, inside, HEAD_DIM, BLOCK_D, True)
            s = tl.where(seen, inner(q, k) * exponent_scale, float("-inf"))
            m_i, l_i, acc = accumulate(s, v, m_i, l_i, acc, exponent_scale, NATURAL, True)

    total = tl.where(valid, l_i, 1.0)
    out, offs_row = acc / total[:, None], offsets(row, head, 1, num_rows)
    store_tile(out_ptr, offsets(row, head, stride_ot, stride_oh), valid, out, HEAD_DIM, BLOCK_D)
    tl.store(lse_ptr + offs_row, to_natural(m_i, NATURAL) + tl.log2(total) * LN2, mask=valid)
    mark(row_marks_ptr, offs_row, valid, out)


@triton.jit(do_not_specialize=PER_BATCH)
def sum_fwd_kernel(
    q_ptr, k_sum_ptr, v_ptr, k_initial_ptr, v_initial_ptr, ratios_ptr, slopes_ptr, out_ptr, lse_ptr, row_marks_ptr, rows_ptr,
    num_rows, num_queries, num_context, num_ratios, scale,
    stride_qt, stride_qh, stride_kst, stride_ksh, stride_vt, stride_vh,
    stride_k0t, stride_k0h, stride_v0t, stride_v0h, stride_ot, stride_oh,
    GROUP: tl.constexpr, PACK: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of BLOCK_M // PACK [SUM] rows of PACK heads.

    Grid: (tiles of [SUM] rows, query heads / PACK). Reads q and the rows' own k, v once, and k, v (with a reset also the
    initial ones) over the tile's span; writes out and lse once.
    """
    first, last, row, head, valid = program_rows(num_context, num_rows, PACK, BLOCK_M)
    query = row - (num_rows - num_queries)
    spans = row_spans(rows_ptr, num_rows, row, valid)
    q = load_tile(q_ptr, offsets(query, head, stride_qt, stride_qh), valid, HEAD_DIM, BLOCK_D, True)
    ranges = key_ranges(rows_ptr, num_rows, first, last, BLOCK_N)
    num_tiles = ranges[4] + tl.cdiv(ranges[3] - ranges[2], BLOCK_N)
    group = tl.cast(tl.program_id(1) * PACK // GROUP, tl.int64)
    k_sum_ptr += group * stride_ksh
    v_ptr += group * stride_vh
    k_self = load_tile(k_sum_ptr, offsets(row, 0, stride_kst, 0), valid, HEAD_DIM, BLOCK_D, True)
    v_self = load_tile(v_ptr, offsets(row, 0, stride_vt, 0), valid, HEAD_DIM, BLOCK_D, True)
    m_i = tl.sum(q.to(tl.float32) * k_self.to(tl.float32), 1) * scale
    l_i = tl.full([BLOCK_M], 1.0, tl.float32)
    acc = v_self.to(tl.float32)
    slope, reset_id = None, None
    if slopes_ptr is not None:
        slope = tl.load(slopes_ptr + head).to(tl.float32)
    if ratios_ptr is not None:
        k_initial_ptr += group * stride_k0h
        v_initial_ptr += group * stride_v0h
        reset_id = load_field(rows_ptr, RESET_ID, num_rows, row, valid)

    for i in range(0, num_tiles):
        key_0, inside, _, v, _, ratio, s, _, seen = sum_scores(
            i, ranges, spans, reset_id, slope, q, k_sum_ptr, v_ptr, k_initial_ptr, ratios_ptr, rows_ptr, num_rows, num_ratios, scale,
            stride_kst, stride_vt, stride_k0t, HEAD_DIM, BLOCK_D, BLOCK_N,
        )  # fmt: skip
        s = tl.where(seen, s, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(s, 1))
        p = exponential(s - m_new[:, None], True)
        alpha = exponential(m_i - m_new, True)
        l_i = l_i * alpha + tl.sum(p, 1)
        m_i = m_new
        acc *= alpha[:, None]
        if ratios_ptr is not None:
            v_initial = load_keys(v_initial_ptr, key_0, stride_v0t, inside, HEAD_DIM, BLOCK_D, True)
            acc = tl.dot((p * ratio).to(v.dtype), v_initial, acc, input_precision="ieee")
            p *= 1.0 - ratio
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")

    out, offs_row = acc / l_i[:, None], offsets(query, head, 1, num_queries)
    store_tile(out_ptr, offsets(query, head, stride_ot, stride_oh), valid, out, HEAD_DIM, BLOCK_D)
    tl.store(lse_ptr + offs_row, m_i + tl.log2(l_i) * LN2, mask=valid)
    mark(row_marks_ptr, offs_row, valid, out)


def forward_launches(batch: Batch, out: Tensor, lse: Tensor, row_marks: Tensor | None = None) -> list[Launch]:
    """The launches that fill `out` and `lse`; both must be contiguous. `row_marks`: memory for a byte a row and head; None: new memory."""
    if row_marks is None:
        row_marks = torch.empty_like(lse, dtype=torch.int8)
    arguments: Arguments = {"out_ptr": out, "lse_ptr": lse, "row_marks_ptr": row_marks, **strides(o=out)}
    # Without `do` rows are isolated in the output, with it in dq.
    arguments |= {"written_ptr": out, "do_ptr": None, "delta_ptr": None, **strides(do=None)}
    launches = []
    if batch.has_context_queries:
        launches.append(batch.over_rows(ctx_fwd_kernel, batch.num_context, arguments))
    if batch.num_sum:
        launches.append(batch.over_rows(sum_fwd_kernel, batch.num_sum, arguments))
    return [*launches, batch.over_rows(isolated_rows_kernel, len(out), arguments, ROWS_TILE)]


def run_forward(x: Inputs) -> tuple[Tensor, Tensor]:
    """`out (T or S, H, D)` in q's dtype and the natural log-sum-exp `(H, T or S)` in float32.

    Raises:
        TypeError, ValueError: as `check_inputs`, or no kernel takes q's dtype or head_dim.
    """
    plan = plan_of("forward", x)
    tensors = plan.addressable(x.tensors)
    q: Any = tensors[0]
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    row_marks = torch.empty_like(lse, dtype=torch.int8)
    if not plan.run_again((*tensors, out, lse, row_marks)):
        tensors = distinct(tensors)
        batch = Batch(x.of_tensors(tensors))
        launches = forward_launches(batch, out, lse, row_marks)
        plan.keep((*tensors, out, lse, row_marks), launches, batch.run(launches))
    return out, lse
