"""One number of an attention's inputs that is not finite: which rows it may reach, and a check that it reaches no other."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from dti_kernels import testing
from tests.cases import Case, Inputs
from tests.numerics import golden_and_budgets, rounds_factors

STREAMS = ("q", "k", "v", "k_sum", "k_initial", "v_initial", "grad_out")
# The last is finite, and its products are not.
VALUES = (math.nan, math.inf, -math.inf, 3e38)


def streams_of(case: Case) -> list[str]:
    """The inputs that a case has."""
    return [name for name in STREAMS if name == "grad_out" or name in case.inputs(torch.float32).leaves]


def with_number(x: Inputs, stream: str, row: int, value: float) -> Inputs:
    """The inputs with another number in a row of the first head."""
    leaf = (x.grad_out if stream == "grad_out" else x.leaves[stream]).detach().clone()
    leaf[row, 0, -1] = value
    if stream == "grad_out":
        return dataclasses.replace(x, grad_out=leaf)
    return dataclasses.replace(x, leaves=x.leaves | {stream: leaf.requires_grad_()})


def reached(x: Inputs, stream: str, row: int) -> tuple[Tensor, Tensor]:
    """`(T,)` bool each: the rows that may read a context row of `stream`, and the rows whose keys and values those read."""
    visible, num_context = x.layout.dense_visibility(), x.layout.num_context
    rows = torch.zeros(x.layout.num_rows, dtype=torch.bool, device=visible.device)
    if stream in ("q", "grad_out"):
        rows[row] = True
    else:
        rows |= visible[:, row]
    if stream == "k" and "k_sum" in x.leaves:
        rows[num_context:] = False
    if stream in ("k_sum", "k_initial", "v_initial"):
        rows[:num_context] = False
    keys = rows.clone()
    keys[:num_context] = visible[rows].any(0)
    keys[row] = True
    return rows, keys


def check_isolation(
    case: Case,
    implementation: Callable[..., Tensor],
    dtype: torch.dtype,
    stream: str,
    value: float,
    bitwise: bool,
    device: str = "cpu",
) -> None:
    """`value` in the middle context row of `stream` leaves what it may not reach as it was: bitwise, or within the error budgets. NaN
    reaches all rows that may read it."""
    x = case.inputs(dtype, device)
    row = x.layout.num_context // 2
    y = with_number(x, stream, row, value)
    rows, keys = reached(x, stream, row)
    actual = y.run(implementation)
    if math.isnan(value) and stream != "grad_out":
        assert actual["out"][rows].isnan().flatten(1).any(1).all()
    actual.pop("dalibi_slopes", None)
    before = x.run(implementation)
    golden, budgets = golden_and_budgets(case, dtype, rounds_factors(dtype, device), device)
    for name, tensor in actual.items():
        touched = (rows if name in ("out", "dq") else keys)[: len(tensor)]
        if bitwise:
            assert torch.equal(tensor[~touched], before[name][~touched]), name
        tensor[touched] = golden[name][touched].to(dtype)
    if not bitwise:
        golden, budgets = ({name: of[name] for name in actual} for of in (golden, budgets))
        testing.assert_within_budget(actual, golden, budgets, dtype)
