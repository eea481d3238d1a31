"""Blocked attention over streaming prompts in plain PyTorch: the CPU implementation of the operators where none can be compiled.

A block of neighbouring rows meets the keys that any of its rows sees: one slice, and the prefix where it lies apart. Several
blocks are one call (a chunk, `cpu_blocks.py`), so that operators work on megabytes and not on kilobytes. Context rows run PyTorch's
own blocked CPU attention on (block, slice) with the visibility as bias. So do [SUM] rows, with ALiBi in the bias; two streams and
the gradient of slopes, which it cannot express, are batched matmuls. Their own key joins through the log-sum-exp. Time is
O(T x (window + block)), memory O(T) beside one chunk and the 16 MiB of biases that a layout keeps. Gradients of a key are summed
block after block: deterministic. Autograd over the same blocks would allocate a full-size gradient per slice and turn quadratic.

Heads are packed into rows: M rows of the R = H / G query heads of one key head are one `(M R, D)` matrix.
Half precision is computed in float32, because CPUs without AVX512-BF16 have no fast 16-bit matmul.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from dti_kernels.contract import accumulation_dtype
from dti_kernels.cpu.chunks import HIDDEN, Chunk, Plan, Prompt, RowTable, Sizes
from dti_kernels.cpu.isolation import largest
from dti_kernels.inputs import Gradients, Inputs
from dti_kernels.layout import PREFIX_STOP, RESET_ID, START, STOP

# Rows of a block times query heads of a key head: few enough that most of a block's keys are visible to most of its rows. PyTorch's
# attention takes tiles of 64 rows from 192 rows on, of 32 below. [SUM] rows lie one interaction apart, so their blocks are narrower.
# Scores per chunk: what context rows never store may be larger than what [SUM] rows do, half of a core's cache (benchmarks/LOG.md).
CONTEXT_BLOCK = 192
CONTEXT_CHUNK_SCORES = 2**20
SUM_BLOCK = 32
SUM_CHUNK_SCORES = 2**18
# A prompt of as many rows is one causal call, where blocks would not meet fewer keys.
PROMPT_ROWS = 32
# Numbers of biases that a layout keeps between layers and passes: 16 MiB in float32, whatever its length.
KEPT_SCORES = 2**22
# PyTorch's blocked CPU attention, forward and backward as two operators: what scaled_dot_product_attention calls.
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# Row fields of a layout, which are read-only, to its plans.
_PLANS: Any = WeakIdKeyDictionary()


def _needs_float64(
    rows: Iterable[tuple[Tensor, float]], streams: Iterable[Tensor | None], slopes: Tensor | None
) -> bool:
    """Could products of rows `(T or S, H, D)`, each tensor with its factor, and keys or values pass the bias that hides in float32? Raises
    NotFinite as `largest` does."""
    keys, bound = largest(*streams), _magnitude(slopes) * 2.0**31
    for x, factor in rows:
        if x.dtype == torch.float64:
            return False
        bound = max(_magnitude(x) * keys * x.shape[-1] * max(factor, 1.0), bound)
    return HIDDEN[torch.float32] / 64 <= bound < math.inf


def _magnitude(x: Tensor | None) -> float:
    """The largest, also where it is not finite: of queries and slopes that is the matter of their own rows and heads."""
    return 0.0 if x is None or not x.numel() else x.detach().abs().amax().item()


def _doubled(inputs: Inputs) -> Inputs:
    doubled: Any = (x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)
    return Inputs(*doubled)


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
    slopes: Tensor | None  # (G, 1, R, 1)
    rows: Tensor
    scale: float
    bias_buffer: list[Tensor]
    num_context: int
    num_skipped: int  # rows that have no query: 0, or C where q holds the [SUM] rows only

    @staticmethod
    def of(inputs: Inputs) -> _Inputs:
        q, k, v, k_sum, k_initial, v_initial, ratios, slopes, rows, keys, scale, _ = inputs
        dtype, num_groups = accumulation_dtype(q.dtype), k.shape[1]
        k_heads = _heads_first(k, dtype)
        return _Inputs(
            q=_grouped(q, num_groups, dtype),
            k=k_heads,
            v=_heads_first(v, dtype),
            k_sum=k_heads if k_sum is None else _heads_first(k_sum, dtype),
            k_initial=None if k_initial is None else _heads_first(k_initial, dtype),
            v_initial=None if v_initial is None else _heads_first(v_initial, dtype),
            ratios=None if ratios is None else ratios.to(dtype),
            slopes=None if slopes is None else slopes.to(dtype).view(num_groups, 1, -1, 1),
            rows=rows,
            scale=scale,
            bias_buffer=[q.new_empty(0, dtype=dtype)],
            num_context=keys.shape[1],
            num_skipped=rows.shape[1] - q.shape[0],
        )

    def bias(self, chunk: Chunk) -> Tensor:
        """`(B, 1, M R, N)` visibility."""
        return self.plan.bias(chunk, self.rows, self.q.shape[2], self.bias_buffer)

    def sum_bias(self, chunk: Chunk) -> Tensor:
        """`(B, 1 or G, M R, N)` visibility of [SUM] rows, with ALiBi where there are slopes."""
        bias = self.bias(chunk)
        if self.slopes is None:
            return bias
        distance = _alibi_distance(self.rows, chunk).to(bias.dtype)
        per_head = (chunk.block, self.q.shape[2])
        by_head: Tensor = bias.unflatten(2, per_head)
        return by_head.addcmul(self.slopes, distance[:, None, :, None], value=-1).flatten(2, 3)

    @cached_property
    def plan(self) -> Plan:
        """How the rows are walked: the same for all layers and passes over a layout, so it is kept as long as the layout's rows."""
        num_groups, _, per_group, _ = self.q.shape
        sizes = Sizes(
            max(1, CONTEXT_BLOCK // per_group),
            CONTEXT_CHUNK_SCORES // (num_groups * per_group),
            max(1, SUM_BLOCK // per_group),
            SUM_CHUNK_SCORES // (num_groups * per_group),
            PROMPT_ROWS,
            KEPT_SCORES,
        )
        key = (self.num_skipped, per_group, self.q.dtype, sizes)
        plans: dict[Any, Plan] = _PLANS.setdefault(self.rows, {})
        if key not in plans:
            table = RowTable(self.rows, self.num_context, per_group, self.q.dtype)
            plans[key] = Plan.of(table, self.num_skipped, sizes)
        return plans[key]

    @property
    def sum_rows(self) -> slice:
        """[SUM] rows among all rows."""
        return slice(self.num_context, self.rows.shape[1])

    @property
    def sum_queries(self) -> slice:
        """[SUM] rows among the queries."""
        return slice(self.num_context - self.num_skipped, self.q.shape[1])

    def of_prompt(self, prompt: Prompt) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Queries, keys and values of a prompt, `(G, R, L, D)`, keys and values repeated without being copied, and its bias."""
        repeat = (-1, self.q.shape[2], -1, -1)
        return (
            self.q[:, prompt.rows].transpose(1, 2),
            self.k[:, prompt.rows][:, None].expand(repeat),
            self.v[:, prompt.rows][:, None].expand(repeat),
            None if prompt.cut is None else self.plan.bias(prompt.cut, self.rows, 1, self.bias_buffer),
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


def _plain_forward(x: _Inputs, chunk: Chunk, bias: Tensor, keys: Tensor, out: Tensor, lse: Tensor) -> None:
    """Rows that attend to context keys as any attention does."""
    query_rows = chunk.query_rows(x.num_skipped)
    q, k, v = chunk.by_block(x.q[:, query_rows]), chunk.gather(keys), chunk.gather(x.v)
    out_rows, lse_rows = _flash(q, k, v, 0.0, False, attn_mask=bias, scale=x.scale)
    out[:, query_rows] = chunk.from_block(out_rows, x.q.shape[2])
    lse[:, query_rows] = chunk.from_block(lse_rows[..., None], x.q.shape[2])


def _prompt_forward(x: _Inputs, prompt: Prompt, out: Tensor, lse: Tensor) -> None:
    q, k, v, bias = x.of_prompt(prompt)
    out_rows, lse_rows = _flash(q, k, v, 0.0, bias is None, attn_mask=bias, scale=x.scale)
    out[:, prompt.rows] = out_rows.transpose(1, 2)
    lse[:, prompt.rows] = lse_rows[..., None].transpose(1, 2)


def _own_key_scores(x: _Inputs, rows: slice) -> Tensor:
    """Scores of [SUM] rows with their own keys, `(G, rows, R, 1)`."""
    queries = slice(rows.start - x.num_skipped, rows.stop - x.num_skipped)
    return (x.q[:, queries] * x.k_sum[:, rows, None]).sum(-1, keepdim=True) * x.scale


def _add_own_key(x: _Inputs, out: Tensor, lse: Tensor) -> None:
    """Let [SUM] rows, that have read their context keys, read themselves: softmax over both, from the log-sum-exp of the first."""
    scores, sums = _own_key_scores(x, x.sum_rows), x.sum_queries
    p_self = torch.sigmoid(scores - lse[:, sums])
    out[:, sums] += p_self * (x.v[:, x.sum_rows, None] - out[:, sums])
    lse[:, sums] = torch.logaddexp(lse[:, sums], scores)


def _blended_scores(x: _Inputs, chunk: Chunk) -> tuple[Tensor, Tensor, Tensor | None]:
    """Queries times scale `(G B, M R, D)`, their scores with both key streams `(G B, M R, N)`, at most -HIDDEN where invisible, and
    the reset ratio `(B, M, N)`, None where there is one stream."""
    q = chunk.blocks(x.q[:, chunk.query_rows(x.num_skipped)]) * x.scale
    scores, ratio = torch.bmm(q, chunk.gather_by_group(x.k_sum).mT), None
    if x.ratios is not None and x.k_initial is not None:
        steps = chunk.row_field(x.rows, RESET_ID) - x.rows[RESET_ID][chunk.read_keys][:, None]
        ratio = x.ratios[steps.clamp_(0, len(x.ratios) - 1)]
        chunk.blend_(scores, torch.bmm(q, chunk.gather_by_group(x.k_initial).mT), ratio)
    scores.view(-1, chunk.num_blocks, *scores.shape[1:]).add_(x.sum_bias(chunk).transpose(0, 1))
    return q, scores, ratio


def _alibi_distance(rows: Tensor, chunk: Chunk) -> Tensor:
    """`(B, M, N)` tokens from each [SUM] back to each key; a prefix key outside the span sits right before it."""
    start, stop, prefix_stop = (chunk.row_field(rows, field) for field in (START, STOP, PREFIX_STOP))
    key = chunk.keys[:, None]
    return torch.where(key < prefix_stop, stop - start + prefix_stop - key, stop - key)


def forward(inputs: Inputs, is_cleared: bool = False) -> tuple[Tensor, Tensor]:
    """`out`, shape and dtype of q, and the natural log-sum-exp `(H, T or S)` in the accumulation dtype.

    `is_cleared`: zeros stand where keys and values were not finite, and what is not finite now is so by right.

    Raises:
        NotFinite: a key or value is not finite.
    """
    q = inputs.q
    if _needs_float64([(q, inputs.scale)], inputs[1:6], inputs.slopes):
        out, lse = forward(_doubled(inputs), is_cleared)
        return out.to(q.dtype), lse.float()
    x = _Inputs.of(inputs)
    out, lse = torch.empty_like(x.q), torch.empty_like(x.q[..., :1])
    for prompt in x.plan.prompts:
        _prompt_forward(x, prompt, out, lse)
    for chunk in x.plan.context:
        _plain_forward(x, chunk, x.bias(chunk), x.k, out, lse)
    for chunk in x.plan.sums:
        if x.ratios is None:
            _plain_forward(x, chunk, x.sum_bias(chunk), x.k_sum, out, lse)
        else:
            _blended_forward(x, chunk, out, lse)
    _add_own_key(x, out, lse)
    return _ungrouped(out, q.dtype), _ungrouped(lse, lse.dtype).squeeze(-1).T.contiguous()


def _blended_forward(x: _Inputs, chunk: Chunk, out: Tensor, lse: Tensor) -> None:
    """[SUM] rows that read two streams."""
    _, scores, ratio = _blended_scores(x, chunk)
    assert ratio is not None
    assert x.v_initial is not None
    (p, lse_rows), query_rows = _softmax(scores), chunk.query_rows(x.num_skipped)
    p_initial = chunk.times_block(p, ratio)
    read = torch.bmm(p - p_initial, chunk.gather_by_group(x.v))
    read += torch.bmm(p_initial, chunk.gather_by_group(x.v_initial))
    out[:, query_rows] = read.view_as(out[:, query_rows])
    lse[:, query_rows] = lse_rows.view_as(lse[:, query_rows])


def _softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities and log-sum-exp `(..., 1)`. A block has all keys of its rows, so no running maximum is needed; the largest
    probability is exp(max - lse)."""
    p = torch.softmax(scores, -1)
    return p, scores.amax(-1, keepdim=True) - p.amax(-1, keepdim=True).log_()


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
    def zeros(x: _Inputs, slopes_grad: bool) -> _Gradients:
        def zeros(of: Tensor | None) -> Tensor | None:
            return None if of is None else torch.zeros_like(of)

        k, v = torch.zeros_like(x.k), torch.zeros_like(x.v)
        k_sum = k if x.k_sum is x.k else torch.zeros_like(x.k_sum)
        slopes = (
            torch.zeros_like(x.slopes, dtype=torch.float64) if x.slopes is not None and slopes_grad else None
        )
        return _Gradients(torch.empty_like(x.q), k, v, k_sum, zeros(x.k_initial), zeros(x.v_initial), slopes)


def backward(
    inputs: Inputs, grad_out: Tensor, out: Tensor, lse: Tensor, slopes_grad: bool, is_cleared: bool = False
) -> Gradients:
    """The gradients; `dslopes` is empty unless `slopes_grad`.

    `is_cleared` as for the forward.

    Raises:
        NotFinite: a key, a value, or the log-sum-exp or delta (`out . grad_out`) of a row is not finite.
    """
    q, k, v, k_sum, k_initial, v_initial, _, slopes = inputs[:8]
    if not is_cleared:
        largest(lse, (grad_out.to(lse.dtype) * out).sum(-1))
    if _needs_float64([(q, inputs.scale), (grad_out, 1.0)], inputs[1:6], slopes):
        doubled = _doubled(inputs)
        out, lse = forward(doubled, is_cleared)
        grads_64 = backward(doubled, grad_out.double(), out, lse, slopes_grad, is_cleared)
        of = inputs.differentiable(slopes_grad)
        return Gradients(*(grad if x is None else grad.to(x.dtype) for grad, x in zip(grads_64, of)))
    x = _Inputs.of(inputs)
    grads = _Gradients.zeros(x, slopes_grad)
    d_out = _grouped(grad_out, k.shape[1], x.q.dtype)
    out_heads = _grouped(out, k.shape[1], x.q.dtype)
    lse_heads = lse.unflatten(0, (k.shape[1], -1)).mT[..., None]
    of_rows = (d_out, out_heads, lse_heads)
    for prompt in x.plan.prompts:
        _prompt_backward(x, grads, prompt, *of_rows)
    for chunk in x.plan.context:
        _plain_backward(x, grads, chunk, x.bias(chunk), x.k, grads.k, of_rows)
    for chunk in x.plan.sums:
        if x.ratios is None and grads.slopes is None:
            _plain_backward(x, grads, chunk, x.sum_bias(chunk), x.k_sum, grads.k_sum, of_rows)
        else:
            _blended_backward(x, grads, chunk, of_rows)
    _own_key_backward(x, grads, *of_rows)

    def rows_first(grad: Tensor | None, like: Tensor | None) -> Tensor:
        if grad is None or like is None:
            return q.new_empty(0)
        return grad.transpose(0, 1).to(like.dtype).contiguous()

    return Gradients(
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
    bias: Tensor,
    keys: Tensor,
    d_keys: Tensor,
    of_rows: tuple[Tensor, Tensor, Tensor],
) -> None:
    """`of_rows`: gradient of the output, output and log-sum-exp; where they count an own key, gradients are those of the rest."""
    query_rows = chunk.query_rows(x.num_skipped)
    q, k, v = chunk.by_block(x.q[:, query_rows]), chunk.gather(keys), chunk.gather(x.v)
    d_out, out, lse = (chunk.by_block(of[:, query_rows]) for of in of_rows)
    dq, dk, dv = _flash_backward(
        d_out, q, k, v, out, lse.squeeze(-1), 0.0, False, attn_mask=bias, scale=x.scale
    )
    grads.q[:, query_rows] = chunk.from_block(dq, x.q.shape[2])
    chunk.add_to_keys(d_keys, dk)
    chunk.add_to_keys(grads.v, dv)


def _prompt_backward(
    x: _Inputs, grads: _Gradients, prompt: Prompt, d_out: Tensor, out: Tensor, lse: Tensor
) -> None:
    (q, k, v, bias), rows = x.of_prompt(prompt), prompt.rows
    d_out, out, lse = (of[:, rows].transpose(1, 2) for of in (d_out, out, lse))
    dq, dk, dv = _flash_backward(
        d_out, q, k, v, out, lse.squeeze(-1), 0.0, bias is None, attn_mask=bias, scale=x.scale
    )
    grads.q[:, rows] = dq.transpose(1, 2)
    grads.k[:, rows] += dk.sum(1)
    grads.v[:, rows] += dv.sum(1)


def _own_key_backward(x: _Inputs, grads: _Gradients, d_out: Tensor, out: Tensor, lse: Tensor) -> None:
    scores, rows, sums = _own_key_scores(x, x.sum_rows), x.sum_rows, x.sum_queries
    d_out, p_self = d_out[:, sums], torch.exp(scores - lse[:, sums])
    ds = p_self * (d_out * (x.v[:, rows, None] - out[:, sums])).sum(-1, keepdim=True) * x.scale
    grads.q[:, sums] += ds * x.k_sum[:, rows, None]
    grads.k_sum[:, rows] = (ds * x.q[:, sums]).sum(2)
    grads.v[:, rows] = (p_self * d_out).sum(2)


def _blended_backward(
    x: _Inputs, grads: _Gradients, chunk: Chunk, of_rows: tuple[Tensor, Tensor, Tensor]
) -> None:
    """[SUM] rows that read two streams, or whose slopes need a gradient."""
    query_rows = chunk.query_rows(x.num_skipped)
    q, scores, ratio = _blended_scores(x, chunk)
    # Softmax over the context keys alone, times their share beside the own key: exact where the own key has nearly all of the weight, unlike
    # 1 - exp(own - lse).
    p, context_lse = _softmax(scores)
    share = torch.exp(context_lse - chunk.blocks(of_rows[2][:, query_rows]))
    d_out, out = chunk.blocks(of_rows[0][:, query_rows]) * share, chunk.blocks(of_rows[1][:, query_rows])
    dp, p_final = torch.bmm(d_out, chunk.gather_by_group(x.v).mT), p
    if ratio is not None and x.v_initial is not None and grads.v_initial is not None:
        chunk.blend_(dp, torch.bmm(d_out, chunk.gather_by_group(x.v_initial).mT), ratio)
        p_initial = chunk.times_block(p, ratio)
        p_final = p - p_initial
        chunk.add_to_keys_by_group(grads.v_initial, torch.bmm(p_initial.mT, d_out))
    chunk.add_to_keys_by_group(grads.v, torch.bmm(p_final.mT, d_out))

    ds = dp.sub_((d_out * out).sum(-1, keepdim=True)).mul_(p)
    if grads.slopes is not None:
        by_head = chunk.times_block(ds, _alibi_distance(x.rows, chunk))
        by_head = by_head.view(x.q.shape[0], -1, x.q.shape[2], ds.shape[2])
        # Terms of both signs that nearly cancel.
        grads.slopes -= by_head.sum((1, 3), dtype=torch.float64).view_as(grads.slopes)
    ds_final, d_q = ds, None
    if ratio is not None and x.k_initial is not None and grads.k_initial is not None:
        ds_initial = chunk.times_block(ds, ratio)
        ds_final = ds - ds_initial
        d_q = torch.bmm(ds_initial, chunk.gather_by_group(x.k_initial))
        chunk.add_to_keys_by_group(grads.k_initial, torch.bmm(ds_initial.mT, q))
    d_q_final = torch.bmm(ds_final, chunk.gather_by_group(x.k_sum))
    d_q = d_q_final if d_q is None else d_q.add_(d_q_final)
    grads.q[:, query_rows] = d_q.mul_(x.scale).view_as(grads.q[:, query_rows])
    chunk.add_to_keys_by_group(grads.k_sum, torch.bmm(ds_final.mT, q))
