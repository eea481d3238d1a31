"""The one tolerance rule. No other file states a tolerance for attention numerics.

An implementation in a low precision may be off by at most twice what the eager reference in the same precision is off, plus
twice a rounding of the largest value:

    budget = 2 * (max|eager_low - golden| + eps(dtype) * max|golden|)

and its root-mean-square error is bounded the same way, so that an error spread over all elements (a window off by one) cannot
hide below the largest one. A slope's gradient is one long sum of terms of both signs: its rounding follows the sum of their
magnitudes, not the small number that is left, so that sum stands in for max|golden| there. float64 against float64 only differs in the order of sums: 1e-10 of the largest value.
"""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor

from dti_kernels import reference, windowed_attn_reference
from tests.cases import Case, Inputs

FLOAT64_RELATIVE = 1e-10


def check_parity(
    case: Case, dtype: torch.dtype, implementation: Callable[..., Tensor], device: torch.device | str = "cpu"
) -> None:
    """`implementation` in `dtype` on `device` against the float64 reference: output and every gradient of `case`."""
    low = case.inputs(dtype, device)
    exact = case.inputs(torch.float64)
    golden = exact.run(windowed_attn_reference)
    scales = {"dalibi_slopes": slope_gradient_scale(exact)} if case.alibi and not case.fixed_slopes else {}
    assert_within_budget(low.run(implementation), low.run(windowed_attn_reference), golden, dtype, scales)


def slope_gradient_scale(x: Inputs) -> Tensor:
    """`(H,)`: the sum over [SUM] rows and keys of |term| in the slope gradient, -ds * distance.

    A weight of 1 on every distance has the gradient slope * term, one head at a time.
    """
    slopes = x.leaves["alibi_slopes"]
    distance = reference.alibi_distance(x.layout).to(slopes.dtype)
    weight = torch.ones_like(distance).requires_grad_()
    with mock.patch.object(reference, "alibi_distance", return_value=weight * distance):
        out = x.call(windowed_attn_reference)
    scale = torch.zeros_like(slopes)
    for head in range(len(slopes)):
        part = torch.zeros_like(x.grad_out)
        part[:, head] = x.grad_out[:, head]
        (terms,) = torch.autograd.grad(out, weight, part, retain_graph=True)
        scale[head] = terms.abs().sum() / slopes[head].detach()
    return scale


def assert_within_budget(
    actual: dict[str, Tensor],
    eager: dict[str, Tensor],
    golden: dict[str, Tensor],
    dtype: torch.dtype,
    scales: dict[str, Tensor] | None = None,
) -> None:
    """Compare named tensors: `actual` and `eager` computed in `dtype`, `golden` in float64 from the same inputs.

    `scales` gives, for gradients that are long sums, the sum of the magnitudes of their terms.
    """
    assert actual.keys() == golden.keys()
    for name, gold in golden.items():
        got, low = (x[name].detach().cpu().double() for x in (actual, eager))
        gold = gold.detach().cpu()
        assert got.shape == gold.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(gold.shape)}"
        assert torch.isfinite(got).all(), f"{name}: not finite"
        if not gold.numel():
            continue
        scale = (scales or {}).get(name, gold).detach().cpu().abs()
        error, eager_error, largest = (got - gold).abs(), (low - gold).abs(), scale.max()
        if dtype == torch.float64:
            assert error.max() <= FLOAT64_RELATIVE * max(1.0, largest), f"{name}: off by {error.max():.3e}"
            continue
        eps = torch.finfo(dtype).eps
        budget = 2 * (eager_error.max() + eps * largest)
        assert error.max() <= budget, f"{name}: off by {error.max():.3e}, budget {budget:.3e}"
        rms, eager_rms, scale_rms = (x.square().mean().sqrt() for x in (error, eager_error, scale))
        rms_budget = 2 * (eager_rms + eps * scale_rms)
        assert rms <= rms_budget, f"{name}: RMS error {rms:.3e}, budget {rms_budget:.3e}"
