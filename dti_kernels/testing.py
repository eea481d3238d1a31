"""The one tolerance rule: how far an implementation of `windowed_attn` may be from the float64 reference, element by element.

Every element is a sum. Rounding follows the magnitudes of its terms, however much of them cancels. So each element of the output and of
every gradient has a budget of its own, from the exact inputs by first-order error analysis (Higham, Accuracy and Stability of Numerical
Algorithms, chapter 3):

    arithmetic   unit roundoffs of the accumulation (float32; float64 for float64), carried through scores, softmax and gradients;
                 a sum of n terms, in any order, is off by about sqrt(n) of them; probabilities below the smallest normal number are noise
    storage      half a unit in the last place of the element itself, once, in the dtype that it is stored in
    spread       16 bits only: a standard deviation. The gradients' `delta` is made of the stored output, which was rounded; GPUs round
                 probabilities and score gradients before they multiply them

    |error| <= arithmetic + storage + DEVIATIONS spread       for every element
    root mean square of error / its expected size             for every tensor in 16 bits, of n rows and heads:
        <= 1 + DEVIATIONS / sqrt(2 n)                         an error that is everywhere and large nowhere

No part of it comes from a run in low precision. tests/kernels/test_mutants.py shows which errors it finds and which pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dti_kernels.contract import DTYPES, check_tensors, checked_inputs
from dti_kernels.counts import shown
from dti_kernels.inputs import Inputs
from dti_kernels.layout import StreamLayout
from dti_kernels.reference import alibi_distance, reset_ratio
from dti_kernels.reset import HiddenStateReset

DEVIATIONS = 6.0  # standard deviations: of a thousand million normal draws, two lie beyond
EXPONENTIAL = 8  # unit roundoffs of an exponential: libraries are within 2, GPUs' approximations within 6


@dataclass
class Budget:
    """The error that rounding may cause in one tensor, in its shape and float64.

    Attributes:
        arithmetic: the largest error of the accumulation.
        variance: of the error that 16 bits add; 0 in 32 and 64 bits.
    """

    arithmetic: Tensor
    variance: Tensor


def error_budgets(
    inputs: Mapping[str, Tensor],
    grad_out: Tensor,
    layout: StreamLayout,
    dtype: torch.dtype,
    reset: HiddenStateReset | None = None,
    scale: float | None = None,
    rounds_factors: bool = True,
) -> dict[str, Budget]:
    """Budgets of the output and of every gradient of `windowed_attn`.

    Args:
        inputs: `q (T or S, H, D)`, `k`, `v (T, G, D)` and any of `k_sum`, `alibi_slopes`, `k_initial` and `v_initial`, with the numbers
            that the implementation got.
        grad_out: `(T or S, H, D)`.
        layout: which rows exist and what each sees.
        dtype: of the implementation's inputs.
        reset: its settings; the initial states are those of `inputs`.
        scale: of the dot products; default `D ** -0.5`.
        rounds_factors: in 16 bits, probabilities and score gradients are rounded before they are multiplied: so on GPUs, and in bfloat16
            on CPUs that multiply it.

    Returns:
        By name: `out`, and `d` before the name of each input.

    Raises:
        TypeError, ValueError: as `windowed_attn`; an input is missing or unknown, `grad_out` has not q's shape, or the operator does not
            take `dtype`.

    Cost: O(H x T x C) time, O(T x C) memory.
    """
    _check_dtype(dtype)
    x = _exact_inputs(inputs, grad_out, layout, reset, scale)
    budgets = {
        name: Budget(*torch.zeros(2, *like.shape, dtype=torch.float64, device=like.device))
        for name, like in [("out", x.q), *((f"d{name}", value) for name, value in inputs.items())]
    }
    accumulation = torch.finfo(torch.promote_types(dtype, torch.float32))
    unit, half_precision = accumulation.eps / 2, dtype.itemsize == 2
    underflow = 4 * accumulation.smallest_normal / unit
    smallest = torch.finfo(dtype).smallest_normal if rounds_factors else None
    for head in range(x.q.shape[1]):
        for of_sums in (False, True):
            if of_sums or not x.num_skipped:
                rows = _Rows.of(x, grad_out.detach().double(), layout, reset, head, of_sums)
                p, p_error = rows.probabilities(underflow)
                _add_output(rows, p, p_error, smallest, budgets)
                _add_gradients(rows, p, p_error, smallest, budgets)
    for budget in budgets.values():
        budget.arithmetic *= unit
        budget.variance *= half_precision * (torch.finfo(dtype).eps / 2) ** 2 / 3
    return budgets


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in DTYPES:
        raise TypeError(f"dtype must be torch.float16, bfloat16, float32 or float64, got {shown(dtype)}")


def _exact_inputs(
    inputs: Mapping[str, Tensor],
    grad_out: Tensor,
    layout: StreamLayout,
    reset: HiddenStateReset | None,
    scale: float | None,
) -> Inputs:
    """The operator's inputs in float64."""
    check_tensors({**inputs, "grad_out": grad_out})
    states = () if reset is None else ("k_initial", "v_initial")
    missing = [name for name in ("q", "k", "v", *states) if name not in inputs]
    unknown = [name for name in inputs if name not in ("q", "k", "v", "k_sum", "alibi_slopes", *states)]
    if missing or unknown:
        raise ValueError(
            f"inputs must hold q, k, v and, with a reset, k_initial and v_initial: {missing} missing, {unknown} unknown"
        )
    exact = {name: value.detach().double() for name, value in inputs.items()}
    if isinstance(reset, HiddenStateReset):
        reset = replace(reset, k_initial=exact.pop("k_initial"), v_initial=exact.pop("v_initial"))
    x = checked_inputs(exact, layout, reset, scale)
    if grad_out.shape != x.q.shape:
        raise ValueError(f"grad_out must have q's shape {tuple(x.q.shape)}, got {tuple(grad_out.shape)}")
    return x


def shares(
    actual: Mapping[str, Tensor],
    golden: Mapping[str, Tensor],
    budgets: Mapping[str, Budget],
    dtype: torch.dtype,
) -> dict[str, float]:
    """By tensor, the share of its budget that an implementation uses; above 1 it fails.

    Args:
        actual: its output and gradients, of inputs in `dtype`.
        golden: those of the reference in float64, of the same numbers.
        budgets: of `error_budgets`.
        dtype: of the inputs.

    Returns:
        The larger of the worst element's share and, in 16 bits, that of the root mean square; infinite where a number is not finite.

    Raises:
        TypeError: one is no tensor of floating point, or the operator does not take `dtype`.
        ValueError: names or shapes differ, or a budget is missing.
    """
    _check_dtype(dtype)
    if actual.keys() != golden.keys() or not golden.keys() <= budgets.keys():
        raise ValueError(
            f"expected the tensors {sorted(golden)} and their budgets, got {sorted(actual)} and {sorted(budgets)}"
        )
    check_tensors({**{f"golden {name}": x for name, x in golden.items()}, **actual})
    found = {}
    for name, gold in golden.items():
        got, gold = actual[name].detach().cpu(), gold.detach().cpu().double()
        if got.dtype not in DTYPES:
            raise TypeError(f"{name} must be of floating point, got {got.dtype}")
        if got.shape != gold.shape:
            raise ValueError(f"{name} must have shape {tuple(gold.shape)}, got {tuple(got.shape)}")
        if not gold.numel():
            continue
        arithmetic, variance = budgets[name].arithmetic.cpu(), budgets[name].variance.cpu()
        stored = torch.finfo(got.dtype)
        # Below the smallest normal number, roundings are of one size.
        smallest = max(stored.smallest_normal * stored.eps / 2, torch.finfo(torch.float64).smallest_normal)
        storage = stored.eps / 2 * gold.abs() + smallest
        error = (got.double() - gold).abs()
        share = (error / (arithmetic + storage + DEVIATIONS * variance.sqrt())).max()
        if dtype.itemsize == 2:
            size = (arithmetic.square() + storage.square() / 3 + variance).sqrt()
            draws = gold.shape[0] if gold.ndim == 1 else gold.shape[0] * gold.shape[1]
            most = 1 + DEVIATIONS / (2 * draws) ** 0.5
            share = torch.maximum(share, (error / size).square().mean().sqrt() / most)
        found[name] = float(share) if bool(torch.isfinite(got).all()) else float("inf")
    return found


def assert_within_budget(
    actual: Mapping[str, Tensor],
    golden: Mapping[str, Tensor],
    budgets: Mapping[str, Budget],
    dtype: torch.dtype,
) -> None:
    """Raise AssertionError, naming the tensors and their shares, unless all `shares` are at most 1."""
    found = shares(actual, golden, budgets, dtype)
    worst = [f"{name} uses {share:.2f} of it" for name, share in found.items() if not share <= 1]
    if worst:
        raise AssertionError(f"{dtype}: not within the error budget: {', '.join(worst)}")


@dataclass(frozen=True)
class _Stream:
    """Keys and values `(C, D)` of one head, and how much of them each row reads, `(M, C)`."""

    keys: str
    values: str
    k: Tensor
    v: Tensor
    weight: Tensor


@dataclass(frozen=True)
class _Rows:
    """Context or [SUM] rows of one query head. Columns are the context keys and the row's own, which a context row does not see."""

    head: int
    group: int
    queries: slice
    own: slice  # their own keys
    q: Tensor  # (M, D)
    d_out: Tensor
    k_own: Tensor
    v_own: Tensor
    streams: list[_Stream]
    visible: Tensor  # (M, C + 1)
    distance: Tensor  # (M, C + 1)
    slope: Tensor | None
    scale: float
    heads_per_key: int

    @staticmethod
    def of(
        x: Inputs,
        grad_out: Tensor,
        layout: StreamLayout,
        reset: HiddenStateReset | None,
        head: int,
        of_sums: bool,
    ) -> _Rows:
        num_context, per_key = layout.num_context, x.q.shape[1] // x.k.shape[1]
        own = slice(num_context, layout.num_rows) if of_sums else slice(0, num_context)
        queries = slice(own.start - x.num_skipped, own.stop - x.num_skipped)
        context, group = slice(num_context), head // per_key
        keys, name = (x.k_sum, "dk_sum") if of_sums and x.k_sum is not None else (x.k, "dk")
        visible = layout.dense_visibility()[own]
        visible = torch.cat([visible, visible.new_full((len(visible), 1), of_sums)], 1)
        distance = torch.zeros_like(visible, dtype=torch.float64)
        if of_sums:
            distance[:, :-1] = alibi_distance(layout)
        weight, initial = torch.ones_like(distance[:, :-1]), []
        if of_sums and reset is not None and x.k_initial is not None and x.v_initial is not None:
            ratio = reset_ratio(layout, reset, torch.float64)
            tensors = x.k_initial[:, group], x.v_initial[:, group]
            weight, initial = 1 - ratio, [_Stream("dk_initial", "dv_initial", *tensors, ratio)]
        streams = [_Stream(name, "dv", keys[context, group], x.v[context, group], weight), *initial]
        return _Rows(
            head=head,
            group=group,
            queries=queries,
            own=own,
            q=x.q[queries, head],
            d_out=grad_out[queries, head],
            k_own=keys[own, group],
            v_own=x.v[own, group],
            streams=streams,
            visible=visible,
            distance=distance,
            slope=x.slopes[head] if of_sums and x.slopes is not None else None,
            scale=x.scale,
            heads_per_key=per_key,
        )

    @property
    def penalty(self) -> Tensor | float:
        """Subtracted from the scores by ALiBi."""
        return 0.0 if self.slope is None else self.slope * self.distance

    def keys(self, a: Tensor, change: Callable[[Tensor], Tensor] = torch.positive) -> Tensor:
        """`(M, C + 1)`: products of `a (M, D)` with the keys that each row reads, every one of them changed by a function."""
        return self._products(a, [change(stream.k) for stream in self.streams], change(self.k_own))

    def values(self, a: Tensor, change: Callable[[Tensor], Tensor] = torch.positive) -> Tensor:
        """The same with values."""
        return self._products(a, [change(stream.v) for stream in self.streams], change(self.v_own))

    def _products(self, a: Tensor, of: list[Tensor], own: Tensor) -> Tensor:
        blended: Any = sum(stream.weight * (a @ x.mT) for stream, x in zip(self.streams, of))
        return torch.cat([blended, (a * own).sum(-1, keepdim=True)], 1)

    def read_keys(self, p: Tensor, change: Callable[[Tensor], Tensor] = torch.positive) -> Tensor:
        """`(M, D)`: sum of `p (M, C + 1)` times the keys that each row reads; weights, `p` and keys changed by a function."""
        return self._read(p, [stream.k for stream in self.streams], self.k_own, change)

    def read_values(self, p: Tensor, change: Callable[[Tensor], Tensor] = torch.positive) -> Tensor:
        """The same of values."""
        return self._read(p, [stream.v for stream in self.streams], self.v_own, change)

    def _read(self, p: Tensor, of: list[Tensor], own: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        read: Any = sum(change(stream.weight * p[:, :-1]) @ change(x) for stream, x in zip(self.streams, of))
        return torch.as_tensor(read) + change(p[:, -1:]) * change(own)

    def probabilities(self, underflow: float) -> tuple[Tensor, Tensor]:
        """`(M, C + 1)` exact, and their errors in unit roundoffs."""
        s = self.scale * self.keys(self.q) - self.penalty
        size = self.scale * self.keys(self.q.abs(), torch.abs) + self.penalty
        s = s.masked_fill(~self.visible, float("-inf"))
        lse = torch.logsumexp(s, -1, keepdim=True)
        p = torch.exp(s - lse)
        of_score = _roundings(self.q.shape[1]) * size + s.masked_fill(~self.visible, 0.0).abs() + lse.abs()
        of_total = (p * of_score).sum(-1, keepdim=True) + _roundings(self.num_keys)
        return p, p * (of_score + of_total + EXPONENTIAL) + underflow * self.visible

    @property
    def num_keys(self) -> Tensor:
        """`(M, 1)`: visible ones."""
        return self.visible.sum(-1, keepdim=True)


def _roundings(count: Any) -> Any:
    """The error of a sum of `count` terms, in roundings of the size of all terms together."""
    return 2 * count**0.5 + 4


def _rounded(x: Tensor, smallest: float | None) -> Tensor:
    """Squared magnitude that the rounding of `x` is relative to, at least the smallest normal number; 0 where `smallest` is None: `x` is
    not rounded."""
    if smallest is None:
        return torch.zeros_like(x)
    return x.square() + smallest**2 * (x != 0)


def _add_output(
    rows: _Rows, p: Tensor, p_error: Tensor, smallest: float | None, budgets: Mapping[str, Budget]
) -> None:
    at = (rows.queries, rows.head)
    budgets["out"].arithmetic[at] += rows.read_values(p_error + _roundings(rows.num_keys) * p, torch.abs)
    budgets["out"].variance[at] += rows.read_values(p, lambda y: _rounded(y, smallest))


def _add_gradients(
    rows: _Rows, p: Tensor, p_error: Tensor, smallest: float | None, budgets: Mapping[str, Budget]
) -> None:
    def rounded(y: Tensor) -> Tensor:
        return _rounded(y, smallest)

    of_dots, of_keys = _roundings(rows.q.shape[1]), _roundings(rows.num_keys)
    of_rows = _roundings(rows.visible.sum(0) * rows.heads_per_key)
    at, scale = (rows.queries, rows.head), rows.scale

    # delta = d_out . out, from the stored output
    out = rows.read_values(p)
    of_delta = budgets["out"].arithmetic[at] + of_dots * out.abs()
    delta_error = (rows.d_out.abs() * of_delta).sum(-1, keepdim=True)
    delta_variance = (rows.d_out * out).square().sum(-1, keepdim=True)

    change = rows.values(rows.d_out) - (rows.d_out * out).sum(-1, keepdim=True)
    ds = p * change
    ds_error = p_error * change.abs() + ds.abs()
    ds_error = ds_error + p * (of_dots * rows.values(rows.d_out.abs(), torch.abs) + delta_error)
    dq = budgets["dq"]
    dq.arithmetic[at] += scale * rows.read_keys(ds_error + of_keys * ds.abs(), torch.abs)
    dq.variance[at] += scale**2 * (rows.read_keys(ds, rounded) + delta_variance * rows.read_keys(p).square())
    # Of keys and values: the rows' error, the factor that is rounded to 16 bits, variance besides, the other factor, its scale.
    to_keys = ds_error + of_rows * ds.abs(), ds, p.square() * delta_variance, rows.q, scale
    to_values = p_error + of_rows * p, p, torch.zeros_like(p), rows.d_out, 1.0
    for stream in rows.streams:
        to, weight = (slice(len(stream.k)), rows.group), stream.weight
        for name, (error, x, variance, of, factor) in (
            (stream.keys, to_keys),
            (stream.values, to_values),
        ):
            columns = rounded(weight * x[:, :-1]) + weight.square() * variance[:, :-1]
            budgets[name].arithmetic[to] += factor * (weight * error[:, :-1]).mT @ of.abs()
            budgets[name].variance[to] += factor**2 * columns.mT @ of.square()
    to = (rows.own, rows.group)
    for name, (error, x, variance, of, factor) in ((rows.streams[0].keys, to_keys), ("dv", to_values)):
        budgets[name].arithmetic[to] += factor * error[:, -1:] * of.abs()
        budgets[name].variance[to] += factor**2 * (rounded(x) + variance)[:, -1:] * of.square()
    if rows.slope is not None:
        slopes = budgets["dalibi_slopes"]
        terms = rows.distance * (ds_error + _roundings(rows.visible.sum()) * ds.abs())
        slopes.arithmetic[rows.head] += terms.sum()
        slopes.variance[rows.head] += (
            delta_variance * (p * rows.distance).sum(-1, keepdim=True).square()
        ).sum()
