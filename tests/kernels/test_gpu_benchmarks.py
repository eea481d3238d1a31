"""What of the GPU benchmarks can be checked without a GPU: the baselines' mask, the tuner's launches."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks import providers
from benchmarks.attention_gpu import workloads
from benchmarks.workloads import AttentionInputs, Workload
from dti_kernels import windowed_attn_reference
from dti_kernels.testing import assert_within_budget, error_budgets
from dti_kernels.tiles import KERNELS

SMALL = Workload("small", 300, 3, 4, 2, 16, window=2, mean_tokens=7, std_tokens=2)


@pytest.mark.parametrize("name", ["windowed_attn", "sdpa_dense_mask", "flex", "flex_with_mask_construction"])
def test_providers_compute_the_same_attention(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one key stream and no ALiBi, which is all that the baselines can do, everybody agrees with the reference."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    monkeypatch.setattr(providers, "_compiled_flex", lambda: (flex_attention, create_block_mask))
    x = AttentionInputs.of(SMALL)
    x = dataclasses.replace(x, **{leaf: getattr(x, leaf).detach() for leaf in ("q", "k", "v")})
    x = dataclasses.replace(x, k_sum=x.k, alibi_slopes=torch.zeros(4))
    out = providers.GPU_PROVIDERS[name](x)(x)
    golden = windowed_attn_reference(x.q.double(), x.k.double(), x.v.double(), x.layout)
    inputs = {"q": x.q, "k": x.k, "v": x.v}
    budgets = error_budgets(inputs, torch.zeros_like(x.q), x.layout, torch.float32)
    assert_within_budget({"out": out}, {"out": golden}, budgets, torch.float32)


def test_tuner_launches_every_kernel() -> None:
    pytest.importorskip("triton")
    from benchmarks.tune_tiles import CANDIDATES, candidates, launches

    x = AttentionInputs.of(dataclasses.replace(SMALL, reset=True))
    assert set(KERNELS) <= set(launches(x))
    for kernel in KERNELS:
        assert len(list(candidates(kernel, x))) > len(CANDIDATES[kernel])


def test_workloads_have_names_of_their_own() -> None:
    names = [workload.name for workload in workloads()]
    assert len(set(names)) == len(names) == 40
