"""Numbers that are not finite, on CPUs: they reach the rows that may see them and no other.

Blocks of rows meet blocks of keys, and a key that a row does not see gets the probability 0; but 0 x inf is NaN. Where an
implementation meets a number that is not finite, it computes again with zeros in its place, which leaves every other row bitwise as it
would be, and then

    out, lse of a row are NaN     where its query, its own key or value, or a key or value that it sees is not finite
    dq of such a row is NaN, and so are the gradients of the keys and values that it sees

A number that no block meets beside rows which do not see it is left to IEEE arithmetic, and so are slopes, ratios and the scale.
O(T) beside the second run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dti_kernels.layout import PREFIX_STOP, PROMPT_FIRST, ROW_STOP, START, STOP, SUM_START, SUM_STOP

NAN = float("nan")
# Places among an operator's inputs: q, k, v, k_sum, k_initial, v_initial, ratios, slopes.
_STREAMS = slice(1, 6)


class NotFinite(Exception):
    """An implementation met a number that is not finite, or a row's delta that overflows: what it computed is void."""


def largest(*tensors: Tensor | None) -> float:
    """The largest magnitude in some tensors.

    Raises:
        NotFinite: a number is not finite.
    """
    ends = [float(end) for x in tensors if x is not None and x.numel() for end in x.detach().aminmax()]
    if not all(map(math.isfinite, ends)):
        raise NotFinite
    return max(map(abs, ends), default=0.0)


def forward(
    compute: Callable[..., tuple[Tensor, Tensor]],
    inputs: Sequence[Tensor | None],
    rows: Tensor,
    keys: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """`compute(*inputs, rows, keys, scale)`: `out` and `lse (H, T or S)`; `compute` raises NotFinite where a key or value that a
    block meets is not finite."""
    try:
        return compute(*inputs, rows, keys, scale)
    except NotFinite:
        pass
    q = inputs[0]
    assert q is not None
    bad = [_bad_rows(x) for x in inputs[_STREAMS]]
    out, lse = compute(
        q, *map(_cleared, inputs[_STREAMS], bad), *inputs[6:], rows, keys, scale, is_cleared=True
    )
    num_context, num_skipped = keys.shape[1], rows.shape[1] - q.shape[0]
    k, v, k_sum, k_initial, v_initial = bad
    assert k is not None
    assert v is not None
    k_sum = k if k_sum is None else k_sum
    of_sums = k_sum[:num_context] | v[:num_context]
    for initial in (k_initial, v_initial):
        of_sums = of_sums if initial is None else of_sums | initial
    context = _sees_any((k | v)[:num_context], rows[:, num_skipped:num_context])
    sums = _sees_any(of_sums, rows[:, num_context:]) | k_sum[num_context:] | v[num_context:]
    unclear = torch.cat([context, sums]).repeat_interleave(q.shape[1] // k.shape[1], 1) | _bad_rows(q)
    return out.masked_fill(unclear[:, :, None], NAN), lse.masked_fill(unclear.T, NAN)


def backward(
    compute: Callable[..., tuple[Tensor, ...]],
    grad_out: Tensor,
    inputs: Sequence[Tensor | None],
    rows: Tensor,
    keys: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    slopes_grad: bool,
) -> tuple[Tensor, ...]:
    """`compute(grad_out, *inputs, rows, keys, out, lse, scale, slopes_grad)`, which raises NotFinite where a key or value that a block
    meets, or the `lse` or delta of a row, is not finite."""
    try:
        return compute(grad_out, *inputs, rows, keys, out, lse, scale, slopes_grad)
    except NotFinite:
        pass
    q, k, _, k_sum = inputs[:4]
    assert q is not None
    assert k is not None
    delta = (grad_out.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
    # Far from where another order of its sum could overflow.
    unclear = (
        ~(delta.abs() < torch.finfo(lse.dtype).max / 1024) | ~lse.isfinite().T | _bad_rows(q)
    )  # (T or S, H)
    streams = [_cleared(x, _bad_rows(x)) for x in inputs[_STREAMS]]
    grads = compute(
        _cleared(grad_out, unclear),
        _cleared(q, unclear),
        *streams,
        *inputs[6:],
        rows,
        keys,
        _cleared(out, unclear),
        lse.masked_fill(unclear.T, 0.0),
        scale,
        slopes_grad,
        is_cleared=True,
    )
    dq, dk, dv, dk_sum, dk_initial, dv_initial, dslopes = (grad.clone() for grad in grads)
    dq[unclear] = NAN
    num_context, num_skipped = keys.shape[1], rows.shape[1] - q.shape[0]
    of_group = unclear.unflatten(1, (k.shape[1], -1)).any(-1)  # (T or S, G)
    context, sums = of_group.new_zeros(num_context, k.shape[1]), of_group[num_context - num_skipped :]
    context[num_skipped:] = of_group[: num_context - num_skipped]
    tokens = torch.arange(num_context, device=keys.device)
    by_context = _any_between(context, tokens, keys[ROW_STOP])
    by_sums = _any_between(sums, keys[SUM_START], keys[SUM_STOP])
    dk[:num_context][by_context] = NAN
    dv[:num_context][by_context | by_sums] = NAN
    dv[num_context:][sums] = NAN
    of_sum_keys = dk if k_sum is None else dk_sum
    of_sum_keys[:num_context][by_sums] = NAN
    of_sum_keys[num_context:][sums] = NAN
    for grad in (dk_initial, dv_initial):
        if grad.numel():
            grad[by_sums] = NAN
    if dslopes.numel():
        dslopes[unclear[num_context - num_skipped :].any(0)] = NAN
    return dq, dk, dv, dk_sum, dk_initial, dv_initial, dslopes


def _bad_rows(x: Any) -> Any:
    """`(T, G)`: where a row of `(T, G, D)` holds a number that is not finite; None for None."""
    return None if x is None else ~x.isfinite().all(-1)


def _cleared(x: Any, bad: Any) -> Any:
    """`x` with zeros in its bad rows."""
    return None if x is None else x.masked_fill(bad[..., None], 0.0)


def _sees_any(bad: Tensor, rows: Tensor) -> Tensor:
    """`(rows, G)`: which rows see one of the bad context keys `(C, G)`, as prefix or in their span."""
    prefix = _any_between(bad, rows[PROMPT_FIRST], rows[PREFIX_STOP])
    return prefix | _any_between(bad, rows[START], rows[STOP])


def _any_between(bad: Tensor, first: Tensor, stop: Tensor) -> Tensor:
    """`(n, G)`: is any of `bad (m, G)` in the ranges `[first, stop)`, `(n,)` each?"""
    counts = torch.cat([bad.new_zeros(1, bad.shape[1], dtype=torch.int64), bad.long().cumsum(0)])
    return counts[stop.long()] > counts[first.long()]
