"""Blocked attention over streaming prompts in plain PyTorch: the CPU implementation of the operators.

A block of neighbouring rows is multiplied with the one slice of keys that any of its rows sees, forward and recomputing
backward, so that time is O(T x (window + block)) and memory O(T). Slices are accumulated in order: deterministic. Autograd
over the same blocks would allocate a full-size gradient per slice and turn quadratic.

Heads are packed into rows: a block of M rows of the H / G query heads of one key head is one `(G, H / G * M, D)` matrix.
Half precision is computed in float32, because CPUs without AVX512-BF16 have no fast 16-bit matmul.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dti_kernels.layout import PREFIX_STOP, PROMPT_FIRST, RESET_ID, START, STOP

# Rows per block. Context: wide enough for efficient matmuls, narrow enough that the block's span is mostly window
# (benchmarks/LOG.md). [SUM] rows lie one interaction apart, so their blocks are narrower.
CONTEXT_BLOCK = 128
SUM_BLOCK = 32


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that scores, softmax and sums are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class _Block:
    """Rows `[first, stop)` against the keys `[prefix_first, prefix_stop)` and `[key_first, key_stop)`.

    One prefix slice is enough: the prefix of any later prompt in the block lies inside `[key_first, key_stop)`.
    Keys in `[all_first, all_stop)` are visible to every row of the block.
    """

    first: int
    stop: int
    prefix_first: int
    prefix_stop: int
    key_first: int
    key_stop: int
    all_first: int
    all_stop: int

    @property
    def rows(self) -> slice:
        return slice(self.first, self.stop)

    def query_rows(self, num_skipped: int) -> slice:
        """Where the block's rows are in tensors that leave out the first `num_skipped` rows."""
        return slice(self.first - num_skipped, self.stop - num_skipped)

    def gather(self, x: Tensor) -> Tensor:
        """`(G, T, D)` to the `(G, N, D)` keys of this block; a view where there is no separate prefix."""
        span = x[:, self.key_first : self.key_stop]
        if self.prefix_first == self.prefix_stop:
            return span
        return torch.cat([x[:, self.prefix_first : self.prefix_stop], span], 1)

    def scatter_add(self, x: Tensor, values: Tensor) -> None:
        """Add `(G, N, D)` to the keys of this block in `x (G, T, D)`."""
        num_prefix = self.prefix_stop - self.prefix_first
        if num_prefix:
            x[:, self.prefix_first : self.prefix_stop] += values[:, :num_prefix]
        x[:, self.key_first : self.key_stop] += values[:, num_prefix:]

    def key_ids(self) -> Tensor:
        """`(N,)` context rows of this block's keys."""
        span = torch.arange(self.key_first, self.key_stop)
        if self.prefix_first == self.prefix_stop:
            return span
        return torch.cat([torch.arange(self.prefix_first, self.prefix_stop), span])

    def hide(self, scores: Tensor, rows: Tensor) -> None:
        """Set the scores `(G, R, M, N)` of invisible keys to -inf, touching only columns that some row may not see."""
        num_prefix = self.prefix_stop - self.prefix_first
        keys = self.key_ids()
        left = num_prefix + max(self.all_first - self.key_first, 0)
        right = num_prefix + self.all_stop - self.key_first
        edges = [slice(0, left), slice(right, len(keys))] if left < right else [slice(0, len(keys))]
        first, prefix_stop, start, stop = (
            rows[field, self.rows, None] for field in (PROMPT_FIRST, PREFIX_STOP, START, STOP)
        )
        for edge in edges:
            key = keys[edge]
            visible = ((key >= start) & (key < stop)) | ((key >= first) & (key < prefix_stop))
            scores[..., edge].masked_fill_(~visible, float("-inf"))


def _blocks(rows: Tensor, first: int, stop: int, size: int) -> Iterator[_Block]:
    """Blocks of the rows `[first, stop)`, whose spans never decrease."""
    firsts = range(first, stop, size)
    lasts = [min(row + size, stop) - 1 for row in firsts]
    head = rows[:, list(firsts)].tolist()
    tail = rows[:, lasts].tolist()
    for i, row in enumerate(firsts):
        prefix_first, key_first = head[PROMPT_FIRST][i], head[START][i]
        all_first = tail[START][i]
        yield _Block(
            first=row,
            stop=lasts[i] + 1,
            prefix_first=prefix_first,
            prefix_stop=head[PREFIX_STOP][i],
            key_first=key_first,
            key_stop=tail[STOP][i],
            all_first=all_first,
            # A second prompt in the block sees nothing of the first one's keys: its start lies beyond this stop.
            all_stop=head[STOP][i],
        )


@dataclass
class _Inputs:
    """Inputs in the accumulation dtype, heads first: `q (G, R, T or S, D)` already scaled, the others `(G, T or C, D)`."""

    q: Tensor
    k: Tensor
    v: Tensor
    k_sum: Tensor
    k_initial: Tensor | None
    v_initial: Tensor | None
    ratios: Tensor | None
    slopes: Tensor | None  # (G, R, 1, 1)
    rows: Tensor
    num_context: int
    num_skipped: int  # rows that have no query: 0, or C where q holds the [SUM] rows only

    @staticmethod
    def of(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        k_sum: Tensor,
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
            q=_grouped(q, num_groups, dtype) * scale,
            k=k_heads,
            v=_heads_first(v, dtype),
            k_sum=k_heads if k_sum is k else _heads_first(k_sum, dtype),
            k_initial=None if k_initial is None else _heads_first(k_initial, dtype),
            v_initial=None if v_initial is None else _heads_first(v_initial, dtype),
            ratios=ratios,
            slopes=None if slopes is None else slopes.to(dtype).view(num_groups, -1, 1, 1),
            rows=rows,
            num_context=keys.shape[1],
            num_skipped=rows.shape[1] - q.shape[0],
        )

    def context_blocks(self) -> Iterator[_Block]:
        return _blocks(self.rows, self.num_skipped, self.num_context, CONTEXT_BLOCK)

    def sum_blocks(self) -> Iterator[_Block]:
        return _blocks(self.rows, self.num_context, self.rows.shape[1], SUM_BLOCK)


def _heads_first(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).transpose(0, 1).contiguous()


def _grouped(x: Tensor, num_groups: int, dtype: torch.dtype) -> Tensor:
    """`(T, H, D)` to `(G, R, T, D)`."""
    num_rows, num_heads, head_dim = x.shape
    x = x.to(dtype).view(num_rows, num_groups, num_heads // num_groups, head_dim)
    return x.permute(1, 2, 0, 3).contiguous()


def _ungrouped(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`(G, R, T, D)` to contiguous `(T, H, D)`."""
    return x.permute(2, 0, 1, 3).flatten(1, 2).to(dtype).contiguous()


def _matmul(x: Tensor, keys: Tensor) -> Tensor:
    """`(G, R, M, A) @ (G, A, B) -> (G, R, M, B)`, one matrix per key head."""
    return torch.bmm(x.flatten(1, 2), keys).unflatten(1, x.shape[1:3])


def _query_rowsmatmul(x: Tensor, y: Tensor) -> Tensor:
    """`(G, R, M, N)` and `(G, R, M, D)` to `(G, N, D)`, summed over the rows of the head group."""
    return torch.bmm(x.flatten(1, 2).mT, y.flatten(1, 2))


@dataclass
class _SumTerms:
    """What a block of [SUM] rows needs besides its keys."""

    scores: Tensor  # (G, R, M, N), -inf where invisible
    self_scores: Tensor  # (G, R, M, 1)
    distance: Tensor | None  # (M, N) ALiBi distance in tokens, where there are slopes
    ratio: Tensor | None  # (M, N) reset ratio a(d), where there is a reset


def _context_scores(x: _Inputs, block: _Block) -> Tensor:
    scores = _matmul(x.q[:, :, block.rows], block.gather(x.k).mT)
    block.hide(scores, x.rows)
    return scores


def _sum_terms(x: _Inputs, block: _Block) -> _SumTerms:
    q = x.q[:, :, block.query_rows(x.num_skipped)]
    scores = _matmul(q, block.gather(x.k_sum).mT)
    ratio = distance = None
    if x.ratios is not None and x.k_initial is not None:
        steps = x.rows[RESET_ID, block.rows, None] - x.rows[RESET_ID][block.key_ids()]
        ratio = x.ratios[steps.clamp_(0, len(x.ratios) - 1)]
        scores = (1 - ratio) * scores + ratio * _matmul(q, block.gather(x.k_initial).mT)
    if x.slopes is not None:
        distance = _alibi_distance(x.rows, block).to(scores.dtype)
        scores -= x.slopes * distance
    block.hide(scores, x.rows)
    self_scores = (q * x.k_sum[:, None, block.rows]).sum(-1, keepdim=True)
    return _SumTerms(scores, self_scores, distance, ratio)


def _alibi_distance(rows: Tensor, block: _Block) -> Tensor:
    """`(M, N)` tokens from each [SUM] back to each key; a prefix key outside the span sits right before it."""
    start, stop, prefix_stop = (rows[field, block.rows, None] for field in (START, STOP, PREFIX_STOP))
    key = block.key_ids()
    return torch.where(key < prefix_stop, stop - start + prefix_stop - key, stop - key)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_sum: Tensor,
    k_initial: Tensor | None,
    v_initial: Tensor | None,
    ratios: Tensor | None,
    slopes: Tensor | None,
    rows: Tensor,
    keys: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """`out (T, H, D)` in q's dtype and the natural log-sum-exp `(H, T)` in the accumulation dtype."""
    x = _Inputs.of(q, k, v, k_sum, k_initial, v_initial, ratios, slopes, rows, keys, scale)
    out, lse = torch.empty_like(x.q), torch.empty_like(x.q[..., 0])
    for block in x.context_blocks():
        scores = _context_scores(x, block)
        pivot = scores.amax(-1, keepdim=True)
        p = scores.sub_(pivot).exp_()
        total = p.sum(-1, keepdim=True)
        out[:, :, block.rows] = _matmul(p, block.gather(x.v)).div_(total)
        lse[:, :, block.rows] = (pivot + total.log_()).squeeze(-1)
    for block in x.sum_blocks():
        terms = _sum_terms(x, block)
        pivot = torch.maximum(terms.scores.amax(-1, keepdim=True), terms.self_scores)
        p, p_self = terms.scores.sub_(pivot).exp_(), terms.self_scores.sub_(pivot).exp_()
        total = p.sum(-1, keepdim=True) + p_self
        mixed = _read_values(x, block, p, terms.ratio) + p_self * x.v[:, None, block.rows]
        query_rows = block.query_rows(x.num_skipped)
        out[:, :, query_rows] = mixed.div_(total)
        lse[:, :, query_rows] = (pivot + total.log_()).squeeze(-1)
    return _ungrouped(out, q.dtype), lse.flatten(0, 1)


def _read_values(x: _Inputs, block: _Block, p: Tensor, ratio: Tensor | None) -> Tensor:
    if ratio is None or x.v_initial is None:
        return _matmul(p, block.gather(x.v))
    p_initial = p * ratio
    return _matmul(p - p_initial, block.gather(x.v)) + _matmul(p_initial, block.gather(x.v_initial))


@dataclass
class _Gradients:
    """Accumulators, heads first like `_Inputs`; `q` is the gradient of the scaled queries."""

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

        k, v, k_sum = (torch.zeros_like(of) for of in (x.k, x.v, x.k_sum))
        return _Gradients(
            torch.empty_like(x.q), k, v, k_sum, zeros(x.k_initial), zeros(x.v_initial), zeros(x.slopes)
        )


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_sum: Tensor,
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
    delta = (d_out * _grouped(out, k.shape[1], x.q.dtype)).sum(-1, keepdim=True)
    lse = lse.view(*x.q.shape[:3], 1)
    for block in x.context_blocks():
        r = block.rows
        _context_backward(x, grads, block, d_out[:, :, r], delta[:, :, r], lse[:, :, r])
    for block in x.sum_blocks():
        query_rows = block.query_rows(x.num_skipped)
        _sum_backward(
            x, grads, block, d_out[:, :, query_rows], delta[:, :, query_rows], lse[:, :, query_rows]
        )

    def query_rowsfirst(grad: Tensor | None, like: Tensor | None) -> Tensor:
        if grad is None or like is None:
            return q.new_empty(0)
        return grad.transpose(0, 1).to(like.dtype).contiguous()

    return (
        _ungrouped(grads.q.mul_(scale), q.dtype),
        query_rowsfirst(grads.k, k),
        query_rowsfirst(grads.v, v),
        query_rowsfirst(grads.k_sum, k_sum),
        query_rowsfirst(grads.k_initial, k_initial),
        query_rowsfirst(grads.v_initial, v_initial),
        q.new_empty(0) if grads.slopes is None or slopes is None else grads.slopes.view(-1).to(slopes.dtype),
    )


def _context_backward(
    x: _Inputs, grads: _Gradients, block: _Block, d_out: Tensor, delta: Tensor, lse: Tensor
) -> None:
    p = _context_scores(x, block).sub_(lse).exp_()
    block.scatter_add(grads.v, _query_rowsmatmul(p, d_out))
    ds = _matmul(d_out, block.gather(x.v).mT).sub_(delta).mul_(p)
    grads.q[:, :, block.rows] = _matmul(ds, block.gather(x.k))
    block.scatter_add(grads.k, _query_rowsmatmul(ds, x.q[:, :, block.rows]))


def _sum_backward(
    x: _Inputs, grads: _Gradients, block: _Block, d_out: Tensor, delta: Tensor, lse: Tensor
) -> None:
    terms, rows, query_rows = _sum_terms(x, block), block.rows, block.query_rows(x.num_skipped)
    q = x.q[:, :, query_rows]
    p = terms.scores.sub_(lse).exp_()
    p_self = terms.self_scores.sub_(lse).exp_()
    dp = _matmul(d_out, block.gather(x.v).mT)
    p_final = p
    if terms.ratio is not None and x.v_initial is not None and grads.v_initial is not None:
        dp = (1 - terms.ratio) * dp + terms.ratio * _matmul(d_out, block.gather(x.v_initial).mT)
        p_final = (1 - terms.ratio) * p
        block.scatter_add(grads.v_initial, _query_rowsmatmul(terms.ratio * p, d_out))
    block.scatter_add(grads.v, _query_rowsmatmul(p_final, d_out))
    grads.v[:, rows] = (p_self * d_out).sum(1)

    ds = dp.sub_(delta).mul_(p)
    ds_self = p_self * ((d_out * x.v[:, None, rows]).sum(-1, keepdim=True) - delta)
    if terms.distance is not None and grads.slopes is not None:
        grads.slopes -= (ds * terms.distance).sum((-2, -1), keepdim=True)
    d_q = ds_self * x.k_sum[:, None, rows]
    ds_final = ds
    if terms.ratio is not None and x.k_initial is not None and grads.k_initial is not None:
        ds_final, ds_initial = (1 - terms.ratio) * ds, terms.ratio * ds
        d_q += _matmul(ds_initial, block.gather(x.k_initial))
        block.scatter_add(grads.k_initial, _query_rowsmatmul(ds_initial, q))
    grads.q[:, :, query_rows] = d_q + _matmul(ds_final, block.gather(x.k_sum))
    block.scatter_add(grads.k_sum, _query_rowsmatmul(ds_final, q))
    grads.k_sum[:, rows] = (ds_self * q).sum(1)
