"""Both CPU implementations, compiled and in PyTorch, equal the dense reference: output and every gradient, over all cases.

The PyTorch one also at other block sizes.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dti_kernels import windowed_attn
from dti_kernels.contract import checked_inputs
from dti_kernels.cpu import blocks
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


@pytest.mark.parametrize(("block_rows", "more_keys"), [(1, 0), (7, 512), (64, 0), (1000, 1000)])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_parity_at_other_block_sizes(
    case: Case, block_rows: int, more_keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "BLOCK_ROWS", block_rows)
    monkeypatch.setattr(blocks, "MORE_KEYS", more_keys)
    check_parity(case, torch.float64, windowed_attn)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(random_cases(), st.sampled_from([(3, 0), (16, 8), (96, 512)]))
def test_parity_on_random_prompts(case: Case, sizes: tuple[int, int]) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(blocks, "BLOCK_ROWS", sizes[0])
        monkeypatch.setattr(blocks, "MORE_KEYS", sizes[1])
        check_parity(case, torch.float64, windowed_attn)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("case", [case for case in CASES if case.alibi], ids=lambda case: case.name)
def test_parity_without_the_gradient_of_slopes(case: Case) -> None:
    """Another path of the backward, where nobody asks for it."""
    for dtype in (torch.float64, torch.float32):
        check_parity(replace(case, fixed_slopes=True), dtype, windowed_attn)


@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize("window", [70, 20, 3])
def test_parity_of_prompts_of_all_lengths(window: int, prefix: int) -> None:
    """Short prompts share blocks, long ones are cut; a prefix lies apart, inside the block's span, or nowhere."""
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
        for dtype in (torch.float64, torch.float32):
            check_parity(case, dtype, windowed_attn)


def test_sums_far_apart_share_no_block() -> None:
    """With one target per prompt, a block of many [SUM] rows would have the keys of as many prompts."""
    lengths = [[100] * 3] * 20
    layout = Case("far apart", lengths, [[1] * 3] * 20, [1] * 20, window=3).inputs(torch.float32).layout
    q = torch.zeros(layout.num_rows, 1, 1)
    found = list(blocks._blocks(checked_inputs({"q": q, "k": q, "v": q}, layout, None, None)))
    assert sum(block.of_sums for block in found) == 7  # three in each
    assert max(block.hidden.shape[1] for block in found) <= 2 * 302 + blocks.MORE_KEYS + 3


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
    """The largest tensor that forward and backward make is an input's size, or one block of scores, far below T x T."""
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
        out, lse = blocks.forward(x)
        blocks.backward(x, torch.ones_like(out), out, lse, slopes_grad=True)
    scores = 2 * blocks.BLOCK_ROWS * (6 * 5 + 4 + blocks.MORE_KEYS + blocks.BLOCK_ROWS)
    assert largest.numel <= max(2 * layout.num_rows * 8, scores)
