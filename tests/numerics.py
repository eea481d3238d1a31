"""Parity by the one tolerance rule (`dti_kernels.testing`). No other file states a tolerance for attention numerics."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor

from dti_kernels import cpu, testing, windowed_attn_reference
from tests.cases import Case

# Two float64 computations of one number differ by the order of their sums.
FLOAT64_RELATIVE = 1e-10


def check_parity(
    case: Case, dtype: torch.dtype, implementation: Callable[..., Tensor], device: torch.device | str = "cpu"
) -> None:
    """`implementation` in `dtype` on `device` against the float64 reference: output and every gradient of `case`."""
    actual = case.inputs(dtype, device).run(implementation)
    budgets = golden_and_budgets(case, dtype, rounds_factors(dtype, device), device)
    testing.assert_within_budget(actual, *budgets, dtype)


def parity_shares(
    case: Case, dtype: torch.dtype, implementation: Callable[..., Tensor], device: torch.device | str = "cpu"
) -> dict[str, float]:
    """By tensor, the share of its error budget that `implementation` uses; above 1 it is not within it."""
    actual = case.inputs(dtype, device).run(implementation)
    return testing.shares(
        actual, *golden_and_budgets(case, dtype, rounds_factors(dtype, device), device), dtype
    )


def rounds_factors(dtype: torch.dtype, device: torch.device | str) -> bool:
    """Whether the implementation that computes `dtype` on `device` in this process rounds the factors of its products to it."""
    if torch.device(device).type != "cpu":
        return True
    if os.environ.get("TRITON_INTERPRET") == "1":  # which computes bfloat16 in float32
        return dtype == torch.float16
    return cpu.rounds_factors(dtype)


def golden_and_budgets(
    case: Case, dtype: torch.dtype, rounds_factors: bool, device: torch.device | str = "cpu"
) -> tuple[dict[str, Tensor], dict[str, testing.Budget]]:
    """The float64 reference's results for a case's inputs in `dtype`, and how far an implementation may be from it.

    Both are computed on `device`: at real heads they take a CPU's thread many seconds, which a GPU's time-out does not have.
    """
    exact = case.inputs(torch.float64, device)
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
