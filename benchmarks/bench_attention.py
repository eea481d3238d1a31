"""Attention alone: `windowed_attn` beside the strongest alternatives, forward and forward + backward.

    python -m benchmarks.bench_attention [--device cuda] [--out ROWS.jsonl] [--record] [--size smoke]

All providers and lengths run in one process, by turns. Before a row is written, the output and all gradients of
`windowed_attn` are held to the dense reference on that workload (or on its first tokens, where dense does not fit).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from unittest.mock import patch

from torch import Tensor

from benchmarks.attention import (
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
from benchmarks.measuring import interleaved_ms, percentiles_ms
from benchmarks.recording import INCOMPLETE, Rows, make_parser, parse_measuring
from dti_kernels import windowed_attn

# 4 heads of 64 and a window of 700 tokens (20 interactions of 35): the sizes that the project's CPU claim is stated for.
CPU_LENGTHS, SMOKE_LENGTHS = (4096, 16384), (256, 1024)
# Runs a function on the fallback for machines without a compiler.
IN_PYTORCH = patch.dict(os.environ, DTI_CPU="torch")
DENSE_LIMIT = 8192  # context tokens; beyond it a dense mask and its scores no longer fit comfortably


def run_windowed(x: AttentionInputs) -> Tensor:
    """Ours, doing what SDPA under the equal dense mask does: one key stream, no ALiBi."""
    return windowed_attn(x.q, x.k, x.v, x.layout)


def measure(workloads: list[Workload], repeats: int) -> Rows:
    """Rows of all workloads: every provider that fits, forward and forward + backward. Workloads take turns like providers do:
    ratios between lengths are claims too."""
    inputs: dict[Workload, AttentionInputs] = {}
    providers: dict[tuple[Workload, str], Call] = {}
    for workload in workloads:
        gate(workload)
        IN_PYTORCH(gate)(workload)
        x = inputs[workload] = AttentionInputs.of(workload)
        providers[workload, "windowed_attn"] = run_windowed
        providers[workload, "windowed_attn_dti"] = windowed(x)
        if workload.num_tokens <= DENSE_LIMIT:
            providers[workload, "sdpa_dense_mask"] = sdpa_dense_mask(x)
        providers[workload, "windowed_attn_torch"] = run_windowed
    rows = []
    for mode in ("forward", "forward+backward"):
        calls = {key: by_mode(provider, inputs[key[0]])[mode] for key, provider in providers.items()}
        calls |= {key: IN_PYTORCH(call) for key, call in calls.items() if key[1] == "windowed_attn_torch"}
        for (workload, name), times in interleaved_ms(calls, repeats).items():
            layout = inputs[workload].layout
            flops = useful_flops(layout, workload.num_heads, workload.head_dim, mode != "forward")
            timing = percentiles_ms(times)
            row = {"benchmark": "attention", "workload": workload.name, "rows": layout.num_rows}
            row |= {"visible_pairs": layout.num_visible_pairs(), "provider": name, "mode": mode, **timing}
            rows.append({**row, "useful_gflops": round(flops / timing["p50_ms"] / 1e6, 1)})
    return rows


def main() -> None:
    """Measure, print and keep the rows of a device."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--repeats", type=int, default=9, help="on a CPU")
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
    rows = measure(workloads, options.repeats)
    for row in rows:
        print(
            f"{row['workload']:12} {row['provider']:19} {row['mode']:17} p50 {row['p50_ms']:9.1f} ms  "
            f"(p20 {row['p20_ms']:.1f}, p80 {row['p80_ms']:.1f})  {row['useful_gflops']:6.1f} useful GFLOP/s"
        )
    for name, value in ratios(rows).items():
        print(f"{name}: {value:.2f}")
    options.rows.keep(rows)


if __name__ == "__main__":
    main()
