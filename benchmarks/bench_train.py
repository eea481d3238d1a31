"""Training steps on real prompts: targets per second over k, beside what the rows alone would give.

    python -m benchmarks.bench_train --data DIR [--k 1 5 10 20 50 200 all] [--layers 4 --width 128] [--out ROWS.jsonl]

All k run in one process by turns, with the same model, packing, attention and optimizer; k = 1 is the sliding-window baseline.
Each row holds the ratio of targets/s to k = 1 beside the ratio of rows per target (context tokens and [SUM]s) and the paper's
equation 3, k N / (N + K) with n and k interactions for N and K.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.measure import RESULTS, append_rows
from dti_model.attention import DTIConfig
from dti_model.config import ModelConfig, OptimConfig, TrainConfig
from dti_model.run import Run
from dti_model.throughput import measure_training


def measure(config: TrainConfig, ks: list[int | None], num_steps: int) -> list[dict[str, Any]]:
    """One row per k."""
    run = Run.start(config)
    measured = measure_training(run, ks, num_steps)
    base = measured.get(1)
    window = config.window
    rows = []
    for k, value in measured.items():
        row: dict[str, Any] = {
            "benchmark": "train",
            "data": run.data.stats["source"]["name"],
            "model": f"{config.model.layers} x {config.model.width}",
            "parameters": sum(p.numel() for p in run.model.parameters()),
            "mode": config.dti.mode,
            "k": "all" if k is None else k,
            "targets_per_s": round(value.targets_per_s, 1),
            "tokens_per_s": round(value.rows_per_s),
            "rows_per_target": round(value.rows_per_target, 2),
            "peak_mib": value.peak_mib,
            "equation_3": None if k is None else round(k * window / (window + k), 2),
            "steps": num_steps,
        }
        if base is not None:
            row["speedup"] = round(value.targets_per_s / base.targets_per_s, 2)
            row["rows_ratio"] = round(base.rows_per_target / value.rows_per_target, 2)
            row["speedup_over_rows_ratio"] = round(row["speedup"] / row["rows_ratio"], 2)
        rows.append(row)
    return rows


def main() -> None:
    """Measure, print and append."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder made by `dti prepare`")
    parser.add_argument("--k", nargs="+", default=["1", "5", "10", "20", "30", "50", "100", "200", "all"])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--token-budget", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--mode", default="dti")
    parser.add_argument("--out", type=Path, default=RESULTS / "train-cpu.jsonl")
    options = parser.parse_args()
    config = TrainConfig(
        data=options.data,
        out=Path("unused"),
        dti=DTIConfig(options.mode),
        model=ModelConfig(
            layers=options.layers,
            width=options.width,
            heads=options.heads,
            kv_heads=max(1, options.heads // 2),
            mlp_width=8 * options.width // 3,
            dropout=0.0,
        ),
        optim=OptimConfig(token_budget=options.token_budget),
    )
    ks = [None if k == "all" else int(k) for k in options.k]
    rows = measure(config, ks, options.steps)
    for row in rows:
        print(
            f"k {row['k']!s:>4}  {row['targets_per_s']:9.1f} targets/s  {row['tokens_per_s']:8,} tokens/s  "
            f"{row.get('speedup', 1):6.2f} x (rows {row.get('rows_ratio', 1):.2f} x, equation 3 {row['equation_3']})"
        )
    append_rows(options.out, rows)


if __name__ == "__main__":
    main()
