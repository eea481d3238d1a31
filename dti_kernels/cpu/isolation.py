"""Numbers that are not finite, on CPUs: they reach the rows that may see them and no other.

Blocks of rows meet blocks of keys, and a key that a row does not see gets the probability 0; but 0 x inf is NaN. An implementation
that meets a number which is not finite raises, and computes again with zeros in its place. All other rows are then bitwise what they
would be, and

    out, lse of a row are NaN     where its query, its own key or value, or a key or value that it sees is not finite
    dq of such a row is NaN, and so are the gradients of the keys and values that it sees

IEEE arithmetic decides elsewhere: for a number that meets only rows which see it, and for slopes, ratios and the scale.
Cost: O(T) beside the second run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from dti_kernels.inputs import Gradients, Inputs
from dti_kernels.layout import PREFIX_STOP, PROMPT_FIRST, ROW_STOP, START, STOP, SUM_START, SUM_STOP

NAN = float("nan")


class NotFinite(Exception):
    """An implementation met a number that is not finite, or a row's delta that overflows. Its results are void."""


def check_finite(*tensors: Tensor | None) -> None:
    """Raise NotFinite unless all numbers are finite."""
    for x in tensors:
        if x is not None and x.numel() and not all(bool(end.isfinite()) for end in x.detach().aminmax()):
            raise NotFinite


def forward(compute: Callable[..., tuple[Tensor, Tensor]], x: Inputs) -> tuple[Tensor, Tensor]:
    """`compute(x)`: `out` and `lse (H, T or S)`; `compute` raises NotFinite where a key or value that a block meets is not finite."""
    try:
        return compute(x)
    except NotFinite:
        pass
    bad = _bad_streams(x)
    out, lse = compute(x._replace(**_cleared(x, bad)), is_cleared=True)
    num_context, k_sum = x.num_context, bad.get("k_sum", bad["k"])
    of_sums = k_sum[:num_context] | bad["v"][:num_context]
    for initial in bad.keys() & {"k_initial", "v_initial"}:
        of_sums |= bad[initial]
    of_context = (bad["k"] | bad["v"])[:num_context]
    context = _sees_any(of_context, x.rows[:, x.num_skipped : num_context])
    sums = _sees_any(of_sums, x.rows[:, num_context:]) | k_sum[num_context:] | bad["v"][num_context:]
    unclear = torch.cat([context, sums]).repeat_interleave(x.q.shape[1] // x.k.shape[1], 1) | _bad_rows(x.q)
    return out.masked_fill(unclear[:, :, None], NAN), lse.masked_fill(unclear.T, NAN)


def backward(
    compute: Callable[..., Gradients],
    x: Inputs,
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
    slopes_grad: bool,
) -> Gradients:
    """`compute(x, grad_out, out, lse, slopes_grad)`, which raises NotFinite where a key or value that a block meets, or the `lse` or
    delta of a row, is not finite."""
    try:
        return compute(x, grad_out, out, lse, slopes_grad)
    except NotFinite:
        pass
    delta = (grad_out.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
    # Far from where another order of its sum could overflow.
    overflows = ~(delta.abs() < torch.finfo(lse.dtype).max / 1024)
    unclear = overflows | ~lse.isfinite().T | _bad_rows(x.q)  # (T or S, H)
    cleared = x._replace(**_cleared(x, _bad_streams(x) | {"q": unclear}))
    of_rows = (z.masked_fill(unclear[..., None], 0.0) for z in (grad_out, out))
    grads = compute(cleared, *of_rows, lse.masked_fill(unclear.T, 0.0), slopes_grad, is_cleared=True)
    dq, dk, dv, dk_sum, dk_initial, dv_initial, dslopes = (grad.clone() for grad in grads)
    dq[unclear] = NAN
    num_context, num_skipped, num_groups = x.num_context, x.num_skipped, x.k.shape[1]
    of_group = unclear.unflatten(1, (num_groups, -1)).any(-1)  # (T or S, G)
    context, sums = of_group.new_zeros(num_context, num_groups), of_group[num_context - num_skipped :]
    context[num_skipped:] = of_group[: num_context - num_skipped]
    tokens = torch.arange(num_context, device=x.keys.device)
    by_context = _any_between(context, tokens, x.keys[ROW_STOP])
    by_sums = _any_between(sums, x.keys[SUM_START], x.keys[SUM_STOP])
    dk[:num_context][by_context] = NAN
    dv[:num_context][by_context | by_sums] = NAN
    dv[num_context:][sums] = NAN
    of_sum_keys = dk if x.k_sum is None else dk_sum
    of_sum_keys[:num_context][by_sums] = NAN
    of_sum_keys[num_context:][sums] = NAN
    for grad in (dk_initial, dv_initial):
        if grad.numel():
            grad[by_sums] = NAN
    if dslopes.numel():
        dslopes[unclear[num_context - num_skipped :].any(0)] = NAN
    return Gradients(dq, dk, dv, dk_sum, dk_initial, dv_initial, dslopes)


def _bad_streams(x: Inputs) -> dict[str, Tensor]:
    """By stream that there is, its bad rows."""
    streams = ("k", "v", "k_sum", "k_initial", "v_initial")
    return {name: _bad_rows(getattr(x, name)) for name in streams if getattr(x, name) is not None}


def _bad_rows(x: Tensor) -> Tensor:
    """`(T, G)`: where a row of `(T, G, D)` holds a number that is not finite."""
    return ~x.isfinite().all(-1)


def _cleared(x: Inputs, bad: Mapping[str, Tensor]) -> dict[str, Any]:
    """Inputs with zeros in their bad rows."""
    return {name: getattr(x, name).masked_fill(rows[..., None], 0.0) for name, rows in bad.items()}


def _sees_any(bad: Tensor, rows: Tensor) -> Tensor:
    """`(rows, G)`: which rows see one of the bad context keys `(C, G)`, as prefix or in their span."""
    prefix = _any_between(bad, rows[PROMPT_FIRST], rows[PREFIX_STOP])
    return prefix | _any_between(bad, rows[START], rows[STOP])


def _any_between(bad: Tensor, first: Tensor, stop: Tensor) -> Tensor:
    """`(n, G)`: is any of `bad (m, G)` in the ranges `[first, stop)`, `(n,)` each?"""
    counts = torch.cat([bad.new_zeros(1, bad.shape[1], dtype=torch.int64), bad.long().cumsum(0)])
    return counts[stop.long()] > counts[first.long()]
