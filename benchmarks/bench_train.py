"""Training steps on real prompts: targets per second over k, beside what the rows alone would give.

    python -m benchmarks.bench_train --data DIR [--k 1 5 10 20 50 200 all] [--precision fp32 bf16] [--compile]
                                     [--layers 4 --width 128] [--out ROWS.jsonl] [--record] [--size smoke]

All k and precisions run in one process by turns, with the same model, packing, attention and optimizer (`dti_model/training/compare.py`):
Trainer's own, which is fused AdamW, on float32 weights and moments in both precisions. k = 1 is the sliding-window baseline.
Each row holds the ratio of targets/s to k = 1 in its precision beside three predictions: the ratio of rows per target (context tokens and
[SUM]s), the ratio of FLOPs per target, counted from the lengths of the first batches, and the paper's equation 3, k N / (N + K) with n and
k interactions for N and K. A row in bfloat16 also holds `over_fp32`, the ratio of its targets/s to those in float32 at its k. With --compile
a row also holds `over_eager`, the ratio that `optim.compile` gives at its k in its precision. One more step of every kind runs under
PyTorch's profiler: its share of attention, and on a CPU the most memory that it allocates beside weights and moments (on a GPU: in all).
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.measuring import add_precision
from benchmarks.recording import make_parser, parse_measuring
from benchmarks.synthetic import made_up_data
from dti_model.config import DTIConfig, ModelConfig, OptimConfig, TrainConfig
from dti_model.model import Run
from dti_model.precision import Resolved
from dti_model.training import (
    Kind,
    StepCost,
    measure_training,
    packed_epoch,
    small_steps,
    timed_step,
)


def measure(
    config: TrainConfig,
    ks: list[int | None],
    num_steps: int,
    precisions: Sequence[Resolved],
    compiled: bool = False,
) -> list[dict[str, Any]]:
    """One row per precision and k."""
    run = Run.start(config)
    ways = (False, True) if compiled else (False,)
    kinds = [Kind(k, precision, way) for k, precision, way in product(ks, precisions, ways)]
    measured = measure_training(run, kinds, num_steps)
    flops = {k: flops_per_target(run, k) for k in ks}
    window = config.window
    rows = []
    for precision, k in [(precision, k) for precision in precisions for k in ks]:
        value, base = measured[Kind(k, precision)], measured.get(Kind(1, precision))
        in_float32, faster = measured.get(Kind(k, "fp32")), measured.get(Kind(k, precision, compiled=True))
        attention_share, step_mib = profiled_step(run, k, precision)
        row: dict[str, Any] = {"benchmark": "train", "data": run.data.stats["source"]["name"]}
        row["model"] = f"{config.model.layers} x {config.model.width}"
        row["parameters"] = sum(p.numel() for p in run.model.parameters())
        row |= {"mode": config.dti.mode, "precision": precision}
        row |= {"k": "all" if k is None else k, "steps": num_steps}
        row |= {"targets_per_s": round(value.targets_per_s, 1), "tokens_per_s": round(value.rows_per_s)}
        row["rows_per_target"] = round(value.rows_per_target, 2)
        row["peak_mib"] = step_mib if value.peak_mib is None else value.peak_mib
        row |= {"attention_share": attention_share, "mflops_per_target": round(flops[k] / 1e6, 2)}
        row["equation_3"] = None if k is None else round(k * window / (window + k), 2)
        if base is not None:
            row["speedup"] = round(value.targets_per_s / base.targets_per_s, 2)
            row["rows_ratio"] = round(base.rows_per_target / value.rows_per_target, 2)
            row["flops_ratio"] = round(flops[1] / flops[k], 2)
            row["speedup_over_rows_ratio"] = round(row["speedup"] / row["rows_ratio"], 2)
        if precision != "fp32" and in_float32 is not None:
            row["over_fp32"] = round(value.targets_per_s / in_float32.targets_per_s, 2)
        if faster is not None:
            row["over_eager"] = round(faster.targets_per_s / value.targets_per_s, 3)
        rows.append(row)
    return rows


def profiled_step(run: Run, k: int | None, precision: Resolved) -> tuple[float, float]:
    """Share of a step's time that is spent in `windowed_attn`, forward and backward, and peak MiB that the step allocated."""
    model = copy.deepcopy(run.model).train()
    optimizer = small_steps(run, model)
    dataset = packed_epoch(run, k)
    timed_step(run, model, optimizer, dataset, 0, precision)
    on_gpu = model.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, profile_memory=True) as profiler:
        timed_step(run, model, optimizer, dataset, 1, precision)
    averages = profiler.key_averages()
    time = "device_time_total" if on_gpu else "cpu_time_total"
    attention = sum(getattr(event, time) for event in averages if event.key.startswith("dti::windowed_attn"))
    whole = sum(getattr(event, f"self_{time}") for event in averages)
    allocated, peak = 0, 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            allocated += event.nbytes()
            peak = max(peak, allocated)
    return round(attention / whole, 3), round(peak / 2**20, 1)


def flops_per_target(run: Run, k: int | None) -> float:
    """Forward and backward, counted over the first batches of an epoch (`dti_model.training.flops`)."""
    cost, dataset = StepCost.of(run.model), packed_epoch(run, k)
    batches = [dataset[i] for i in range(min(8, len(dataset)))]
    return sum(cost.flops(batch.layout) for batch in batches) / sum(batch.layout.num_sum for batch in batches)


def main() -> None:
    """Measure, print and keep the rows."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--data", type=Path, help="folder made by `dti prepare`; default: made-up data of MovieLens' shape")
    add("--k", nargs="+", default=["1", "5", "10", "20", "30", "50", "100", "200", "all"])
    add_precision(parser)
    add("--compile", action="store_true", help="measure `optim.compile` too")
    add("--layers", type=int, default=4)
    add("--width", type=int, default=128)
    add("--heads", type=int, default=4)
    add("--token-budget", type=int, default=8192)
    add("--steps", type=int, default=15)
    add("--mode", default="dti")
    smoke = {"k": ["1", "4", "all"], "layers": 1, "width": 16, "heads": 2, "token_budget": 1024, "steps": 1}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = parse_measuring(parser, f"train-{device}", smoke)
    if options.data is None:
        options.data = made_up_data(Path(tempfile.mkdtemp()))
    config = TrainConfig(
        data=options.data,
        out=Path("unused"),
        dti=DTIConfig(options.mode),
        model=ModelConfig(
            layers=options.layers,
            width=options.width,
            heads=options.heads,
            kv_heads=max(1, options.heads // 2),
            mlp_width=-(-options.width // 3) * 8,  # a multiple of 8
            dropout=0.0,
        ),
        optim=OptimConfig(token_budget=options.token_budget),
    )
    ks = [None if k == "all" else int(k) for k in options.k]
    rows = measure(config, ks, options.steps, options.precision, options.compile)
    for row in rows:
        print(
            f"{row['precision']}  k {row['k']!s:>4}  {row['targets_per_s']:9.1f} targets/s  {row['tokens_per_s']:8,} tokens/s  "
            f"{row.get('speedup', 1):6.2f} x (rows {row.get('rows_ratio', 1):.2f} x, FLOPs {row.get('flops_ratio', 1):.2f} x, equation 3 {row['equation_3']}; "
            f"attention {row['attention_share']:.0%}, {row['peak_mib']:.0f} MiB)"
            + (f"  {row['over_fp32']:.2f} x fp32" if "over_fp32" in row else "")
            + (f"  {row['over_eager']:.3f} x if compiled" if "over_eager" in row else "")
        )
    options.rows.keep(rows)


if __name__ == "__main__":
    main()
