"""The Triton kernels on CPU tensors: output and every gradient against the reference, isolation, determinism.

Every buffer that the kernels do not fill is NaN here (tests/kernels/interpreter.py).
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from dti_kernels import windowed_attn, windowed_attn_reference
from dti_kernels.gpu import tiles
from dti_kernels.gpu.tiles import Tile
from tests.cases import CASES, Case, named, random_cases
from tests.kernels.interpreter import interpret
from tests.numerics import check_parity

# Rows by keys, and heads in a tile: fewer than a group, an odd share of the rows, more rows than keys, more keys than rows.
SHAPES = {
    "16x16": Tile(16, 16, 4, 1),
    "32x16": Tile(32, 16, 4, 1),
    "16x64": Tile(16, 64, 4, 1),
    "64x32": Tile(64, 32, 4, 1),
    "64x32_pack_1": Tile(64, 32, 4, 1, pack=1),
    "32x32_pack_2": Tile(32, 32, 4, 1, pack=2),
    "16x16_ahead": Tile(16, 16, 4, 1, ahead=True),
}
# Cases of hundreds of rows: larger tiles keep the interpreter fast.
LONG = {"interaction_longer_than_a_tile", "k_50", "several_blocks", "gqa_3", "gqa_8", "mha"}
LONG |= {"many_candidates"}


def parity(case: Case, dtype: torch.dtype, shape: str) -> None:
    with tiles.forced(dict.fromkeys(tiles.KERNELS, SHAPES[shape])):
        check_parity(case, dtype, windowed_attn)


def with_full_tiles(case: Case, expected: set[int]) -> None:
    """The case's tiles of 16 context lanes have as many full tiles of 16 keys, among others."""
    layout = case.layout()
    tokens = 16 // (case.num_heads // case.num_groups)
    first = torch.arange(0, layout.num_context, tokens)
    last = (first + tokens - 1).clamp_max(layout.num_context - 1)
    full_first = layout.start[first] + -(-(layout.start[last] - layout.start[first]) // 16) * 16
    num_full = (layout.stop[first] - full_first).clamp_min(0) // 16
    assert expected <= set(num_full.tolist()), case.name


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_parity(case: Case) -> None:
    interpret(parity, case, torch.float32, "64x32" if case.name in LONG else "16x16")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["prefix", "gqa_4", "odd_head_dim", "dti_minus", "no_targets_in_one"])
def test_parity_in_half_precision(name: str, dtype: torch.dtype) -> None:
    interpret(parity, named(name), dtype, "32x16")


@pytest.mark.parametrize("name", ["many_candidates", "interaction_longer_than_a_tile"])
def test_parity_over_full_tiles(name: str) -> None:
    """The forward may multiply the next full tile ahead: none, one and several of them."""
    case = named(name)
    with_full_tiles(case, {0, 1, 2})
    interpret(parity, case, torch.float16, "16x16_ahead")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["prefix_only_first", "many_short_prompts", "gqa_4", "candidates"])
def test_parity_at_other_tile_shapes(name: str, shape: str) -> None:
    interpret(parity, named(name), torch.float32, shape)


def parity_with_approximate_exponentials(case: Case) -> None:
    """exp2 and log2 as inexact as PTX allows ex2.approx and lg2.approx: relative 2**-22, and absolute 2**-22 near 1."""
    from triton.runtime.interpreter import InterpreterBuilder

    rng = np.random.default_rng(0)

    def exp2(x: np.ndarray) -> np.ndarray:
        return (np.exp2(x) * (1 + 2.0**-22 * rng.uniform(-1, 1, x.shape))).astype(x.dtype)

    def log2(x: np.ndarray) -> np.ndarray:
        exact = np.log2(x)
        return (exact + 2.0**-22 * np.maximum(1, np.abs(exact)) * rng.uniform(-1, 1, x.shape)).astype(x.dtype)

    with pytest.MonkeyPatch.context() as patch:
        for name, function in (("create_exp2", exp2), ("create_log2", log2)):
            patch.setattr(
                InterpreterBuilder, name, lambda self, x, function=function: self.unary_op(x, function)
            )
        parity(case, torch.float32, "64x32")


@pytest.mark.parametrize(
    "name", ["one_token", "one_prompt", "prefix", "many_short_prompts", "gqa_4", "candidates"]
)
def test_the_budget_knows_the_exponential_of_gpus(name: str) -> None:
    interpret(parity_with_approximate_exponentials, named(name))


def test_parity_over_several_tiles() -> None:
    interpret(parity, named("several_blocks"), torch.float32, "32x16")


# No shrinking: an example takes seconds.
@settings(max_examples=12, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
@given(random_cases(), st.sampled_from(["16x16", "32x16", "16x64"]))
def test_parity_on_random_prompts(case: Case, shape: str) -> None:
    """In float16: at float32, tiny random cases differ by the luck of one rounding in one element."""
    interpret(parity, case, torch.float16, shape)


@pytest.mark.parametrize("seed", range(3))
def test_slope_gradient_survives_the_rounding_of_the_output(seed: int) -> None:
    """delta comes from the float16 output; distances multiplied its error until ds was made to add up to zero."""
    interpret(slope_gradient_is_nearly_exact, named("several_blocks"), seed)


def slope_gradient_is_nearly_exact(case: Case, seed: int) -> None:
    """Far closer than eager float16, which rounds in the same places and knows no remedy."""
    case = dataclasses.replace(case, item_lengths=[[20, 30, 25]], label_lengths=[[1, 1, 1]], num_targets=[3])
    case = dataclasses.replace(case, prefix_lengths=None, reset=None)
    low, exact = (case.inputs(dtype, seed=seed) for dtype in (torch.float16, torch.float64))
    golden = exact.run(windowed_attn_reference)["dalibi_slopes"]
    eager = low.run(windowed_attn_reference)
    actual = low.run(windowed_attn)
    error, eager_error = ((x["dalibi_slopes"].double() - golden).abs().max() for x in (actual, eager))
    assert error <= eager_error / 64


def rows_stay_equal(case: Case) -> None:
    x = case.inputs(torch.float32)
    visible, num_context = x.layout.dense_visibility(), x.layout.num_context
    out = x.call(windowed_attn)
    for key in range(0, num_context, max(1, num_context // 5)):
        changed = {name: leaf.detach().clone() for name, leaf in x.leaves.items()}
        for name in ("k", "v", "k_sum", "k_initial", "v_initial"):
            changed[name][key] += 3.0
        other = dataclasses.replace(x, leaves=changed).call(windowed_attn)
        assert torch.equal(other[~visible[:, key]], out[~visible[:, key]])
        assert (other[visible[:, key]] != out[visible[:, key]]).any(-1).all()


def gradients_are_zero(case: Case) -> None:
    x = case.inputs(torch.float32)
    visible, num_context = x.layout.dense_visibility(), x.layout.num_context
    for row in range(0, x.layout.num_rows, max(1, x.layout.num_rows // 3)):
        grads = torch.autograd.grad(x.call(windowed_attn)[row].sum(), list(x.leaves.values()))
        of_keys = {name: grad for name, grad in zip(x.leaves, grads) if name not in ("q", "alibi_slopes")}
        for name, grad in of_keys.items():
            assert (grad[:num_context][~visible[row]] == 0).all(), name
            others = torch.arange(num_context, len(grad)) != row
            assert (grad[num_context:][others] == 0).all(), name
        assert (of_keys["v"][:num_context][visible[row]] != 0).any(-1).all()


@pytest.mark.parametrize("check", [rows_stay_equal, gradients_are_zero])
@pytest.mark.parametrize("name", ["prefix", "prefix_only_first", "candidates"])
def test_nothing_leaks_from_what_a_row_may_not_see(name: str, check) -> None:
    """Bitwise: rows that do not see a key do not move with it, and send it no gradient."""
    interpret(check, named(name))


def runs_are_equal() -> None:
    x = named("prefix").inputs(torch.float32)
    first, second = x.run(windowed_attn), x.run(windowed_attn)
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_two_runs_are_bitwise_equal() -> None:
    interpret(runs_are_equal)


def unwritten_memory_is_nan() -> bool:
    return bool(torch.empty(3).isnan().all())


def test_unwritten_memory_is_nan() -> None:
    """This makes every other test here a test of unwritten buffers."""
    assert interpret(unwritten_memory_is_nan)


def scratch_is_read_within(heads: int, tile: Tile) -> None:
    """The smallest batches: a tile of keys and heads is far larger than what there is of delta and the log-sum-exp."""
    from dti_kernels.gpu.backward import Batch, Buffers, Memory

    make = Buffers.of

    def guarded(x: torch.Tensor) -> torch.Tensor:
        buffer = torch.full((len(x) + 65536,), float("nan"))
        buffer[: len(x)] = x
        return buffer[: len(x)]

    def make_guarded(batch: Batch, memory: Memory) -> Buffers:
        buffers = make(batch, memory)
        return buffers._replace(delta=guarded(buffers.delta), lse_tile=guarded(buffers.lse_tile))

    case = Case("tiny", [[1], [3]], [[0], [1]], [0, 1], window=2, num_heads=heads)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Buffers, "of", staticmethod(make_guarded))
        with tiles.forced({"ctx_dkv": tile, "sum_dkv": tile}):
            check_parity(case, torch.float32, windowed_attn)


@pytest.mark.parametrize(
    ("heads", "tile"), [(16, (64, 128)), (7, (64, 128)), (32, (32, 128)), (16, (16, 64))]
)
def test_scratch_is_read_within(heads: int, tile: tuple[int, int]) -> None:
    """Keys beyond the last counted as seen, and the rows that would see them were read: a NaN behind the buffer came back as dk."""
    interpret(scratch_is_read_within, heads, Tile(*tile, 4, 1))


def sum_queries_only(case: Case) -> None:
    x = case.inputs(torch.float32)
    num_context = x.layout.num_context
    unused = torch.cat([torch.zeros_like(x.grad_out[:num_context]), x.grad_out[num_context:]])
    full = dataclasses.replace(x, grad_out=unused).run(windowed_attn)
    q_sum = x.leaves["q"].detach()[num_context:].requires_grad_()
    leaves = x.leaves | {"q": q_sum}
    alone = dataclasses.replace(x, leaves=leaves, grad_out=x.grad_out[num_context:]).run(windowed_attn)
    full["out"], full["dq"] = full["out"][num_context:], full["dq"][num_context:]
    for name in full:
        assert torch.equal(full[name], alone[name]), name


@pytest.mark.parametrize("name", ["prefix", "no_targets_in_one"])
def test_queries_of_sum_rows_only(name: str) -> None:
    """Bitwise what the [SUM] rows give when the context rows' output is not used."""
    interpret(sum_queries_only, named(name))


def strides_do_not_matter() -> None:
    x = named("alibi_only").inputs(torch.float32)

    def strided(leaf: torch.Tensor) -> torch.Tensor:
        """Heads first in memory, inside a wider buffer, as slices of one projection are."""
        wide = torch.full((leaf.shape[1], leaf.shape[0] + 3, leaf.shape[2] + 5), float("nan"))
        view = wide[:, 2:-1, 4:-1].transpose(0, 1)
        return view.copy_(leaf.detach()).requires_grad_()

    leaves = {name: leaf if leaf.ndim == 1 else strided(leaf) for name, leaf in x.leaves.items()}
    other = dataclasses.replace(x, leaves=leaves, grad_out=strided(x.grad_out).detach())
    # head_dim itself is not contiguous: copied, not misread
    flipped = dataclasses.replace(x, leaves=x.leaves | {"q": x.leaves["q"].detach().mT.contiguous().mT})
    assert torch.equal(flipped.call(windowed_attn), x.call(windowed_attn))
    expected, actual = x.run(windowed_attn), other.run(windowed_attn)
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


def test_strides_do_not_matter() -> None:
    interpret(strides_do_not_matter)


def no_rows_at_all() -> None:
    x = Case("empty", [], [], [], window=2).inputs(torch.float32)
    for name, grad in x.run(windowed_attn).items():
        assert (grad == 0).all(), name


def test_no_rows_at_all() -> None:
    interpret(no_rows_at_all)


def refused(dtype: torch.dtype, head_dim: int) -> None:
    Case("refused", [[2]], [[1]], [1], window=1, head_dim=head_dim).inputs(dtype).call(windowed_attn)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "error"), [(torch.float64, 16, TypeError), (torch.float32, 257, ValueError)]
)
def test_what_kernels_do_not_support_says_what_does(dtype, head_dim, error) -> None:
    with pytest.raises(error, match="windowed_attn_reference"):
        interpret(refused, dtype, head_dim)
