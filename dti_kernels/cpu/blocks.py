"""Attention over streaming prompts in plain PyTorch, block after block: the CPU fallback where nothing can be compiled.

A block is some neighbouring rows, either context or [SUM] rows, and the keys that any of them sees: the prefix of the first row's prompt
where it lies apart, the span from the first row's start to the last row's stop, and the own keys of [SUM] rows. Its scores are dense, and
the backward computes them again. Time is O(T x (window + block)), memory O(T) beside one block. Gradients of keys are summed block after
block: deterministic. Half precision is computed in float32.

A key that a row does not see has the score -inf and the probability 0, however large its products are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from dti_kernels.contract import accumulation_dtype
from dti_kernels.cpu.isolation import check_finite
from dti_kernels.inputs import Gradients, Inputs
from dti_kernels.layout import RESET_ID, START, STOP

# Rows of a block times query heads of a key head: enough for matrix products, and few beside the keys of a window.
BLOCK_ROWS = 96
# A block may have twice the keys of its first row and these: [SUM] rows lie an interaction or a prompt apart.
MORE_KEYS = 512


class _Block:
    """M rows times the R query heads of a key head, and their N keys: n context keys, then the own keys of [SUM] rows.

    Lists hold an entry for each stream that the rows read: keys and, with a reset, initial states.
    """

    def __init__(self, x: Inputs, first: int, stop: int) -> None:
        self.num_groups, per_group = x.k.shape[1], x.q.shape[1] // x.k.shape[1]
        self.of_sums = first >= x.num_context
        self.queries = slice(first - x.num_skipped, stop - x.num_skipped)
        prompt, prefix_end, span, *_ = x.rows[:, first].tolist()
        context_keys = [slice(prompt, prefix_end), slice(span, int(x.rows[STOP, stop - 1]))]
        own_keys = [slice(first, stop)] if self.of_sums else []
        self.slices = [context_keys + own_keys, context_keys]

        key = torch.cat([torch.arange(keys.start, keys.stop, dtype=torch.int32) for keys in context_keys])
        of_rows = x.rows[: RESET_ID + 1, first:stop].repeat_interleave(per_group, 1)[..., None]
        prompt_first, prefix_stop, start, stop_key, reset_id = of_rows  # (M R, 1)
        seen = (key >= start) & (key < stop_key) | (key >= prompt_first) & (key < prefix_stop)
        if self.of_sums:
            own = torch.eye(stop - first, dtype=torch.bool).repeat_interleave(per_group, 0)
            seen = torch.cat([seen, own], 1)
        self.hidden = ~seen  # (M R, N)
        # (M R, n) tokens from a [SUM] back to a key; a prefix key outside the span sits right before it.
        self.distance = torch.where(key < prefix_stop, stop_key - start + prefix_stop - key, stop_key - key)
        self.slopes = self.ratio = None
        if self.of_sums and x.slopes is not None:
            self.slopes = x.slopes.view(-1, 1, per_group).expand(-1, stop - first, -1).flatten(1)[..., None]
        if self.of_sums and x.ratios is not None:
            steps = reset_id - x.rows[RESET_ID, key]
            self.ratio = x.ratios[steps.clamp_(0, len(x.ratios) - 1)]  # (M R, n)

    def keys(self, x: Inputs) -> list[Tensor]:
        """The tensors that the rows read as keys, among inputs or among their gradients."""
        keys = x.k if x.k_sum is None or not self.of_sums else x.k_sum
        return [keys] if x.k_initial is None or not self.of_sums else [keys, x.k_initial]

    def values(self, x: Inputs) -> list[Tensor]:
        """The tensors that they read as values."""
        return [x.v] if x.v_initial is None or not self.of_sums else [x.v, x.v_initial]

    def heads(self, rows: Tensor) -> Tensor:
        """The block's rows of `(T or S, H, D)` as `(G, M R, D)`."""
        of_block: Tensor = rows[self.queries].unflatten(1, (self.num_groups, -1))
        return of_block.transpose(0, 1).flatten(1, 2)

    def write(self, heads: Tensor, rows: Tensor) -> None:
        """The inverse of `heads`."""
        of_block = rows[self.queries]
        of_block.copy_(heads.unflatten(1, (len(of_block), -1)).transpose(0, 1).flatten(1, 2))

    def products(self, rows: Tensor, streams: list[Tensor]) -> Tensor:
        """`(G, M R, N)`: rows `(G, M R, D)` times keys or values, blended where there are two streams."""
        products, *initial = [rows @ _gather(x, keys).mT for x, keys in zip(streams, self.slices)]
        if initial and self.ratio is not None:
            products[..., : self.ratio.shape[1]].lerp_(initial[0], self.ratio)
        return products

    def split(self, p: Tensor) -> list[Tensor]:
        """Probabilities, or gradients of scores, by stream: `(G, M R, N)`, in the memory of `p`, and `(G, M R, n)`."""
        if self.ratio is None:
            return [p]
        of_context = p[..., : self.ratio.shape[1]]
        initial = of_context * self.ratio
        of_context -= initial
        return [p, initial]

    def read(self, weights: list[Tensor], streams: list[Tensor]) -> Tensor:
        """`(G, M R, D)`: weights, as `split` gives them, times keys or values."""
        read, *initial = [w @ _gather(x, keys) for w, x, keys in zip(weights, streams, self.slices)]
        return read + initial[0] if initial else read

    def add(self, weights: list[Tensor], rows: Tensor, grads: list[Tensor]) -> None:
        """Add transposed weights times rows `(G, M R, D)` to gradients of keys or values."""
        for w, grad, slices in zip(weights, grads, self.slices):
            parts = (w.mT @ rows).transpose(0, 1).split([keys.stop - keys.start for keys in slices])
            for part, keys in zip(parts, slices):
                grad[keys] += part

    def attend(self, x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """Queries times scale `(G, M R, D)`, and their scores and probabilities `(G, M R, N)`."""
        q = self.heads(x.q) * x.scale
        scores = self.products(q, self.keys(x))
        if self.slopes is not None:
            scores[..., : self.distance.shape[1]].addcmul_(self.slopes, self.distance, value=-1)
        scores.masked_fill_(self.hidden, -torch.inf)
        return q, scores, torch.softmax(scores, -1)


def _gather(x: Tensor, slices: list[slice]) -> Tensor:
    """Keys `(G, N, D)` of `(T or C, G, D)`."""
    return torch.cat([x[keys] for keys in slices]).transpose(0, 1)


def _blocks(x: Inputs) -> Iterator[_Block]:
    """Blocks of all rows that have a query. Stops of context rows never decrease, and neither do those of [SUM] rows."""
    stops, most = x.rows[STOP].numpy(), max(1, BLOCK_ROWS * x.k.shape[1] // x.q.shape[1])
    for first, end in ((x.num_skipped, x.num_context), (x.num_context, x.rows.shape[1])):
        while first < end:
            last_stop = 2 * int(stops[first]) - int(x.rows[START, first]) + MORE_KEYS
            stop = first + int(stops[first : min(first + most, end)].searchsorted(last_stop, "right"))
            yield _Block(x, first, stop)
            first = stop


def _each(x: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    """Inputs with a function applied to all tensors but the layout's."""
    named = x._asdict().items()
    changed: Any = {name: change(z) for name, z in named if isinstance(z, Tensor) and z.is_floating_point()}
    return x._replace(**changed)


@torch.autocast("cpu", enabled=False)
def forward(x: Inputs, is_cleared: bool = False) -> tuple[Tensor, Tensor]:
    """`out`, shape and dtype of q, and the natural log-sum-exp `(H, T or S)` in the accumulation dtype.

    `is_cleared`: zeros stand where keys and values were not finite, and what is not finite now is so by right.

    Raises:
        NotFinite: a key or value is not finite.
    """
    if not is_cleared:
        check_finite(x.k, x.v, x.k_sum, x.k_initial, x.v_initial)
    wide = _each(x, lambda z: z.to(accumulation_dtype(x.q.dtype)))
    out, lse = wide.q.new_empty(x.q.shape), wide.q.new_empty(*x.q.shape[:2], 1)
    for block in _blocks(wide):
        _, scores, p = block.attend(wide)
        # The largest probability is e^(the largest score - lse).
        block.write(scores.amax(-1, keepdim=True) - p.amax(-1, keepdim=True).log(), lse)
        block.write(block.read(block.split(p), block.values(wide)), out)
    return out.to(x.q.dtype), lse[..., 0].T.contiguous()


@torch.autocast("cpu", enabled=False)
def backward(
    x: Inputs, grad_out: Tensor, out: Tensor, lse: Tensor, slopes_grad: bool, is_cleared: bool = False
) -> Gradients:
    """Gradients of the inputs; `is_cleared` as for the forward.

    Raises:
        NotFinite: a key, a value, or the log-sum-exp or delta (`out . grad_out`) of a row is not finite.
    """
    wide = _each(x, lambda z: z.to(accumulation_dtype(x.q.dtype)))
    d_out = grad_out.to(wide.q.dtype)
    delta = (d_out * out).sum(-1, keepdim=True)
    if not is_cleared:
        check_finite(x.k, x.v, x.k_sum, x.k_initial, x.v_initial, lse, delta)
    grads = _each(wide, lambda z: z.new_zeros(z.shape))
    dslopes = torch.zeros(x.k.shape[1], x.q.shape[1] // x.k.shape[1], dtype=torch.float64)
    for block in _blocks(wide):
        (q, _, p), of_block = block.attend(wide), block.heads(d_out)
        ds = block.products(of_block, block.values(wide)) - block.heads(delta)
        ds.mul_(p).masked_fill_(p == 0, 0.0)  # also where a product overflows
        if block.slopes is not None and slopes_grad:
            # Terms of both signs that nearly cancel.
            by_row = (ds[..., : block.distance.shape[1]] * block.distance).sum(-1, dtype=torch.float64)
            dslopes -= by_row.unflatten(1, (-1, dslopes.shape[1])).sum(1)
        block.add(block.split(p), of_block, block.values(grads))
        of_scores = block.split(ds)
        block.add(of_scores, q, block.keys(grads))
        block.write(block.read(of_scores, block.keys(wide)) * x.scale, grads.q)
    found = grads._replace(slopes=dslopes.view(-1)).differentiable(slopes_grad)
    like = x.differentiable(slopes_grad)
    return Gradients(
        *(x.q.new_empty(0) if a is None or b is None else a.to(b.dtype) for a, b in zip(found, like))
    )
