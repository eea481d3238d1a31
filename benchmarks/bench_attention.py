"""Attention alone: `windowed_attn` beside the strongest alternatives, forward and forward + backward.

    python -m benchmarks.bench_attention [--device cuda] [--out ROWS.jsonl] [--record] [--size smoke]

All providers, lengths and precisions run in one process, by turns. Before a row is written, the output and all gradients of
`windowed_attn` are held to the dense reference on that workload (or on its first tokens, where dense does not fit), in each precision.
On a CPU providers compute in float32, and those whose names end with `_bf16` in bfloat16.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from torch import Tensor

from benchmarks.attention import (
    BF16,
    DENSE,
    OURS,
    AttentionInputs,
    Call,
    Workload,
    by_mode,
    gate,
    ratios,
    run_on_gpu,
    sdpa_dense_mask,
    useful_flops,
    windowed,
)
from benchmarks.measuring import DTYPES, add_precision, interleaved_ms, percentiles_ms
from benchmarks.recording import INCOMPLETE, Rows, make_parser, parse_measuring
from dti_kernels import windowed_attn
from dti_model.precision import Resolved

# 4 heads of 64 and a window of 700 tokens (20 interactions of 35): the sizes that the project's CPU claim is stated for.
CPU_LENGTHS, SMOKE_LENGTHS = (4096, 16384), (256, 1024)
# Runs a function on the fallback for machines without a compiler.
IN_PYTORCH = patch.dict(os.environ, DTI_CPU="torch")
TORCH = f"{OURS}_torch"  # its name, in float32 only
DENSE_LIMIT = 8192  # context tokens; beyond it a dense mask and its scores no longer fit comfortably


def run_windowed(x: AttentionInputs) -> Tensor:
    """Ours, doing what SDPA under the equal dense mask does: one key stream, no ALiBi."""
    return windowed_attn(x.q, x.k, x.v, x.layout)


@dataclass(frozen=True, eq=False)
class Provider:
    """One way to compute a workload in a precision."""

    name: str  # how rows call it
    workload: Workload
    precision: Resolved
    x: AttentionInputs
    call: Call

    def function(self, mode: str) -> Callable[[], Any]:
        """What is timed."""
        function = by_mode(self.call, self.x)[mode]
        return IN_PYTORCH(function) if self.name == TORCH else function

    def row(self, mode: str, times: np.ndarray) -> dict[str, Any]:
        """A row of its times in milliseconds."""
        layout, workload, timing = self.x.layout, self.workload, percentiles_ms(times)
        flops = useful_flops(layout, workload.num_heads, workload.head_dim, mode != "forward")
        row: dict[str, Any] = {"benchmark": "attention", "workload": workload.name, "rows": layout.num_rows}
        row |= {"visible_pairs": layout.num_visible_pairs(), "provider": self.name}
        row |= {"precision": self.precision, "mode": mode, **timing}
        return {**row, "useful_gflops": round(flops / timing["p50_ms"] / 1e6, 1)}


def providers_of(workload: Workload, precision: Resolved) -> list[Provider]:
    """Every provider that fits, behind the gate of ours."""
    typed = replace(workload, dtype=DTYPES[precision])
    gate(typed)
    x = AttentionInputs.of(typed)
    calls: dict[str, Call] = {OURS: run_windowed, f"{OURS}_dti": windowed(x)}
    if workload.num_tokens <= DENSE_LIMIT:
        calls[DENSE] = sdpa_dense_mask(x)
    if precision == "bf16":
        calls = {name + BF16: call for name, call in calls.items()}
    else:
        IN_PYTORCH(gate)(typed)
        calls[TORCH] = run_windowed
    return [Provider(name, workload, precision, x, call) for name, call in calls.items()]


def measure(workloads: list[Workload], repeats: int, precisions: Sequence[Resolved]) -> Rows:
    """Rows of all providers of all workloads, forward and forward + backward. Workloads and precisions take turns like providers do:
    ratios between them are claims too."""
    providers = [one for workload in workloads for name in precisions for one in providers_of(workload, name)]
    rows = []
    for mode in ("forward", "forward+backward"):
        times = interleaved_ms({one: one.function(mode) for one in providers}, repeats)
        rows += [one.row(mode, ms) for one, ms in times.items()]
    return rows


def main() -> None:
    """Measure, print and keep the rows of a device."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--repeats", type=int, default=9, help="on a CPU")
    add_precision(parser)
    add("--lengths", type=int, nargs=2, default=CPU_LENGTHS, help="rows T on a CPU")
    add("--seconds", type=float, default=200.0, help="on a GPU: start no workload after this")
    add("--resume", action="store_true", help="on a GPU: leave out what --out has already")
    add("--only", choices=("ours",), help="on a GPU: measure no baseline")
    add(
        "--logs",
        type=Path,
        help="on a GPU: folder for what FlexAttention's compilations print; default: a temporary one",
    )
    options = parse_measuring(parser, "attention-{device}", {"lengths": SMOKE_LENGTHS, "repeats": 1})
    if options.device == "cuda":
        complete = run_on_gpu(
            options.rows, options.seconds, options.resume, options.only == "ours", options.logs
        )
        if not complete:
            sys.exit(INCOMPLETE)
        return
    workloads = [
        Workload(f"cpu_T{length}", length, None, num_heads=4, num_groups=4, head_dim=64)
        for length in options.lengths
    ]
    rows = measure(workloads, options.repeats, options.precision)
    for row in rows:
        print(
            f"{row['workload']:12} {row['provider']:22} {row['mode']:17} p50 {row['p50_ms']:9.1f} ms  "
            f"(p20 {row['p20_ms']:.1f}, p80 {row['p80_ms']:.1f})  {row['useful_gflops']:6.1f} useful GFLOP/s"
        )
    for name, value in ratios(rows).items():
        print(f"{name}: {value:.2f}")
    options.rows.keep(rows)


if __name__ == "__main__":
    main()
