"""Attention on a CPU: what takes turns computes the same function, and every precision has a gate and rows. Times prove nothing here."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks import bench_attention
from benchmarks.attention import AttentionInputs, Workload, ratios, sdpa_dense_mask
from dti_kernels import windowed_attn_reference
from dti_kernels.testing import error_budgets, shares

WORKLOAD = Workload("small", 256, None, num_heads=2, num_groups=1, head_dim=16, window=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sdpa_has_the_equal_mask(dtype: torch.dtype) -> None:
    x = AttentionInputs.of(replace(WORKLOAD, dtype=dtype))
    exact = x.as_float64()
    inputs = {"q": exact.q, "k": exact.k, "v": exact.v}
    expected = windowed_attn_reference(*inputs.values(), x.layout)
    budgets = error_budgets(inputs, exact.grad_out, x.layout, dtype)
    for call in (bench_attention.run_windowed, sdpa_dense_mask(x)):
        found = shares({"out": call(x)}, {"out": expected}, {"out": budgets["out"]}, dtype)
        assert found["out"] <= 1


def test_every_precision_is_gated_and_takes_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    gated: list[torch.dtype] = []
    monkeypatch.setattr(bench_attention, "gate", lambda workload: gated.append(workload.dtype))
    workloads = [replace(WORKLOAD, name=name, num_tokens=tokens) for name, tokens in (("a", 64), ("b", 128))]
    rows = bench_attention.measure(workloads, 1, ["fp32", "bf16"])
    assert set(gated) == {torch.float32, torch.bfloat16}
    providers = {"windowed_attn", "windowed_attn_dti", "sdpa_dense_mask"}
    for precision, names in (
        ("fp32", providers | {"windowed_attn_torch"}),
        ("bf16", {f"{name}_bf16" for name in providers}),
    ):
        assert {row["provider"] for row in rows if row["precision"] == precision} == names
    assert len(rows) == 2 * 2 * 7
    assert ratios(rows).keys() >= {"growth", "bf16_over_fp32", "bf16_over_sdpa_dense_mask_fp32"}
    assert not [
        name for name in ratios([row for row in rows if row["precision"] == "fp32"]) if "bf16" in name
    ]

    def red(workload: Workload) -> None:
        assert workload.dtype != torch.bfloat16, "above its budget"

    monkeypatch.setattr(bench_attention, "gate", red)
    with pytest.raises(AssertionError, match="above its budget"):
        bench_attention.measure(workloads, 1, ["fp32", "bf16"])


def test_ratios_are_times_of_one_run() -> None:
    p50 = {
        "windowed_attn": 10.0,
        "sdpa_dense_mask": 50.0,
        "windowed_attn_bf16": 5.0,
        "sdpa_dense_mask_bf16": 40.0,
    }
    rows = [
        {"workload": workload, "provider": name, "mode": "forward+backward", "p50_ms": times * ms}
        for workload, times in (("short", 1), ("long", 4))
        for name, ms in p50.items()
        if (workload, times) == ("short", 1) or name.startswith("windowed")
    ]
    assert ratios(rows) == {
        "speedup_over_sdpa_dense_mask": 5.0,
        "growth": 4.0,
        "bf16_over_fp32": 2.0,
        "bf16_over_sdpa_dense_mask_fp32": 10.0,
        "bf16_over_sdpa_dense_mask_bf16": 8.0,
        "bf16_growth": 4.0,
    }
