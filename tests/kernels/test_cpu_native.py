"""The compiled CPU implementation: parity at other tile sizes and vector widths, threads, its build and what happens without one.

Its parity at the sizes that are shipped is in test_cpu_parity.py, beside that of the PyTorch implementation.
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings

from dti_kernels import StreamLayout, windowed_attn
from dti_kernels.contract import checked_inputs
from dti_kernels.cpu import build as cpu_build
from dti_kernels.cpu import choice, compiled
from dti_kernels.inputs import Gradients, Inputs
from tests.cases import CASES, Case, random_cases
from tests.numerics import check_parity

# Without instructions for bfloat16 at a width, pairs of it are multiplied in float32, so that all processors test the path.
EMULATED = "-DDTI_EMULATE_BFLOAT16"
VARIANTS = {
    "tiny tiles": ("-DDTI_TILE_ROWS=7", "-DDTI_SEGMENT_ROWS=5", EMULATED),
    "128-bit vectors": ("-DDTI_VECTOR_BYTES=16", "-DDTI_SEGMENT_ROWS=64", EMULATED),
    "256-bit vectors": ("-DDTI_VECTOR_BYTES=32", "-DDTI_TILE_ROWS=9", EMULATED),
    "512-bit vectors": ("-DDTI_VECTOR_BYTES=64", "-DDTI_TILE_ROWS=24", EMULATED),
    "widened bfloat16": ("-DDTI_WIDEN_BFLOAT16",),
}
# Matrix tiles in plain C++ where the processor has none, so that all processors test what is around them; blocks that fill them, and not.
TILES = ("-DDTI_VECTOR_BYTES=64", "-DDTI_EMULATE_TILES", EMULATED)
TILED_VARIANTS = {
    "here": (),
    "matrix tiles": TILES,
    "few rows": (*TILES, "-DDTI_MATRIX_TILE_ROWS=21", "-DDTI_SEGMENT_ROWS=64"),
}


pytestmark = pytest.mark.usefixtures("native")


@contextmanager
def built_with(*flags: str) -> Iterator[None]:
    """The library built with other constants, unoptimised for the sake of time."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(cpu_build, "FLAGS", (*cpu_build.FLAGS, "-O1", *flags))
        compiled.library.cache_clear()
        try:
            yield
        finally:
            compiled.library.cache_clear()


@pytest.mark.parametrize("flags", VARIANTS.values(), ids=VARIANTS)
def test_parity_of_variants(flags: tuple[str, ...]) -> None:
    with built_with(*flags):
        assert compiled.multiplies_bfloat16() == (EMULATED in flags)
        for case in CASES:
            for dtype in (torch.float64, torch.float32, torch.bfloat16):
                check_parity(case, dtype, windowed_attn)


@pytest.mark.parametrize("flags", VARIANTS.values(), ids=VARIANTS)
def test_variants_on_random_prompts(flags: tuple[str, ...]) -> None:
    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(random_cases())
    def check(case: Case) -> None:
        check_parity(case, torch.float64, windowed_attn)
        check_parity(case, torch.bfloat16, windowed_attn)

    with built_with(*flags):
        check()


@pytest.mark.parametrize("flags", TILED_VARIANTS.values(), ids=TILED_VARIANTS)
def test_parity_in_matrix_tiles(flags: tuple[str, ...]) -> None:
    """They take head_dims that are whole tiles; one and a half pairs of tiles among them."""
    with built_with(*flags) if flags else nullcontext():
        for case in CASES:
            for head_dim in (32, 96) if case.name == "several_blocks" else (32,):
                check_parity(replace(case, head_dim=head_dim), torch.bfloat16, windowed_attn)
        for head_dim in (64, 128):
            check_parity(replace(LONG, head_dim=head_dim), torch.bfloat16, windowed_attn)


@pytest.mark.parametrize("flags", TILED_VARIANTS.values(), ids=TILED_VARIANTS)
def test_matrix_tiles_on_random_prompts(flags: tuple[str, ...]) -> None:
    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(random_cases())
    def check(case: Case) -> None:
        check_parity(replace(case, head_dim=32), torch.bfloat16, windowed_attn)

    with built_with(*flags) if flags else nullcontext():
        check()


def test_emulated_matrix_tiles_multiply_as_pairs_do() -> None:
    """Both sum the same products in float32: results differ by roundings of sums alone, far less than bfloat16 rounds."""
    x = replace(LONG, head_dim=64).inputs(torch.bfloat16)
    results = []
    for flags in (TILES, ("-DDTI_VECTOR_BYTES=64", "-DDTI_NO_TILES", EMULATED)):
        with built_with(*flags):
            results.append(x.run(windowed_attn))
    assert not torch.equal(results[0]["dk"], results[1]["dk"]), "one order of sums: no tile was used"
    for name, in_tiles in results[0].items():
        in_pairs = results[1][name].float()
        torch.testing.assert_close(
            in_tiles.float(), in_pairs, rtol=0.01, atol=0.01 * in_pairs.abs().max().item()
        )


LONG = Case(
    "long",
    [[9, 4, 7, 12] * 20, [5, 8] * 15, [3] * 35],
    [[1] * 80, [1] * 30, [1] * 35],
    [75, 10, 1],
    window=20,
    prefix_lengths=[1, 4, 0],
    num_heads=4,
    num_groups=2,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_parity_over_several_segments(dtype: torch.dtype) -> None:
    check_parity(LONG, dtype, windowed_attn)


@pytest.mark.parametrize("head_dim", [LONG.head_dim, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_do_not_depend_on_threads(dtype: torch.dtype, head_dim: int) -> None:
    """Tasks and the order of sums are those of the layout: bitwise equal, on PyTorch's threads and on threads of its own."""
    case = replace(LONG, head_dim=head_dim)
    expected = case.inputs(dtype).run(windowed_attn)
    for num_threads, parallel in ((2, True), (5, True), (3, False)):
        with pytest.MonkeyPatch.context() as monkeypatch:
            if not parallel:
                monkeypatch.setattr(compiled, "_openmp_parallel", lambda: None)
            monkeypatch.setattr(torch, "get_num_threads", lambda n=num_threads: n)
            results = case.inputs(dtype).run(windowed_attn)
        for name, value in expected.items():
            assert torch.equal(results[name], value), f"{name} with {num_threads} threads"


def test_without_instructions_bfloat16_is_float32_rounded_at_the_end() -> None:
    """Bit for bit, forward and backward: a processor that does not multiply bfloat16 computes what it did before any did."""
    x = LONG.inputs(torch.bfloat16)
    leaves = {name: leaf.detach() for name, leaf in x.leaves.items()}
    half = checked_inputs(leaves, x.layout, x.reset_settings, None)
    full = Inputs(*(of.float() if getattr(of, "dtype", None) == torch.bfloat16 else of for of in half))
    with built_with("-DDTI_WIDEN_BFLOAT16"):
        out, lse = torch.ops.dti.windowed_attn_fwd(*half)
        expected, expected_lse = torch.ops.dti.windowed_attn_fwd(*full)
        assert torch.equal(out, expected.bfloat16())
        assert torch.equal(lse, expected_lse)
        grads = torch.ops.dti.windowed_attn_bwd(*half, x.grad_out, out, lse, True)
        wanted = torch.ops.dti.windowed_attn_bwd(*full, x.grad_out.float(), out.float(), lse, True)
    for name, grad, like in zip(Gradients._fields, grads, wanted, strict=True):
        assert torch.equal(grad, like.to(grad.dtype)), name


@pytest.mark.parametrize("flags", [(), ("-DDTI_VECTOR_BYTES=32", EMULATED)], ids=["here", "emulated"])
def test_outputs_are_rounded_as_pytorch_rounds(flags: tuple[str, ...]) -> None:
    """A row that weighs two keys equally reads the mean of two bfloat16 numbers: every other one lies halfway between two others."""
    layout = StreamLayout.build([[1]], [[1]], [1], 1)
    v = (torch.randn(3, 64, 64, generator=torch.manual_seed(0)) * 3).bfloat16()
    v[:, 0] *= 1e30
    means = (v[0].float() + v[1].float()) / 2
    ties = means.view(torch.int32) & 0xFFFF == 0x8000
    assert 0.2 < ties.float().mean() < 0.8
    with built_with(*flags) if flags else nullcontext():
        out = windowed_attn(torch.zeros_like(v), torch.zeros_like(v), v, layout)
    assert torch.equal(out[1], means.bfloat16())


def test_pytorchs_threads_are_found() -> None:
    """The thread pool of a PyTorch that is built with OpenMP is used: not that of scikit-learn, whose path sorts first."""
    import sklearn.metrics  # noqa: F401

    compiled._openmp_parallel.cache_clear()
    found = compiled._openmp_parallel()
    assert (found is not None) == torch.backends.openmp.is_available()
    runtimes = list((Path(torch.__file__).parent / "lib").glob("libgomp*"))
    if runtimes:
        assert found == ctypes.cast(ctypes.CDLL(str(runtimes[0])).GOMP_parallel, ctypes.c_void_p).value


def test_nan_is_not_hidden() -> None:
    """A run that diverged must be seen: exponentials clamp what is too small, not what is no number."""
    inputs = LONG.inputs(torch.float32)
    inputs.leaves["q"].data[7, 1, 3] = float("nan")
    out = inputs.call(windowed_attn)
    assert out[7, 1].isnan().all()
    assert out.isnan().sum() == out.shape[2]


def test_memory_of_gradients_is_linear_in_rows() -> None:
    """Rows are padded to whole vectors: a head_dim of 16 is one vector of any width, and needs no padding."""

    def size(num_interactions: int, head_dim: int) -> int:
        layout = StreamLayout.build([[4] * num_interactions], [[1] * num_interactions], [num_interactions], 5)
        q = torch.zeros(layout.num_rows, 2, head_dim)
        arguments, _ = compiled._arguments(checked_inputs({"q": q, "k": q, "v": q}, layout, None, None))
        return compiled._call("num_gradients", arguments, torch.float32)

    small, large = size(2000, 16), size(8000, 16)
    assert large <= 4.1 * small
    # Keys and values of every row and of what its segment sees before it: twice an input's size and a half.
    assert small <= 2.5 * (2 * 2000 * 6 * 2 * 16)
    # Padded at most to the next vector of 512 bits, and never less than the numbers themselves.
    assert small / 2 <= size(2000, 8) <= small


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A warning with the way out, once, and PyTorch computes."""
    case = CASES[1].inputs(torch.float64)
    expected = case.call(windowed_attn)  # first: this may be what builds it
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("DTI_CACHE_DIR", str(tmp_path))
    compiled.library.cache_clear()
    choice._warn.cache_clear()
    try:
        with pytest.raises(RuntimeError, match="DTI_CPU=native.*no-such-compiler"):
            case.call(windowed_attn)
        choice._warn.cache_clear()
        monkeypatch.setenv("DTI_CPU", "auto")
        with pytest.warns(UserWarning, match=r"no-such-compiler.*install one \(g\+\+.*in CXX"):
            out = case.call(windowed_attn)
        torch.testing.assert_close(out, expected)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            case.call(windowed_attn)
    finally:
        compiled.library.cache_clear()
        choice._warn.cache_clear()


def test_unknown_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DTI_CPU", "gpu")
    with pytest.raises(ValueError, match="DTI_CPU must be one of auto, native, torch, got 'gpu'"):
        CASES[1].inputs(torch.float64).call(windowed_attn)
