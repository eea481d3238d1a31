"""The Triton kernels on a GPU: parity, determinism, memory, long batches. Everything here needs a CUDA or ROCm device.

In a rehearsal (`benchmarks.measuring.rehearsal`) the same tests run on a CPU, where Triton interprets the kernels: the small ones of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.attention.workloads import AttentionInputs, Workload
from benchmarks.measuring.rehearsal import DEVICE
from dti_kernels import StreamLayout, windowed_attn
from tests.cases import CASES, Case, named
from tests.kernels.not_finite import STREAMS, check_isolation
from tests.numerics import parity_shares

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA or ROCm device"
    ),
]
LLAMA = Case(
    "llama_heads",
    [[30, 41, 28, 35, 33, 26, 44, 31, 37, 29] * 3, [34] * 12],
    [[1] * 30, [2] * 12],
    [20, 7],
    window=8,
    prefix_lengths=[40, 17],
    num_heads=8,
    num_groups=2,
    head_dim=128,
)
SMOLLM = dataclasses.replace(LLAMA, name="smollm_heads", num_heads=9, num_groups=3, head_dim=64)
WIDE = dataclasses.replace(LLAMA, name="head_dim_256", num_heads=2, num_groups=2, head_dim=256)


# Query heads that share a key head, beside those above: each is another kernel, and 32 are more than a tile packs.
GROUPS = [(64, 1), (64, 4), (64, 8), (128, 1), (128, 3), (128, 8), (256, 4), (64, 32)]


def grouped(head_dim: int, heads_per_key: int) -> Case:
    """Two key heads, a prefix, and more rows than a tile."""
    return Case(
        f"head_dim_{head_dim}_group_{heads_per_key}",
        [[5, 9, 4, 7] * 4, [6] * 5],
        [[1] * 16, [1] * 5],
        [12, 3],
        window=3,
        prefix_lengths=[4, 0],
        num_heads=2 * heads_per_key,
        num_groups=2,
        head_dim=head_dim,
    )


@pytest.fixture(autouse=True)
def unfilled() -> Iterator[None]:
    """Deterministic algorithms fill every empty buffer with NaN on a GPU. Only the test about it wants that."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before


@pytest.fixture
def parity(record_property: Callable[[str, Any], None]) -> Callable[[Case, torch.dtype], None]:
    """Checks a case, and records the share of the error budget that each tensor uses, whether it is within it or not."""

    def check(case: Case, dtype: torch.dtype) -> None:
        shares = parity_shares(case, dtype, windowed_attn, DEVICE)
        print(case.name, dtype, "error / budget", shares)
        record_property("shares", {name: round(share, 3) for name, share in shares.items()})
        assert all(share <= 1 for share in shares.values())

    return check


Parity = Callable[[Case, torch.dtype], None]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", [LLAMA, SMOLLM, WIDE], ids=lambda case: case.name)
def test_parity_at_real_heads(case: Case, dtype: torch.dtype, parity: Parity) -> None:
    parity(case, dtype)


@pytest.mark.parametrize(("head_dim", "heads_per_key"), GROUPS)
def test_parity_of_other_groups(head_dim: int, heads_per_key: int, parity: Parity) -> None:
    parity(grouped(head_dim, heads_per_key), torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_parity(case: Case, dtype: torch.dtype, parity: Parity) -> None:
    parity(case, dtype)


def test_a_hundred_runs_are_bitwise_equal() -> None:
    x = LLAMA.inputs(torch.bfloat16, DEVICE)
    first = x.run(windowed_attn)
    for _ in range(100):
        again = x.run(windowed_attn)
        for name in first:
            assert torch.equal(first[name], again[name]), name


@pytest.mark.parametrize("name", ["prefix", "gqa_4", "several_blocks"])
def test_nothing_leaks_from_what_a_row_may_not_see(name: str) -> None:
    x = named(name).inputs(torch.bfloat16, DEVICE)
    out, visible, num_context = x.call(windowed_attn), x.layout.dense_visibility(), x.layout.num_context
    for key in range(0, num_context, max(1, num_context // 7)):
        changed = {leaf_name: leaf.detach().clone() for leaf_name, leaf in x.leaves.items()}
        for leaf_name in ("k", "v", "k_sum", "k_initial", "v_initial"):
            changed[leaf_name][key] += 3.0
        other = dataclasses.replace(x, leaves=changed).call(windowed_attn)
        assert torch.equal(other[~visible[:, key]], out[~visible[:, key]])


@pytest.mark.parametrize("stream", STREAMS if DEVICE == "cuda" else ("v", "grad_out"))
def test_numbers_that_are_not_finite_are_isolated(stream: str) -> None:
    cases = [named("prefix"), *([LLAMA] if DEVICE == "cuda" else [])]
    for case, value in zip(cases, (float("nan"), float("inf"))):
        check_isolation(case, windowed_attn, torch.bfloat16, stream, value, bitwise=False, device=DEVICE)


def test_unwritten_memory_is_never_read() -> None:
    """Buffers that the kernels must fill start as NaN; the result is the same, bitwise."""
    case = SMOLLM if DEVICE == "cuda" else named("window_0")
    x = case.inputs(torch.bfloat16, DEVICE)
    plain = x.run(windowed_attn)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(5, device=DEVICE).isnan().all()
    try:
        poisoned = x.run(windowed_attn)
    finally:
        torch.use_deterministic_algorithms(False)
    for name in plain:
        assert torch.equal(plain[name], poisoned[name]), name


def moved(x: Tensor, elements: int) -> Tensor:
    """The same so many elements behind an address that is a multiple of 16."""
    return x.detach().new_empty(x.numel() + elements)[elements:].view(x.shape).copy_(x).requires_grad_()


def test_calls_launch_again_what_fits_their_addresses() -> None:
    """A batch at aligned and at odd addresses in turns: the second time launches kernels of the first, and gives the same, bitwise."""
    case = SMOLLM if DEVICE == "cuda" else named("window_0")
    x = case.inputs(torch.bfloat16, DEVICE)
    first: dict[int, dict[str, Tensor]] = {0: x.run(windowed_attn)}
    for elements in (1, 0, 1, 0):
        leaves = {name: moved(leaf, elements) for name, leaf in x.leaves.items()}
        again = dataclasses.replace(x, leaves=leaves).run(windowed_attn)
        for name, expected in first.setdefault(elements, again).items():
            assert torch.equal(again[name], expected), name


MEMORY = Workload(
    "memory", 8192, 50, num_heads=8, num_groups=2, head_dim=64, reset=True, dtype=torch.bfloat16
)


def peak_bytes(num_tokens: int) -> int:
    """Peak of what forward and backward ask for beyond the inputs; the allocator's blocks, which may be larger, do not count."""
    x = AttentionInputs.of(dataclasses.replace(MEMORY, num_tokens=num_tokens), DEVICE)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    out = windowed_attn(x.q, x.k, x.v, x.layout, k_sum=x.k_sum, alibi_slopes=x.alibi_slopes, reset=x.reset)
    torch.autograd.grad(out, x.leaves(), x.grad_out)
    return torch.cuda.memory_stats()["requested_bytes.all.peak"] - before


def test_memory_grows_with_rows_and_not_with_their_square() -> None:
    """Four times the rows ask for at most four times the memory, and what does not fill its last tile."""
    short, long = peak_bytes(MEMORY.num_tokens), peak_bytes(4 * MEMORY.num_tokens)
    assert long <= 4 * short + (2 << 20)


def test_offsets_beyond_two_to_the_31() -> None:
    """The last prompt of a batch of more than 2**31 elements equals the same prompt run alone, bitwise, gradients too.

    Its context starts at a multiple of every tile and its [SUM] row has a tile of its own, so the sums run in the same order.
    """
    if torch.cuda.get_device_properties(0).total_memory < 60 << 30:
        pytest.skip("needs 60 GiB")
    num_heads, head_dim, length = 32, 128, 8192
    num_prompts = 2**31 // (num_heads * head_dim * length) + 1
    layout = StreamLayout.build(
        [[length - 1]] * num_prompts, [[1]] * num_prompts, [1] * num_prompts, 1, device=DEVICE
    )
    alone = StreamLayout.build([[length - 1]], [[1]], [1], 1, device=DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(0)

    def draw(heads: int) -> torch.Tensor:
        x = torch.empty(layout.num_rows, heads, head_dim, dtype=torch.bfloat16, device=DEVICE)
        return x.normal_(generator=generator)

    q, k, v, grad_out = draw(num_heads), draw(1), draw(1), draw(num_heads)
    assert q.numel() > 2**31
    rows = torch.arange(layout.num_rows, device=DEVICE)
    last = torch.cat([rows[layout.num_context - length : layout.num_context], rows[-1:]])

    def run(layout: StreamLayout, *tensors: torch.Tensor) -> list[torch.Tensor]:
        leaves = [x.detach().requires_grad_() for x in tensors[:3]]
        out = windowed_attn(*leaves, layout)
        return [out.detach(), *torch.autograd.grad(out, leaves, tensors[3])]

    packed = [x[last] for x in run(layout, q, k, v, grad_out)]
    expected = run(alone, *(x[last] for x in (q, k, v, grad_out)))
    for name, a, b in zip(("out", "dq", "dk", "dv"), packed, expected):
        assert torch.equal(a, b), name


def test_a_layout_is_built_without_waiting_for_the_device() -> None:
    torch.cuda.set_sync_debug_mode("error")
    try:
        layout = StreamLayout.build([[30] * 70] * 5, [[1] * 70] * 5, [50] * 5, 20, device=DEVICE)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert layout.device.type == DEVICE


def test_compiled_with_inductor() -> None:
    """fullgraph, and no recompile over three lengths. A rehearsal leaves out what inductor makes of the graph, in C++ there."""
    from tests.kernels.test_torch_integration import Layer, gradients

    torch._dynamo.reset()
    layer = Layer().to(DEVICE)
    backend = "inductor" if DEVICE == "cuda" else "aot_eager"
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=backend)
    layouts = [
        dataclasses.replace(case.layout(DEVICE), window=2)
        for case in CASES
        if case.name in ("prefix", "several_blocks", "many_short_prompts")
    ]
    gradients(layer, compiled, layouts[0])
    with torch._dynamo.config.patch(error_on_recompile=True):
        for layout in layouts[1:]:
            gradients(layer, compiled, layout)
