"""The gate that attention benchmarks time nothing before: ours beside the dense reference in float64, by the one tolerance rule."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import Tensor

from benchmarks.attention.workloads import AttentionInputs, Workload
from dti_kernels import cpu, windowed_attn, windowed_attn_reference
from dti_kernels.testing import error_budgets, shares

# Times of the error budget beyond which a GPU's result is taken for wrong. Budgets are computed and not measured: up to it, a card rounds
# otherwise than was thought.
MOST_SHARE = 3.0
# Context tokens at which the dense reference still fits.
_MOST_TOKENS = 2048


def budget_shares(x: AttentionInputs, actual: Mapping[str, Tensor]) -> dict[str, float]:
    """By tensor, the share of its error budget that results of `x` use.

    Args:
        x: the inputs that an implementation got.
        actual: its output and gradients, as `AttentionInputs.run` names them.
    """
    exact, device, dtype = x.as_float64(), x.q.device, x.q.dtype
    rounds_factors = device.type != "cpu" or cpu.rounds_factors(dtype)
    budgets = error_budgets(
        exact.named(),
        exact.grad_out,
        exact.layout,
        dtype,
        exact.reset,
        rounds_factors=rounds_factors,
    )
    return shares(actual, exact.run(windowed_attn_reference), budgets, dtype)


def gate(workload: Workload, device: str = "cpu", most: float = 1.0) -> dict[str, float]:
    """Shares of the error budget that ours uses on this workload (its first tokens, where it is long), by tensor.

    Raises:
        AssertionError: a share is above `most`, or a number is not finite.
    """
    short = dataclasses.replace(workload, num_tokens=min(workload.num_tokens, _MOST_TOKENS))
    x = AttentionInputs.of(short, device)
    found = budget_shares(x, x.run(windowed_attn))
    if not all(share <= most for share in found.values()):
        used = ", ".join(
            f"{name} uses {share:.2f} of it" for name, share in found.items() if not share <= most
        )
        raise AssertionError(f"{workload.dtype}: not within {most:g} times the error budget: {used}")
    return found
