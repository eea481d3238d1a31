"""The part of the GPU benchmarks that can be checked without a GPU: the baselines' mask, the tuner's launches and its choice."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks.attention import flex_tuned, providers
from benchmarks.attention.gpu import plans, workloads
from benchmarks.attention.tiles import candidates_of, numbers_of
from benchmarks.attention.workloads import AttentionInputs, Workload
from benchmarks.tune_tiles import Sweep, launches
from dti_kernels import StreamLayout, windowed_attn_reference
from dti_kernels.gpu import tiles as tiles_module
from dti_kernels.gpu.tiles import KERNELS, Tile
from dti_kernels.testing import assert_within_budget, error_budgets

SMALL = Workload("small", 300, 3, 4, 2, 16, window=2, mean_tokens=7, std_tokens=2)


@pytest.fixture
def inputs(monkeypatch: pytest.MonkeyPatch) -> AttentionInputs:
    """One key stream and no ALiBi, which is all that the baselines can do; FlexAttention is not compiled."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    monkeypatch.setattr(providers, "_compiled_flex", lambda: (flex_attention, create_block_mask))
    x = AttentionInputs.of(SMALL)
    x = dataclasses.replace(x, **{leaf: getattr(x, leaf).detach() for leaf in ("q", "k", "v")})
    return dataclasses.replace(x, k_sum=x.k, alibi_slopes=torch.zeros(4))


def assert_is_attention(out: torch.Tensor, x: AttentionInputs) -> None:
    golden = windowed_attn_reference(x.q.double(), x.k.double(), x.v.double(), x.layout)
    budgets = error_budgets({"q": x.q, "k": x.k, "v": x.v}, torch.zeros_like(x.q), x.layout, torch.float32)
    assert_within_budget({"out": out}, {"out": golden}, budgets, torch.float32)


# Upper bounds of speed: they compute attention with another mask.
OTHER_MASKS = {"sdpa_causal", "varlen_scalar_window", "flash_scalar_window"}


@pytest.mark.parametrize("name", sorted(providers.GPU_PROVIDERS.keys() - OTHER_MASKS))
def test_providers_compute_the_same_attention(name: str, inputs: AttentionInputs) -> None:
    assert_is_attention(providers.GPU_PROVIDERS[name](inputs)(inputs), inputs)


@pytest.mark.parametrize("options", flex_tuned.OPTIONS, ids=lambda options: options.name)
def test_tuned_flex_attention_computes_the_same(options: flex_tuned.Options, inputs: AttentionInputs) -> None:
    assert_is_attention(flex_tuned.prepare(inputs, options)(inputs), inputs)


def test_options_have_the_modes_that_pytorch_compiles() -> None:
    """The default tile of Hopper's backward must divide the blocks of the mask; the sets that fit are tried for the backward."""
    forward_only = {options.name for options in flex_tuned.OPTIONS if options.modes == ("forward",)}
    assert forward_only == {"fine mask", "fine keys"}
    backwards = {
        tuple(options.kernel[f"bwd_{name}"] for name in ("BLOCK_M1", "BLOCK_N1", "num_warps", "num_stages"))
        for options in flex_tuned.OPTIONS
        if options.modes != ("forward",) and options.kernel
    }
    assert backwards == {(32, 128, 8, 3), (64, 64, 4, 3), (64, 128, 8, 2)}


@pytest.mark.parametrize("prefix", [0, 3])
def test_flex_attention_gets_the_rule_of_visibility(prefix: int) -> None:
    """Row by row and key by key, a [SUM]'s own key included; with prefixes too, which the workloads do not have."""
    items, labels = [[3, 2, 4], [2, 5]], [[1, 1, 1], [1, 1]]
    layout = StreamLayout.build(items, labels, [2, 1], window=1, prefix_lengths=[prefix, prefix])
    rows = torch.arange(layout.num_rows)
    zero = torch.zeros((), dtype=torch.long)
    found = providers.mask_mod(layout)(zero, zero, rows[:, None], rows[None])
    expected = torch.zeros_like(found)
    expected[:, : layout.num_context] = layout.dense_visibility()
    expected |= (rows[:, None] == rows[None]) & (rows[:, None] >= layout.num_context)
    assert torch.equal(found, expected)


def test_workloads_have_names_of_their_own() -> None:
    names = [workload.name for workload in workloads()]
    assert len(set(names)) == len(names) == 10
    assert names[:3] == ["llama8b_k50_16k", "smollm_k50_16k", "smollm_span300_k50_16k"]
    # Four times the tokens take longest, and nothing that only ours has comes after them.
    assert [name for name in names if "reset" in name or "64k" in name] == [
        "llama8b_k50_16k_reset",
        "smollm_k50_16k_reset",
        "llama8b_k50_64k",
        "smollm_k50_64k",
    ]


def test_short_items_make_windows_of_300_tokens() -> None:
    """SmolLM2 on MovieLens-1M: the table has tiles of its own for it, which no workload of 35 tokens runs."""
    by_name = {workload.name: workload.layout() for workload in workloads() if "64k" not in workload.name}
    spans = {name: layout.stop - layout.start for name, layout in by_name.items()}
    longest = {name: float(span.float().quantile(0.9)) for name, span in spans.items()}
    assert 270 < longest["smollm_span300_k50_16k"] < 360
    assert 650 < longest["smollm_k50_16k"] < 800
    assert by_name["smollm_span300_k50_16k"].mean_span <= 256 < by_name["smollm_k50_16k"].mean_span


def test_every_baseline_that_knows_no_window_runs_once_per_heads_and_length() -> None:
    seen = [
        (plan.workload.num_heads, plan.workload.num_tokens, name)
        for plan in plans()
        for name in plan.baselines
        if name.startswith("sdpa")
    ]
    assert len(set(seen)) == len(seen) > 0


def test_candidates_of_the_tuner_are_each_once() -> None:
    for kernel in KERNELS:
        for head_dim in (16, 64, 128, 256):
            tiles = candidates_of(kernel, head_dim)
            assert len(set(tiles)) == len(tiles) >= 3
            # The written form of a winner makes the tile again.
            assert all(tiles_module._tuned_tile(numbers_of(tile)) == tile for tile in tiles)
    assert {tile.ahead for tile in candidates_of("ctx_fwd", 64)} == {True, False}
    assert not any(tile.ahead for tile in candidates_of("ctx_dkv", 64))
    # Eight warps over 64 x 64 compute the same twice.
    assert not {Tile(64, 64, 8, 2), Tile(64, 64, 8, 3)} & set(candidates_of("ctx_dkv", 128))


def test_tuner_launches_every_kernel() -> None:
    pytest.importorskip("triton")
    x = AttentionInputs.of(dataclasses.replace(SMALL, reset=True))
    assert set(KERNELS) <= set(launches(x))
    for kernel in KERNELS:
        sweep = Sweep("small", kernel, x, "sm_90")
        assert sweep.candidates()[0] == sweep.table_tile
        assert len(sweep.candidates()) >= 3


@pytest.mark.parametrize(("candidate_ms", "wins"), [(0.97, True), (0.99, False), (1.2, False)])
def test_a_tile_must_win_clearly(candidate_ms: float, wins: bool) -> None:
    """Two percent is what a sweep scatters by: the table's tile stays within it."""
    sweep = Sweep(
        "small", "ctx_fwd", AttentionInputs.of(dataclasses.replace(SMALL, dtype=torch.bfloat16)), "sm_90"
    )
    own = {"tile": [128, 64, 8, 3, 16], "in_table": True, "p50_ms": 1.0}
    other = {"tile": [64, 64, 4, 3, 16], "in_table": False, "p50_ms": candidate_ms}
    refused = {"tile": [128, 128, 8, 3, 16], "in_table": False, "failed": "OutOfResources: shared memory"}
    rows = [own, other, refused]
    assert sweep.winner(rows) is (other if wins else own)
    entry = sweep.entry([{**row, "won": row is sweep.winner(rows)} for row in rows])
    assert entry is not None
    assert entry["tile"] == (other if wins else own)["tile"]
    about = {name: entry[name] for name in ("arch", "kernel", "head_dim", "bits", "short_span")}
    assert about == {"arch": "sm_90", "kernel": "ctx_fwd", "head_dim": 64, "bits": 16, "short_span": True}
    assert sweep.winner([refused]) is None
    assert sweep.entry([{**refused, "won": False}]) is None
    # If the table's own tile does not run, whatever runs replaces it.
    failed = {"tile": own["tile"], "in_table": True, "failed": "OutOfResources: shared memory"}
    assert sweep.winner([failed, other]) is other
