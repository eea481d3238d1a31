"""Computations of the tests for GPUs, as calls on CPU tensors: kernels to be compiled before they run, and launches that CI proves."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial

import torch

from benchmarks.attention.workloads import AttentionInputs
from dti_kernels import StreamLayout, windowed_attn
from tests.cases import CASES, Case
from tests.kernels.test_gpu import GROUPS, LLAMA, MEMORY, SMOLLM, WIDE, grouped

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
REAL_CASES = [LLAMA, SMOLLM, WIDE, *(grouped(*group) for group in GROUPS)]


def run(case: Case, dtype: torch.dtype) -> None:
    """Output and gradients of a case."""
    case.inputs(dtype).run(windowed_attn)


def run_sums_only(case: Case, dtype: torch.dtype) -> None:
    """As a last layer calls it: queries of [SUM] rows only."""
    x = case.inputs(dtype)
    q = x.leaves["q"].detach()[x.layout.num_context :].requires_grad_()
    arguments = {name: leaf for name, leaf in x.leaves.items() if not name.endswith("_initial")} | {"q": q}
    out = windowed_attn(layout=x.layout, reset=x.reset_settings, **arguments)
    out.backward(x.grad_out[x.layout.num_context :])


def memory_inputs() -> AttentionInputs:
    """A small batch that gets the tiles of the one whose memory is measured: they are chosen by its mean span."""
    x = AttentionInputs.of(dataclasses.replace(MEMORY, num_tokens=400))
    return dataclasses.replace(x, layout=dataclasses.replace(x.layout, mean_span=MEMORY.layout().mean_span))


def measure_memory() -> None:
    """The calls whose memory is measured."""
    memory_inputs().run(windowed_attn)


def many_elements() -> None:
    """The heads of the batch of more than 2**31 elements."""
    layout = StreamLayout.build([[64]], [[1]], [1], 1)
    q, k, v = (
        torch.zeros(layout.num_rows, heads, 128, dtype=torch.bfloat16, requires_grad=True)
        for heads in (32, 1, 1)
    )
    torch.autograd.grad(windowed_attn(q, k, v, layout), (q, k, v), torch.zeros_like(q))


def calls() -> Iterator[Callable[[], object]]:
    """All of them."""
    for case in CASES:
        for dtype in (torch.bfloat16, torch.float32):
            yield partial(run, case, dtype)
    for case in (LLAMA, SMOLLM, WIDE):
        for dtype in DTYPES:
            yield partial(run, case, dtype)
    for group in GROUPS:
        yield partial(run, grouped(*group), torch.bfloat16)
    yield measure_memory
    yield many_elements
