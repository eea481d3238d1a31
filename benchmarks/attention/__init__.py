"""Attention alone: named workloads, the parity gate, all providers, and measuring them on a GPU."""

from benchmarks.attention.flex_tuned import Warming
from benchmarks.attention.gpu import run_on_gpu
from benchmarks.attention.parity import MOST_SHARE, budget_shares, gate
from benchmarks.attention.providers import (
    BF16,
    DENSE,
    MODES,
    OURS,
    Call,
    by_mode,
    sdpa,
    sdpa_dense_mask,
    windowed,
)
from benchmarks.attention.rows import ratios
from benchmarks.attention.tiles import candidates_of, numbers_of, useful_fraction
from benchmarks.attention.workloads import (
    KINDS,
    SHORT_TOKENS,
    STREAMING,
    AttentionInputs,
    Workload,
    gpu_workload,
    useful_flops,
)
