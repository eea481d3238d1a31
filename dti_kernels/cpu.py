"""Blocked attention over streaming prompts in plain PyTorch: the CPU implementation of the operators.

A block of neighbouring rows meets the keys that any of its rows sees: one slice, and the prefix where it lies apart. Several
blocks are one call (a chunk, `cpu_blocks.py`), so that operators work on megabytes and not on kilobytes. Context rows run PyTorch's
own blocked CPU attention on (block, slice) with the visibility as bias. So do [SUM] rows without ALiBi and reset, whose own key
joins afterwards through the log-sum-exp; with ALiBi or two streams, which it cannot express, they are batched matmuls. Time is
O(T x (window + block)), memory O(T) beside one chunk. Slices are accumulated in order: deterministic. Autograd over the same
blocks would allocate a full-size gradient per slice and turn quadratic.

Heads are packed into rows: M rows of the R = H / G query heads of one key head are one `(M R, D)` matrix.
Half precision is computed in float32, because CPUs without AVX512-BF16 have no fast 16-bit matmul.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from dti_kernels.cpu_blocks import Chunk, Plan, Sizes
from dti_kernels.layout import PREFIX_STOP, RESET_ID, START, STOP

# Rows of a block times query heads of a key head: few enough that most of a block's keys are visible to most of its rows. PyTorch's
# attention takes tiles of 64 rows from 192 rows on, of 32 below. [SUM] rows lie one interaction apart, so their blocks are narrower.
# Scores per chunk: what context rows never store may be larger than what [SUM] rows do, half of a core's cache (benchmarks/LOG.md).
CONTEXT_BLOCK = 192
CONTEXT_CHUNK_SCORES = 2**20
SUM_BLOCK = 32
SUM_CHUNK_SCORES = 2**17
# A prompt that every row sees from its beginning and that has as many rows is one causal call without a bias.
CAUSAL_ROWS = 32
# PyTorch's blocked CPU attention, forward and backward as two operators: what scaled_dot_product_attention calls.
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# Row fields of a layout, which are read-only, to its plans.
_PLANS: Any = WeakIdKeyDictionary()


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that scores, softmax and sums are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass
class _Inputs:
    """Inputs in the accumulation dtype, heads first: `q (G, T or S, R, D)`, the others `(G, T or C, D)`."""

    q: Tensor
    k: Tensor
    v: Tensor
    k_sum: Tensor
    k_initial: Tensor | None
    v_initial: Tensor | None
    ratios: Tensor | None
    slopes: Tensor | None  # (G, 1, 1, R, 1)
    rows: Tensor
    scale: float
    bias_buffer: list[Tensor]
    num_context: int
    num_skipped: int  # rows that have no query: 0, or C where q holds the [SUM] rows only

    @staticmethod
    def of(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        k_sum: Tensor | None,
        k_initial: Tensor | None,
        v_initial: Tensor | None,
        ratios: Tensor | None,
        slopes: Tensor | None,
        rows: Tensor,
        keys: Tensor,
        scale: float,
    ) -> _Inputs:
        dtype, num_groups = accumulation_dtype(q.dtype), k.shape[1]
        k_heads = _heads_first(k, dtype)
        return _Inputs(
            q=_grouped(q, num_groups, dtype),
            k=k_heads,
            v=_heads_first(v, dtype),
            k_sum=k_heads if k_sum is None else _heads_first(k_sum, dtype),
            k_initial=None if k_initial is None else _heads_first(k_initial, dtype),
            v_initial=None if v_initial is None else _heads_first(v_initial, dtype),
            ratios=ratios,
            slopes=None if slopes is None else slopes.to(dtype).view(num_groups, 1, 1, -1, 1),
            rows=rows,
            scale=scale,
            bias_buffer=[q.new_empty(0, dtype=dtype)],
            num_context=keys.shape[1],
            num_skipped=rows.shape[1] - q.shape[0],
        )

    @property
    def sums_are_plain(self) -> bool:
        """[SUM] rows differ from context rows in nothing but their own key."""
        return self.slopes is None and self.ratios is None

    @cached_property
    def plan(self) -> Plan:
        """How the rows are walked: the same for all layers and passes over a layout, so it is kept as long as the layout's rows."""
        num_groups, _, per_group, _ = self.q.shape
        sizes = Sizes(
            max(1, CONTEXT_BLOCK // per_group),
            CONTEXT_CHUNK_SCORES // (num_groups * per_group),
            max(1, SUM_BLOCK // per_group),
            SUM_CHUNK_SCORES // (num_groups * per_group),
            CAUSAL_ROWS,
        )
        key = (self.num_skipped, per_group, self.q.dtype, sizes)
        plans: dict[Any, Plan] = _PLANS.setdefault(self.rows, {})
        if key not in plans:
            plans[key] = Plan.of(
                self.rows, self.num_context, self.num_skipped, per_group, sizes, self.q.dtype
            )
        return plans[key]

    def causal(self, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of a prompt, `(G, R, L, D)`; keys and values are repeated without being copied."""
        repeat = (-1, self.q.shape[2], -1, -1)
        return (
            self.q[:, rows].transpose(1, 2),
            self.k[:, rows][:, None].expand(repeat),
            self.v[:, rows][:, None].expand(repeat),
        )


# Heads come first as views of (T, heads, D) memory: matmuls read strided rows as fast, and copies of whole inputs cost page
# faults. What is made like them (`empty_like`, `zeros_like`) has the same strides, so results are not copied either.
def _heads_first(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`(T, G, D)` to `(G, T, D)`."""
    return x.to(dtype).contiguous().transpose(0, 1)


def _grouped(x: Tensor, num_groups: int, dtype: torch.dtype) -> Tensor:
    """`(T, H, D)` to `(G, T, R, D)`."""
    grouped: Tensor = x.to(dtype).contiguous().unflatten(1, (num_groups, x.shape[1] // num_groups))
    return grouped.transpose(0, 1)


def _ungrouped(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`(G, T, R, D)` to contiguous `(T, H, D)`."""
    return x.transpose(0, 1).flatten(1, 2).to(dtype).contiguous()


@dataclass
class _SumTerms:
    """What a chunk of [SUM] rows needs besides its keys."""

    q: Tensor  # (G B, M R, D)
    scores: Tensor  # (G B, M R, N + 1), at most -HIDDEN where invisible; the last column is the row's own key
    k_self: Tensor  # (G B, M R, D)
    v_self: Tensor  # (G B, M R, D)
    distance: Tensor | None  # (B, M, N) ALiBi distance in tokens, where there are slopes
    ratio: Tensor | None  # (B, M, N) reset ratio a(d), where there is a reset


def _plain_forward(x: _Inputs, chunk: Chunk, keys: Tensor, out: Tensor, lse: Tensor) -> None:
    """Rows that attend to context keys as any attention does."""
    bias, query_rows = chunk.bias(x.rows, x.q.shape[2], x.bias_buffer), chunk.query_rows(x.num_skipped)
    q, k, v = chunk.by_block(x.q[:, query_rows]), chunk.gather(keys), chunk.gather(x.v)
    out_rows, lse_rows = _flash(q, k, v, 0.0, False, attn_mask=bias, scale=x.scale)
    out[:, query_rows] = chunk.from_block(out_rows, x.q.shape[2])
    lse[:, query_rows] = chunk.from_block(lse_rows[..., None], x.q.shape[2])


def _causal_forward(x: _Inputs, rows: slice, out: Tensor, lse: Tensor) -> None:
    out_rows, lse_rows = _flash(*x.causal(rows), 0.0, True, scale=x.scale)
    out[:, rows] = out_rows.transpose(1, 2)
    lse[:, rows] = lse_rows[..., None].transpose(1, 2)


def _own_key_scores(x: _Inputs) -> tuple[slice, Tensor, Tensor, Tensor]:
    """Where the [SUM] rows are among the queries, their scores with their own keys `(G, S, R, 1)`, and those keys and values."""
    sums = slice(x.num_context - x.num_skipped, None)
    k_self, v_self = x.k_sum[:, x.num_context :, None], x.v[:, x.num_context :, None]
    return sums, (x.q[:, sums] * k_self).sum(-1, keepdim=True) * x.scale, k_self, v_self


def _add_own_key(x: _Inputs, out: Tensor, lse: Tensor) -> None:
    """Let [SUM] rows, that have read their context keys, read themselves: softmax over both, from the log-sum-exp of the first."""
    sums, scores, _, v_self = _own_key_scores(x)
    p_self = torch.sigmoid(scores - lse[:, sums])
    out[:, sums] += p_self * (v_self - out[:, sums])
    lse[:, sums] = torch.logaddexp(lse[:, sums], scores)


def _sum_terms(x: _Inputs, chunk: Chunk) -> _SumTerms:
    q = chunk.blocks(x.q[:, chunk.query_rows(x.num_skipped)]) * x.scale
    scores = torch.bmm(q, chunk.gather_by_group(x.k_sum).mT)
    ratio = distance = None
    if x.ratios is not None and x.k_initial is not None:
        key_ids = x.rows[RESET_ID][chunk.read_keys]
        steps = chunk.row_field(x.rows, RESET_ID) - key_ids[:, None]
        ratio = x.ratios[steps.clamp_(0, len(x.ratios) - 1)]
        initial = torch.bmm(q, chunk.gather_by_group(x.k_initial).mT)
        scores = chunk.times_block(scores, 1 - ratio) + chunk.times_block(initial, ratio)
    if x.slopes is not None:
        distance = _alibi_distance(x.rows, chunk).to(scores.dtype)
        shape = (x.q.shape[0], chunk.num_blocks, chunk.block, -1, distance.shape[2])
        scores.view(shape).sub_(x.slopes * distance[:, :, None])
    by_group = scores.view(-1, chunk.num_blocks, *scores.shape[1:])
    by_group.add_(chunk.bias(x.rows, x.q.shape[2], x.bias_buffer).squeeze(1))
    per_group = (-1, -1, x.q.shape[2], -1)
    k_self, v_self = (chunk.blocks(of[:, chunk.rows, None].expand(per_group)) for of in (x.k_sum, x.v))
    scores = torch.cat([scores, (q * k_self).sum(-1, keepdim=True)], -1)
    return _SumTerms(q, scores, k_self, v_self, distance, ratio)


def _alibi_distance(rows: Tensor, chunk: Chunk) -> Tensor:
    """`(B, M, N)` tokens from each [SUM] back to each key; a prefix key outside the span sits right before it."""
    start, stop, prefix_stop = (chunk.row_field(rows, field) for field in (START, STOP, PREFIX_STOP))
    key = chunk.keys[:, None]
    return torch.where(key < prefix_stop, stop - start + prefix_stop - key, stop - key)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_sum: Tensor | None,
    k_initial: Tensor | None,
    v_initial: Tensor | None,
    ratios: Tensor | None,
    slopes: Tensor | None,
    rows: Tensor,
    keys: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """`out`, shape and dtype of q, and the natural log-sum-exp `(H, T or S)` in the accumulation dtype."""
    x = _Inputs.of(q, k, v, k_sum, k_initial, v_initial, ratios, slopes, rows, keys, scale)
    out, lse = torch.empty_like(x.q), torch.empty_like(x.q[..., :1])
    for prompt in x.plan.causal:
        _causal_forward(x, prompt, out, lse)
    for chunk in x.plan.context:
        _plain_forward(x, chunk, x.k, out, lse)
    if x.sums_are_plain:
        for chunk in x.plan.sums:
            _plain_forward(x, chunk, x.k_sum, out, lse)
        _add_own_key(x, out, lse)
        return _results(q, out, lse)
    for chunk in x.plan.sums:
        terms, query_rows = _sum_terms(x, chunk), chunk.query_rows(x.num_skipped)
        p, lse_rows = _softmax(terms.scores)
        read = _read_values(x, chunk, p[..., :-1], terms.ratio) + p[..., -1:] * terms.v_self
        out[:, query_rows] = read.view_as(out[:, query_rows])
        lse[:, query_rows] = lse_rows.view_as(lse[:, query_rows])
    return _results(q, out, lse)


def _results(q: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    return _ungrouped(out, q.dtype), _ungrouped(lse, lse.dtype).squeeze(-1).T.contiguous()


def _softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities and log-sum-exp `(..., 1)`. A block has all keys of its rows, so no running maximum is needed; the largest
    probability is exp(max - lse)."""
    p = torch.softmax(scores, -1)
    return p, scores.amax(-1, keepdim=True) - p.amax(-1, keepdim=True).log_()


def _read_values(x: _Inputs, chunk: Chunk, p: Tensor, ratio: Tensor | None) -> Tensor:
    if ratio is None or x.v_initial is None:
        return torch.bmm(p, chunk.gather_by_group(x.v))
    p_initial = chunk.times_block(p, ratio)
    read = torch.bmm(p - p_initial, chunk.gather_by_group(x.v))
    return read + torch.bmm(p_initial, chunk.gather_by_group(x.v_initial))


@dataclass
class _Gradients:
    """Accumulators, heads first like `_Inputs`."""

    q: Tensor
    k: Tensor
    v: Tensor
    k_sum: Tensor
    k_initial: Tensor | None
    v_initial: Tensor | None
    slopes: Tensor | None

    @staticmethod
    def zeros(x: _Inputs) -> _Gradients:
        def zeros(of: Tensor | None) -> Tensor | None:
            return None if of is None else torch.zeros_like(of)

        k, v = torch.zeros_like(x.k), torch.zeros_like(x.v)
        k_sum = k if x.k_sum is x.k else torch.zeros_like(x.k_sum)
        slopes = None if x.slopes is None else torch.zeros_like(x.slopes, dtype=torch.float64)
        return _Gradients(torch.empty_like(x.q), k, v, k_sum, zeros(x.k_initial), zeros(x.v_initial), slopes)


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_sum: Tensor | None,
    k_initial: Tensor | None,
    v_initial: Tensor | None,
    ratios: Tensor | None,
    slopes: Tensor | None,
    rows: Tensor,
    keys: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, k_sum, k_initial, v_initial and slopes; empty where the input was None."""
    x = _Inputs.of(q, k, v, k_sum, k_initial, v_initial, ratios, slopes, rows, keys, scale)
    grads = _Gradients.zeros(x)
    d_out = _grouped(grad_out, k.shape[1], x.q.dtype)
    out_heads = _grouped(out, k.shape[1], x.q.dtype)
    lse_heads = lse.unflatten(0, (k.shape[1], -1)).mT[..., None]
    for prompt in x.plan.causal:
        _causal_backward(x, grads, prompt, d_out, out_heads, lse_heads)
    for chunk in x.plan.context:
        _plain_backward(x, grads, chunk, x.k, grads.k, (d_out, out_heads, lse_heads))
    if x.sums_are_plain:
        for chunk in x.plan.sums:
            _plain_backward(x, grads, chunk, x.k_sum, grads.k_sum, (d_out, out_heads, lse_heads))
        _own_key_backward(x, grads, d_out, out_heads, lse_heads)
    for chunk in () if x.sums_are_plain else x.plan.sums:
        query_rows = chunk.query_rows(x.num_skipped)
        _sum_backward(x, grads, chunk, *(chunk.blocks(of[:, query_rows]) for of in (d_out, out_heads)))

    def rows_first(grad: Tensor | None, like: Tensor | None) -> Tensor:
        if grad is None or like is None:
            return q.new_empty(0)
        return grad.transpose(0, 1).to(like.dtype).contiguous()

    return (
        _ungrouped(grads.q, q.dtype),
        rows_first(grads.k, k),
        rows_first(grads.v, v),
        rows_first(grads.k_sum, k_sum),
        rows_first(grads.k_initial, k_initial),
        rows_first(grads.v_initial, v_initial),
        q.new_empty(0) if grads.slopes is None or slopes is None else grads.slopes.view(-1).to(slopes.dtype),
    )


def _plain_backward(
    x: _Inputs,
    grads: _Gradients,
    chunk: Chunk,
    keys: Tensor,
    d_keys: Tensor,
    rows: tuple[Tensor, Tensor, Tensor],
) -> None:
    """`rows`: gradient of the output, output and log-sum-exp; where they count an own key too, gradients are those of the rest."""
    bias, query_rows = chunk.bias(x.rows, x.q.shape[2], x.bias_buffer), chunk.query_rows(x.num_skipped)
    q, k, v = chunk.by_block(x.q[:, query_rows]), chunk.gather(keys), chunk.gather(x.v)
    d_out, out, lse = (chunk.by_block(of[:, query_rows]) for of in rows)
    dq, dk, dv = _flash_backward(
        d_out, q, k, v, out, lse.squeeze(-1), 0.0, False, attn_mask=bias, scale=x.scale
    )
    grads.q[:, query_rows] = chunk.from_block(dq, x.q.shape[2])
    chunk.scatter_add(d_keys, dk)
    chunk.scatter_add(grads.v, dv)


def _causal_backward(
    x: _Inputs, grads: _Gradients, rows: slice, d_out: Tensor, out: Tensor, lse: Tensor
) -> None:
    d_out, out, lse = (of[:, rows].transpose(1, 2) for of in (d_out, out, lse))
    dq, dk, dv = _flash_backward(d_out, *x.causal(rows), out, lse.squeeze(-1), 0.0, True, scale=x.scale)
    grads.q[:, rows] = dq.transpose(1, 2)
    grads.k[:, rows] += dk.sum(1)
    grads.v[:, rows] += dv.sum(1)


def _own_key_backward(x: _Inputs, grads: _Gradients, d_out: Tensor, out: Tensor, lse: Tensor) -> None:
    sums, scores, k_self, v_self = _own_key_scores(x)
    d_out, p_self = d_out[:, sums], torch.exp(scores - lse[:, sums])
    ds = p_self * (d_out * (v_self - out[:, sums])).sum(-1, keepdim=True) * x.scale
    grads.q[:, sums] += ds * k_self
    grads.k_sum[:, x.num_context :] = (ds * x.q[:, sums]).sum(2)
    grads.v[:, x.num_context :] = (p_self * d_out).sum(2)


def _sum_backward(x: _Inputs, grads: _Gradients, chunk: Chunk, d_out: Tensor, out: Tensor) -> None:
    delta = (d_out * out).sum(-1, keepdim=True)
    terms, query_rows = _sum_terms(x, chunk), chunk.query_rows(x.num_skipped)
    p_all = torch.softmax(terms.scores, -1)
    p, p_self = p_all[..., :-1], p_all[..., -1:]
    dp = torch.bmm(d_out, chunk.gather_by_group(x.v).mT)
    p_final = p
    if terms.ratio is not None and x.v_initial is not None and grads.v_initial is not None:
        dp_initial = torch.bmm(d_out, chunk.gather_by_group(x.v_initial).mT)
        dp = chunk.times_block(dp, 1 - terms.ratio) + chunk.times_block(dp_initial, terms.ratio)
        p_final = chunk.times_block(p, 1 - terms.ratio)
        chunk.scatter_add_by_group(grads.v_initial, torch.bmm(chunk.times_block(p, terms.ratio).mT, d_out))
    chunk.scatter_add_by_group(grads.v, torch.bmm(p_final.mT, d_out))

    ds = dp.sub_(delta).mul_(p)
    ds_self = p_self * ((d_out * terms.v_self).sum(-1, keepdim=True) - delta)
    if terms.distance is not None and grads.slopes is not None:
        by_head = chunk.times_block(ds, terms.distance).view(x.q.shape[0], -1, x.q.shape[2], ds.shape[2])
        # Terms of both signs that nearly cancel.
        grads.slopes -= by_head.sum((1, 3), dtype=torch.float64).view_as(grads.slopes)
    d_q = ds_self * terms.k_self
    ds_final = ds
    if terms.ratio is not None and x.k_initial is not None and grads.k_initial is not None:
        ds_final, ds_initial = chunk.times_block(ds, 1 - terms.ratio), chunk.times_block(ds, terms.ratio)
        d_q += torch.bmm(ds_initial, chunk.gather_by_group(x.k_initial))
        chunk.scatter_add_by_group(grads.k_initial, torch.bmm(ds_initial.mT, terms.q))
    d_q += torch.bmm(ds_final, chunk.gather_by_group(x.k_sum))
    grads.q[:, query_rows] = d_q.mul_(x.scale).view_as(grads.q[:, query_rows])
    chunk.scatter_add_by_group(grads.k_sum, torch.bmm(ds_final.mT, terms.q))
    for into, own in ((grads.v, p_self * d_out), (grads.k_sum, ds_self * terms.q)):
        by_row = own.view(*grads.q[:, query_rows].shape).sum(2)
        into[:, chunk.rows] = by_row
