"""Parity by the one tolerance rule (`dti_kernels.testing`). No other file states a tolerance for attention numerics."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor

from dti_kernels import testing, windowed_attn_reference
from tests.cases import Case

# Two float64 computations of one number differ by the order of their sums.
FLOAT64_RELATIVE = 1e-10


def check_parity(
    case: Case, dtype: torch.dtype, implementation: Callable[..., Tensor], device: torch.device | str = "cpu"
) -> None:
    """`implementation` in `dtype` on `device` against the float64 reference: output and every gradient of `case`."""
    actual = case.inputs(dtype, device).run(implementation)
    # Triton's interpreter computes bfloat16 in float32.
    interpreted = os.environ.get("TRITON_INTERPRET") == "1" and dtype == torch.float16
    rounds_factors = interpreted or torch.device(device).type != "cpu"
    testing.assert_within_budget(actual, *golden_and_budgets(case, dtype, rounds_factors), dtype)


def golden_and_budgets(
    case: Case, dtype: torch.dtype, rounds_factors: bool
) -> tuple[dict[str, Tensor], dict[str, testing.Budget]]:
    """What the float64 reference makes of a case's inputs in `dtype`, and how far an implementation may be from it."""
    exact = case.inputs(torch.float64)
    budgets = testing.error_budgets(
        exact.leaves,
        exact.grad_out,
        exact.layout,
        dtype,
        exact.reset_settings,
        exact.scale,
        rounds_factors,
    )
    return exact.run(windowed_attn_reference), budgets
