"""Parity by the one tolerance rule (`dti_kernels.testing`). No other file states a tolerance for attention numerics."""

from __future__ import annotations

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
    testing.assert_within_budget(*parity_arguments(case, dtype, implementation, device), dtype)


def parity_shares(case: Case, dtype: torch.dtype, implementation: Callable[..., Tensor]) -> dict[str, float]:
    """The share of its budget that each tensor of `check_parity` uses."""
    return testing.shares(*parity_arguments(case, dtype, implementation), dtype)


def parity_arguments(
    case: Case, dtype: torch.dtype, implementation: Callable[..., Tensor], device: torch.device | str = "cpu"
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, testing.Budget]]:
    """What the implementation makes of the case, the reference in float64, and the budgets."""
    exact = case.inputs(torch.float64)
    budgets = testing.error_budgets(
        exact.leaves, exact.grad_out, exact.layout, dtype, exact.reset_settings, exact.scale
    )
    return case.inputs(dtype, device).run(implementation), exact.run(windowed_attn_reference), budgets
