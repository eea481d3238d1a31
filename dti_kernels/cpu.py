"""Blocked attention over streaming prompts in plain PyTorch: the CPU implementation of the operators.

A block of neighbouring rows meets the keys that any of its rows sees: one slice, and the prefix where it lies apart. Several
blocks are one call (a chunk), so that operators work on megabytes and not on kilobytes. Context rows run PyTorch's own blocked CPU
attention on (block, slice) with the visibility as bias; [SUM] rows, whose scores it cannot express (a key of their own, ALiBi, two
streams), are batched matmuls. Time is O(T x (window + block)), memory O(T) beside one chunk. Slices are accumulated in order:
deterministic. Autograd over the same blocks would allocate a full-size gradient per slice and turn quadratic.

Heads are packed into rows: M rows of the R = H / G query heads of one key head are one `(M R, D)` matrix.
Half precision is computed in float32, because CPUs without AVX512-BF16 have no fast 16-bit matmul.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dti_kernels.layout import PREFIX_STOP, PROMPT_FIRST, RESET_ID, START, STOP

# Rows of a block times query heads of a key head: few enough that most of a block's keys are visible to most of its rows. PyTorch's
# attention takes tiles of 64 rows from 192 rows on, of 32 below. [SUM] rows lie one interaction apart, so their blocks are narrower.
# Scores per chunk: what context rows never store may be larger than what [SUM] rows do, about 1 MiB, a core's cache (benchmarks/LOG.md).
CONTEXT_BLOCK = 192
CONTEXT_CHUNK_SCORES = 2**20
SUM_BLOCK = 32
SUM_CHUNK_SCORES = 2**18

# PyTorch's blocked CPU attention, forward and backward as two operators: what scaled_dot_product_attention calls.
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that scores, softmax and sums are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class _Chunk:
    """`B` blocks of `M` neighbouring rows from row `first` on, block b against its `N` keys.

    Keys of a block: the prefix of its first row's prompt where that lies apart, then the span from the first row's start to the
    last row's stop. The prefix of any later prompt in the block lies inside that span.
    """

    first: int
    num_blocks: int
    block: int
    keys: Tensor  # (B, N) context rows; C, which nobody sees, where a block has fewer keys
    spans: list[tuple[int, int, int, int]]  # per block: prefix first and stop, span first and stop
    num_prefix: int  # keys of the prefix part
    all_first: int  # columns [all_first, all_stop) are visible to every row of their block
    all_stop: int
    num_context: int

    @property
    def rows(self) -> slice:
        return slice(self.first, self.first + self.num_blocks * self.block)

    def query_rows(self, num_skipped: int) -> slice:
        """Where the rows are in tensors that leave out the first `num_skipped` rows."""
        return slice(self.rows.start - num_skipped, self.rows.stop - num_skipped)

    def row_field(self, rows: Tensor, field: int) -> Tensor:
        """`(B, M, 1)` of a row field."""
        return rows[field, self.rows].view(self.num_blocks, self.block, 1)

    def blocks(self, x: Tensor) -> Tensor:
        """`(G, B M, R, D)` to `(G B, M R, D)`."""
        return x.reshape(x.shape[0] * self.num_blocks, self.block * x.shape[2], x.shape[3])

    def by_block(self, x: Tensor) -> Tensor:
        """Rows of the chunk, `(G, B M, R, D)`, to `(B, G, M R, D)`; a view where R = 1."""
        split: Tensor = x.unflatten(1, (self.num_blocks, self.block))
        return split.transpose(0, 1).flatten(2, 3)

    def from_block(self, x: Tensor, per_group: int) -> Tensor:
        """`(B, G, M R, D)` back to `(G, B M, R, D)`."""
        split: Tensor = x.unflatten(2, (self.block, per_group))
        return split.transpose(0, 1).flatten(1, 2)

    def gather(self, x: Tensor) -> Tensor:
        """`(G, T or C, D)` to the keys of every block, `(B, G, N, D)`; a view of one block's slice."""
        if self.num_blocks == 1 and not self.num_prefix:
            return x[None, :, self.spans[0][2] : self.spans[0][3]]
        ids = self.keys.clamp_max(self.num_context - 1).view(-1)
        rows = F.embedding(ids, x.transpose(0, 1).flatten(1)).view(*self.keys.shape, x.shape[0], x.shape[2])
        return rows.transpose(1, 2)

    def gather_by_group(self, x: Tensor) -> Tensor:
        """The same as `(G B, N, D)`."""
        return self.gather(x).transpose(0, 1).flatten(0, 1)

    def scatter_add(self, x: Tensor, values: Tensor) -> None:
        """Add `(B, G, N, D)` to the keys in `x (G, T or C, D)`, block after block."""
        for (prefix_first, prefix_stop, first, stop), block in zip(self.spans, values):
            if prefix_first < prefix_stop:
                x[:, prefix_first:prefix_stop] += block[:, : prefix_stop - prefix_first]
            x[:, first:stop] += block[:, self.num_prefix : self.num_prefix + stop - first]

    def scatter_add_by_group(self, x: Tensor, values: Tensor) -> None:
        """The same from `(G B, N, D)`."""
        self.scatter_add(x, values.unflatten(0, (-1, self.num_blocks)).transpose(0, 1))

    def bias(self, rows: Tensor, per_group: int, buffer: list[Tensor]) -> Tensor:
        """`(B, 1, M R, N)`: 0 where a row sees a key, -inf where it does not. Memory is the buffer's: a fresh megabyte per chunk
        costs its page faults."""
        shape = (self.num_blocks, self.block * per_group, self.keys.shape[1])
        if math.prod(shape) > buffer[0].numel():
            buffer[0] = buffer[0].new_empty(math.prod(shape))
        bias = buffer[0][: math.prod(shape)].view(shape).zero_()
        return self.hide(bias, rows)[:, None]

    def hide(self, scores: Tensor, rows: Tensor) -> Tensor:
        """Set scores `(G B, M R, N)` of invisible keys to -inf, in place; only columns are touched that hide from somebody."""
        first, prefix_stop, start, stop = (
            self.row_field(rows, field) for field in (PROMPT_FIRST, PREFIX_STOP, START, STOP)
        )
        num_keys = self.keys.shape[1]
        by_head = scores.view(-1, self.num_blocks, self.block, self._per_group(scores), num_keys)

        def fill(begin: int, end: int, hidden: Tensor) -> None:
            by_head[..., begin:end].masked_fill_(hidden[:, :, None], float("-inf"))

        keys = self.keys[:, None]
        if bool((first < prefix_stop).any()):
            in_prefix = (keys >= first) & (keys < prefix_stop)
            fill(0, num_keys, ((keys < start) | (keys >= stop)) & ~in_prefix)
        elif self.all_first < self.all_stop:
            fill(0, self.all_first, keys[..., : self.all_first] < start)
            fill(self.all_stop, num_keys, keys[..., self.all_stop :] >= stop)
        else:
            fill(0, num_keys, (keys < start) | (keys >= stop))
        return scores

    def _per_group(self, x: Tensor) -> int:
        return x.shape[1] // self.block

    def times_block(self, x: Tensor, per_pair: Tensor) -> Tensor:
        """`(G B, M R, N)` times `(B, M, N)`."""
        by_head = x.view(-1, self.num_blocks, self.block, self._per_group(x), x.shape[2])
        return (by_head * per_pair[:, :, None]).view_as(x)


def _chunks(
    rows: Tensor, first: int, stop: int, block: int, num_heads: int, chunk_scores: int, num_context: int
) -> Iterator[_Chunk]:
    """Chunks of the rows `[first, stop)`, whose starts and stops never decrease; a short last block is a chunk of its own."""
    heads = range(first, stop, block)
    tails = [min(row + block, stop) - 1 for row in heads]
    head, tail = rows[:, list(heads)].tolist(), rows[:, tails].tolist()
    spans = list(zip(head[PROMPT_FIRST], head[PREFIX_STOP], head[START], tail[STOP]))
    common = list(zip(tail[START], head[STOP]))  # what the last row sees first and the first row sees last
    begin = 0
    while begin < len(spans):
        end, widest = begin, 0
        while end < len(spans):
            prefix_first, prefix_stop, key_first, key_stop = spans[end]
            wider = max(widest, prefix_stop - prefix_first + key_stop - key_first)
            is_short = tails[end] - heads[end] + 1 < block
            if end > begin and ((end + 1 - begin) * block * num_heads * wider > chunk_scores or is_short):
                break
            end, widest = end + 1, wider
        size = tails[begin] - heads[begin] + 1
        yield _chunk(heads[begin], size, spans[begin:end], common[begin:end], num_context)
        begin = end


def _chunk(
    first: int,
    block: int,
    spans: list[tuple[int, int, int, int]],
    common: list[tuple[int, int]],
    num_context: int,
) -> _Chunk:
    num_prefix = max(span[1] - span[0] for span in spans)
    if len(spans) == 1 and not num_prefix:
        keys = torch.arange(spans[0][2], spans[0][3], dtype=torch.int32)[None]
    else:
        keys = _padded_keys(spans, num_prefix, num_context)
    return _Chunk(
        first=first,
        num_blocks=len(spans),
        block=block,
        keys=keys,
        spans=spans,
        num_prefix=num_prefix,
        all_first=num_prefix + max(seen - span[2] for (seen, _), span in zip(common, spans)),
        all_stop=num_prefix + min(seen - span[2] for (_, seen), span in zip(common, spans)),
        num_context=num_context,
    )


def _padded_keys(spans: list[tuple[int, int, int, int]], num_prefix: int, num_context: int) -> Tensor:
    """`(B, N)`: prefix and span of every block, each part filled up with C."""
    prefix_first, prefix_stop, key_first, key_stop = torch.tensor(spans, dtype=torch.int32).T[..., None]
    prefix_keys = prefix_first + torch.arange(num_prefix, dtype=torch.int32)
    span_keys = key_first + torch.arange(max(span[3] - span[2] for span in spans), dtype=torch.int32)
    prefix_keys.masked_fill_(prefix_keys >= prefix_stop, num_context)
    span_keys.masked_fill_(span_keys >= key_stop, num_context)
    return torch.cat([prefix_keys, span_keys], 1)


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

    def context_chunks(self) -> Iterator[_Chunk]:
        return self._chunks(self.num_skipped, self.num_context, CONTEXT_BLOCK, CONTEXT_CHUNK_SCORES)

    def sum_chunks(self) -> Iterator[_Chunk]:
        return self._chunks(self.num_context, self.rows.shape[1], SUM_BLOCK, SUM_CHUNK_SCORES)

    def _chunks(self, first: int, stop: int, block_rows: int, chunk_scores: int) -> Iterator[_Chunk]:
        num_groups, _, per_group, _ = self.q.shape
        block = max(1, block_rows // per_group)
        return _chunks(self.rows, first, stop, block, num_groups * per_group, chunk_scores, self.num_context)


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
    scores: Tensor  # (G B, M R, N + 1), -inf where invisible; the last column is the row's own key
    k_self: Tensor  # (G B, M R, D)
    v_self: Tensor  # (G B, M R, D)
    distance: Tensor | None  # (B, M, N) ALiBi distance in tokens, where there are slopes
    ratio: Tensor | None  # (B, M, N) reset ratio a(d), where there is a reset


def _context_forward(x: _Inputs, chunk: _Chunk, out: Tensor, lse: Tensor) -> None:
    bias = chunk.bias(x.rows, x.q.shape[2], x.bias_buffer)
    q, k, v = chunk.by_block(x.q[:, chunk.rows]), chunk.gather(x.k), chunk.gather(x.v)
    out_rows, lse_rows = _flash(q, k, v, 0.0, False, attn_mask=bias, scale=x.scale)
    out[:, chunk.rows] = chunk.from_block(out_rows, x.q.shape[2])
    lse[:, chunk.rows] = chunk.from_block(lse_rows[..., None], x.q.shape[2])


def _sum_terms(x: _Inputs, chunk: _Chunk) -> _SumTerms:
    q = chunk.blocks(x.q[:, chunk.query_rows(x.num_skipped)]) * x.scale
    scores = torch.bmm(q, chunk.gather_by_group(x.k_sum).mT)
    ratio = distance = None
    if x.ratios is not None and x.k_initial is not None:
        key_ids = x.rows[RESET_ID][chunk.keys.clamp_max(x.num_context - 1)]
        steps = chunk.row_field(x.rows, RESET_ID) - key_ids[:, None]
        ratio = x.ratios[steps.clamp_(0, len(x.ratios) - 1)]
        initial = torch.bmm(q, chunk.gather_by_group(x.k_initial).mT)
        scores = chunk.times_block(scores, 1 - ratio) + chunk.times_block(initial, ratio)
    if x.slopes is not None:
        distance = _alibi_distance(x.rows, chunk).to(scores.dtype)
        shape = (x.q.shape[0], chunk.num_blocks, chunk.block, -1, distance.shape[2])
        scores.view(shape).sub_(x.slopes * distance[:, :, None])
    chunk.hide(scores, x.rows)
    per_group = (-1, -1, x.q.shape[2], -1)
    k_self, v_self = (chunk.blocks(of[:, chunk.rows, None].expand(per_group)) for of in (x.k_sum, x.v))
    scores = torch.cat([scores, (q * k_self).sum(-1, keepdim=True)], -1)
    return _SumTerms(q, scores, k_self, v_self, distance, ratio)


def _alibi_distance(rows: Tensor, chunk: _Chunk) -> Tensor:
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
    for chunk in x.context_chunks():
        _context_forward(x, chunk, out, lse)
    for chunk in x.sum_chunks():
        terms, query_rows = _sum_terms(x, chunk), chunk.query_rows(x.num_skipped)
        p, lse_rows = _softmax(terms.scores)
        read = _read_values(x, chunk, p[..., :-1], terms.ratio) + p[..., -1:] * terms.v_self
        out[:, query_rows] = read.view_as(out[:, query_rows])
        lse[:, query_rows] = lse_rows.view_as(lse[:, query_rows])
    return _ungrouped(out, q.dtype), _ungrouped(lse, lse.dtype).squeeze(-1).T.contiguous()


def _softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities and log-sum-exp `(..., 1)`. A block has all keys of its rows, so no running maximum is needed; the largest
    probability is exp(max - lse)."""
    p = torch.softmax(scores, -1)
    return p, scores.amax(-1, keepdim=True) - p.amax(-1, keepdim=True).log_()


def _read_values(x: _Inputs, chunk: _Chunk, p: Tensor, ratio: Tensor | None) -> Tensor:
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
    for chunk in x.context_chunks():
        _context_backward(x, grads, chunk, *(of[:, chunk.rows] for of in (d_out, out_heads, lse_heads)))
    for chunk in x.sum_chunks():
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


def _context_backward(
    x: _Inputs, grads: _Gradients, chunk: _Chunk, d_out: Tensor, out: Tensor, lse: Tensor
) -> None:
    bias = chunk.bias(x.rows, x.q.shape[2], x.bias_buffer)
    q, k, v = chunk.by_block(x.q[:, chunk.rows]), chunk.gather(x.k), chunk.gather(x.v)
    d_out, out, lse = (chunk.by_block(of) for of in (d_out, out, lse))
    dq, dk, dv = _flash_backward(
        d_out, q, k, v, out, lse.squeeze(-1), 0.0, False, attn_mask=bias, scale=x.scale
    )
    grads.q[:, chunk.rows] = chunk.from_block(dq, x.q.shape[2])
    chunk.scatter_add(grads.k, dk)
    chunk.scatter_add(grads.v, dv)


def _sum_backward(x: _Inputs, grads: _Gradients, chunk: _Chunk, d_out: Tensor, out: Tensor) -> None:
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
