"""Both CPU implementations, compiled and in PyTorch, equal the dense reference: output and every gradient, over all cases.

The PyTorch one also at other block sizes, and where it walks prompts in other ways.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dti_kernels import windowed_attn
from dti_kernels.contract import checked_inputs
from dti_kernels.cpu import blocks as cpu
from dti_kernels.cpu.chunks import RowTable, whole_prompts
from tests.cases import CASES, Case, random_cases
from tests.numerics import check_parity


@pytest.fixture(autouse=True)
def in_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The PyTorch implementation, unless a test asks for another."""
    monkeypatch.setenv("DTI_CPU", "torch")


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_parity(case: Case, dtype: torch.dtype) -> None:
    check_parity(case, dtype, windowed_attn)


@pytest.mark.parametrize(("context_block", "sum_block", "prompt_rows"), [(1, 1, 64), (5, 3, 1), (16, 64, 8)])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_parity_at_other_block_sizes(
    case: Case, context_block: int, sum_block: int, prompt_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "CONTEXT_BLOCK", context_block)
    monkeypatch.setattr(cpu, "SUM_BLOCK", sum_block)
    monkeypatch.setattr(cpu, "PROMPT_ROWS", prompt_rows)
    check_parity(case, torch.float64, windowed_attn)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(random_cases(), st.sampled_from([(3, 2, 1), (128, 32, 8), (128, 32, 64)]))
def test_parity_on_random_prompts(case: Case, sizes: tuple[int, int, int]) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name, size in zip(("CONTEXT_BLOCK", "SUM_BLOCK", "PROMPT_ROWS"), sizes):
            monkeypatch.setattr(cpu, name, size)
        check_parity(case, torch.float64, windowed_attn)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("case", [case for case in CASES if case.alibi], ids=lambda case: case.name)
def test_parity_without_the_gradient_of_slopes(case: Case) -> None:
    """Another path of the backward, where nobody asks for it."""
    for dtype in (torch.float64, torch.float32):
        check_parity(replace(case, fixed_slopes=True), dtype, windowed_attn)


@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize(("window", "cut"), [(70, 0), (20, 2), (3, 1)])
def test_parity_of_whole_prompts(window: int, cut: int, prefix: int) -> None:
    """Short prompts are one causal call each, cut or not by a window, with long ones in blocks between them."""
    lengths = [[9] * 4, [7] * 30, [5], [40, 2, 3], [3] * 24]
    for alibi in (False, True):
        case = Case(
            "short prompts",
            lengths,
            [[1] * len(x) for x in lengths],
            [1, 9, 1, 1, 24],
            window=window,
            prefix_lengths=[prefix] * 5,
            num_heads=4,
            num_groups=2,
            alibi=alibi,
        )
        layout = case.inputs(torch.float64).layout
        table = RowTable(layout.rows, layout.num_context, 2, torch.float64)
        prompts = whole_prompts(table, cpu.PROMPT_ROWS, cpu.CONTEXT_BLOCK // 2)
        assert [prompt.cut is not None for prompt in prompts].count(True) == cut
        assert len(prompts) == (4 if window > 3 else 3)
        for dtype in (torch.float64, torch.float32):
            check_parity(case, dtype, windowed_attn)


def test_long_cut_prompts_are_no_squares() -> None:
    """A bias of rows times rows is memory that grows with the square of the window."""
    for length, expected in ((100, 1), (200, 0)):
        lengths = [[length] * 7]
        layout = Case("wide", lengths, [[1] * 7], [1], window=5).inputs(torch.float64).layout
        table = RowTable(layout.rows, layout.num_context, 1, torch.float64)
        prompts = whole_prompts(table, cpu.PROMPT_ROWS, block=length + 100)
        assert [prompt.cut is not None for prompt in prompts] == [True] * expected


@pytest.mark.usefixtures("implementation")
def test_layouts_made_in_inference_mode() -> None:
    """Such tensors have no version counter and no gradient; they are walked like any others."""
    case = Case("inference", [[9] * 6], [[1] * 6], [3], window=2, num_heads=4, num_groups=2)
    expected = case.inputs(torch.float64).call(windowed_attn)
    with torch.inference_mode():
        assert torch.equal(case.inputs(torch.float64).call(windowed_attn), expected)


@pytest.mark.usefixtures("implementation")
def test_gradcheck() -> None:
    inputs = Case(
        "small", [[2, 1, 3], [1, 2]], [[1, 1, 0], [0, 1]], [2, 1], window=1, prefix_lengths=[2, 0], head_dim=3
    )
    case = inputs.inputs(torch.float64)
    names = list(case.leaves)

    def call(*leaves: torch.Tensor) -> torch.Tensor:
        case.leaves.update(zip(names, leaves))
        return case.call(windowed_attn)

    assert torch.autograd.gradcheck(call, tuple(case.leaves.values()))


def test_memory_is_linear_in_rows() -> None:
    """The largest tensor that forward and backward make is an input's size, or one chunk of scores, far below T x T."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for x in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(x, torch.Tensor) and x._base is None:
                    self.numel = max(self.numel, x.numel())
            return result

    case = Case("long", [[4] * 4000], [[1] * 4000], [4000], window=5, num_heads=2, num_groups=2, head_dim=8)
    inputs = case.inputs(torch.float32)
    layout, names = inputs.layout, ("q", "k", "v", "k_sum")
    x = checked_inputs({name: inputs.leaves[name].detach() for name in names}, layout, None, 1.0)
    with Largest() as largest:
        out, lse = cpu.forward(x)
        cpu.backward(x, torch.ones_like(out), out, lse, slopes_grad=True)
    # A bias of a chunk is shared by its heads.
    assert largest.numel <= max(2 * layout.num_rows * 8, cpu.CONTEXT_CHUNK_SCORES // 2)
