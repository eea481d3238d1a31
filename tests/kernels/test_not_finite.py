"""inf and NaN reach the rows that may see them and no other, in the reference and in every implementation: masked is not multiplied.

Of 11 rows that did not see a value of inf, one was NaN in the compiled implementation, ten in PyTorch's, all in the reference.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from dti_kernels import windowed_attn, windowed_attn_reference
from dti_kernels.gpu import tiles
from dti_kernels.gpu.tiles import Tile
from tests.cases import CASES, Case, named
from tests.kernels.interpreter import interpret
from tests.kernels.not_finite import VALUES, check_isolation, streams_of

SMALL = [case for case in CASES if case.layout().num_rows <= 60]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.usefixtures("implementation")
def test_cpu(case: Case) -> None:
    for stream in streams_of(case):
        for value in VALUES:
            check_isolation(case, windowed_attn, torch.float32, stream, value, bitwise=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.usefixtures("implementation")
def test_other_dtypes(dtype: torch.dtype) -> None:
    for stream in streams_of(named("prefix")):
        check_isolation(named("prefix"), windowed_attn, dtype, stream, math.inf, bitwise=True)


@pytest.mark.parametrize("slope", [math.nan, math.inf, -math.inf, -3e38])
@pytest.mark.usefixtures("implementation")
def test_a_slope_is_the_matter_of_its_head(slope: float) -> None:
    """The compiled backward ended in the error by which it asks to be called again."""
    x = named("mha").inputs(torch.float32)
    slopes = x.leaves["alibi_slopes"].detach().clone()
    slopes[0] = slope
    y = dataclasses.replace(x, leaves=x.leaves | {"alibi_slopes": slopes.requires_grad_()})
    before, after = x.run(windowed_attn), y.run(windowed_attn)
    for name in before:
        others = (slice(1, None),) if name == "dalibi_slopes" else (slice(None), slice(1, None))
        assert torch.equal(after[name][others], before[name][others]), name


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_reference(case: Case) -> None:
    """But for a gradient of the output that is not finite where the inputs are."""
    for stream in streams_of(case)[:-1]:
        check_isolation(case, windowed_attn_reference, torch.float64, stream, math.nan, bitwise=False)


def in_small_tiles(case: Case, dtype: torch.dtype, stream: str, value: float) -> None:
    with tiles.forced(dict.fromkeys(tiles.KERNELS, Tile(32, 16, 4, 1))):
        check_isolation(case, windowed_attn, dtype, stream, value, bitwise=False)


@pytest.mark.parametrize("stream", streams_of(named("prefix")))
def test_triton(stream: str) -> None:
    interpret(in_small_tiles, named("prefix"), torch.float32, stream, math.nan)


@pytest.mark.parametrize("stream", ["v", "k_sum", "grad_out"])
def test_triton_inf(stream: str) -> None:
    interpret(in_small_tiles, named("candidates"), torch.float16, stream, math.inf)
