"""What the tests for GPUs compute, as calls on CPU tensors: the kernels to be compiled before they run, and proven to launch in CI."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from benchmarks.workloads import AttentionInputs, Workload
from dti_kernels import StreamLayout, windowed_attn
from tests.cases import CASES, Case

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def with_sums_only(case: Case, dtype: torch.dtype) -> None:
    """A last layer's call: [SUM] queries only."""
    x = case.inputs(dtype)
    q = x.leaves["q"].detach()[x.layout.num_context :].requires_grad_()
    arguments = {name: leaf for name, leaf in x.leaves.items() if not name.endswith("_initial")}
    out = windowed_attn(layout=x.layout, reset=x.reset_settings, **(arguments | {"q": q}))
    out.backward(x.grad_out[x.layout.num_context :])


def memory() -> None:
    """The batch whose memory is measured."""
    workload = Workload("memory", 400, 50, 8, 2, 64, reset=True, dtype=torch.bfloat16)
    x = AttentionInputs.of(workload)
    out = windowed_attn(x.q, x.k, x.v, x.layout, k_sum=x.k_sum, alibi_slopes=x.alibi_slopes, reset=x.reset)
    torch.autograd.grad(out, x.leaves(), x.grad_out)


def many_heads() -> None:
    """The heads of the batch of more than 2**31 elements."""
    layout = StreamLayout.build([[64]], [[1]], [1], 1)
    q, k, v = (
        torch.zeros(layout.num_rows, heads, 128, dtype=torch.bfloat16, requires_grad=True)
        for heads in (32, 1, 1)
    )
    torch.autograd.grad(windowed_attn(q, k, v, layout), (q, k, v), torch.zeros_like(q))


def calls() -> Iterator[Callable[[], object]]:
    """All of them."""
    from tests.kernels.test_gpu import REAL_CASES

    for case in CASES:
        for dtype in (torch.bfloat16, torch.float32):
            yield lambda case=case, dtype=dtype: case.inputs(dtype).run(windowed_attn)
    for case in REAL_CASES:
        for dtype in DTYPES:
            yield lambda case=case, dtype=dtype: case.inputs(dtype).run(windowed_attn)
    yield memory
    yield many_heads
