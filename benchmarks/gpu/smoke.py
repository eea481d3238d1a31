"""Does the operator work on this GPU at all? Three cases with the heads of real models in bfloat16, output and every gradient.

    python -m benchmarks.gpu.smoke [--out ROWS.jsonl]

Each tensor is held to the dense reference in float64 by the one tolerance rule (`dti_kernels.testing`), and the share of its budget is
printed. It takes seconds, so it comes first. A case that raises, gives a number that is not finite or goes far beyond its budget
fails and nothing else needs to be measured. A little beyond is for a person to judge: the status is `DOUBTFUL`, and all else is measured.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from benchmarks.attention import MOST_SHARE, AttentionInputs, Workload, budget_shares, gpu_workload
from benchmarks.measuring import DEVICE, REHEARSING
from benchmarks.recording import DOUBTFUL, failure, make_parser, parse_measuring
from dti_kernels import windowed_attn


def workloads() -> tuple[Workload, ...]:
    """Long spans with a reset, short spans with groups of three, and sliding windows without a reset."""
    # A thousand rows: the reference in float64 then fits on small cards too.
    real = (
        gpu_workload("smoke_llama8b_k50", "llama8b", 1024, 50, reset=True),
        gpu_workload("smoke_smollm_k50", "smollm", 1024, 50, reset=True, tokens=(15.0, 8.0)),
        gpu_workload("smoke_llama8b_k1", "llama8b", 1024, 1),
    )
    small = (replace(workload, num_tokens=60, head_dim=16) for workload in real)
    return tuple(small) if REHEARSING else real


def inputs(workload: Workload) -> AttentionInputs:
    """Of a workload, with a gradient of the slopes too."""
    x = AttentionInputs.of(workload, DEVICE)
    return replace(x, alibi_slopes=x.alibi_slopes.requires_grad_())


def check(workload: Workload) -> dict[str, Any]:
    """The row of one workload: by tensor, the share of its error budget; seconds of the first call and of the second."""
    x = inputs(workload)
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        actual = x.run(windowed_attn)
        torch.cuda.synchronize()
        seconds.append(round(time.perf_counter() - start, 3))
    found = budget_shares(x, actual)
    return {
        "shares": {name: round(share, 3) for name, share in found.items()},
        "within_budget": all(share <= 1 for share in found.values()),
        "first_call_s": seconds[0],
        "second_call_s": seconds[1],
    }


def verdict(row: Mapping[str, Any]) -> int:
    """The exit status that a row alone would give: 0, `DOUBTFUL`, or 1. A share that is no number is never small enough."""
    if "failed" in row or not all(share <= MOST_SHARE for share in row["shares"].values()):
        return 1
    return 0 if row["within_budget"] else DOUBTFUL


def main() -> None:
    """Check all, print and keep the rows; exit with 1 if one raises or is far beyond its budget, `DOUBTFUL` if one is a little."""
    parser = make_parser(__doc__)
    options = parse_measuring(parser, "smoke-gpu")
    said: dict[int, list[str]] = {1: [], DOUBTFUL: []}
    for workload in workloads():
        row: dict[str, Any] = {"benchmark": "smoke", "workload": workload.name}
        try:
            row |= check(workload)
        except Exception as error:  # the other cases say how far it goes
            traceback.print_exc()
            row["failed"] = failure(error)
        options.rows.append([row])
        print(row, flush=True)
        if status := verdict(row):
            worst = {name: share for name, share in row.get("shares", {}).items() if not share <= 1}
            said[status].append(row.get("failed") or f"{workload.name}, error / budget {worst}")
    for status, beginning in ((1, "AssertionError: "), (DOUBTFUL, "a little beyond the budget: ")):
        if said[status]:
            print(f"{beginning}{len(said[status])} of {len(workloads())} cases; the first: {said[status][0]}")
            sys.exit(status)


if __name__ == "__main__":
    main()
