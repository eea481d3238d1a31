"""Time candidate tiles of every kernel on this GPU and print rows for `dti_kernels/tiles.py`.

    python -m benchmarks.tune_tiles [--heads llama8b] [--k 50] [--seconds 60] [--out ROWS.jsonl] [--record]

Each candidate runs a kernel by itself, exactly as the operator launches it. The table's own tile comes first; a candidate that the
device has no room for is skipped. Read the result beside `benchmarks.compile_report`: a tile that spills may win here and lose on
another shape.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.attention_gpu import HEADS, device_ms
from benchmarks.measure import parse_measuring, percentiles_ms
from benchmarks.workloads import AttentionInputs, Workload
from dti_kernels import tiles, triton_bwd, triton_fwd
from dti_kernels.tiles import KERNELS, Tile, choose_tile
from dti_kernels.triton_tile import Batch, Launch

# (rows, keys, warps, stages); the likely ones first, since time may run out.
CANDIDATES: dict[str, list[tuple[int, int, int, int]]] = {
    "ctx_fwd": [
        (128, 64, 8, 3), (128, 128, 8, 2), (128, 128, 8, 3), (64, 64, 4, 3), (128, 64, 4, 3), (128, 64, 8, 4),
        (64, 128, 4, 2), (128, 32, 8, 3), (64, 64, 4, 2), (64, 32, 4, 3), (128, 128, 4, 3),
    ],
    "ctx_dq": [
        (128, 64, 8, 2), (64, 64, 8, 2), (64, 64, 4, 2), (128, 64, 8, 3), (64, 64, 4, 3), (128, 128, 8, 2), (64, 32, 4, 2),
    ],
    "ctx_dkv": [
        (64, 64, 8, 2), (64, 128, 8, 2), (64, 64, 4, 2), (32, 128, 8, 2), (64, 64, 8, 3), (32, 128, 8, 3), (32, 64, 4, 2),
        (128, 64, 8, 2),
    ],
    "sum_fwd": [(32, 64, 4, 2), (32, 32, 4, 2), (16, 64, 4, 2), (64, 64, 4, 2)],
    "sum_dq": [(32, 32, 4, 2), (32, 64, 4, 2), (16, 64, 4, 2)],
    "sum_dkv": [(32, 32, 4, 2), (32, 64, 8, 2), (16, 32, 4, 2)],
}  # fmt: skip
# Heads of a group that share a tile: the whole group, or one head.
PACKS = (16, 1)


def launches(x: AttentionInputs) -> dict[str, Launch]:
    """All launches of forward and backward with the tiles now in force, by kernel. Buffers hold anything: only time is asked."""
    reset = x.reset
    ratios = None if reset is None else reset.ratios(x.layout.window, torch.float32, x.q.device)
    batch = Batch.of(
        *(z.detach() for z in (x.q, x.k, x.v, x.k_sum)),
        None if reset is None else reset.k_initial.detach(),
        None if reset is None else reset.v_initial.detach(),
        ratios,
        x.alibi_slopes,
        x.layout.rows,
        x.layout.keys,
        x.q.shape[-1] ** -0.5,
        x.layout.mean_span,
    )
    out = torch.empty_like(batch.q)
    lse = torch.empty(batch.q.shape[1], batch.num_rows, device=out.device)
    all_launches = triton_fwd.forward_launches(batch, out, lse)
    grads = triton_bwd.Gradients.of(batch)
    all_launches += triton_bwd.backward_launches(batch, grads, x.grad_out, out, lse)
    return {launch.kernel.fn.__name__.removesuffix("_kernel"): launch for launch in all_launches}


def candidates(kernel: str, x: AttentionInputs) -> Iterator[Tile]:
    """The table's tile, then the others, each once."""
    seen = [choose_tile(kernel, x.q.device, x.q.shape[2], x.q.dtype, x.layout.mean_span)]
    yield seen[0]
    for pack in PACKS:
        for candidate in CANDIDATES[kernel]:
            tile = Tile(*candidate, pack=pack)
            if tile not in seen:
                seen.append(tile)
                yield tile


def tune(kernel: str, x: AttentionInputs, deadline: float) -> list[dict[str, Any]]:
    """Rows of one kernel: every candidate that fits, in the order tried."""
    rows = []
    for tile in candidates(kernel, x):
        if rows and time.monotonic() > deadline:
            break
        with tiles.forced({kernel: tile}):
            launch = launches(x)[kernel]
        row: dict[str, Any] = {"benchmark": "tiles", "kernel": kernel, "tile": repr(tile)}
        try:
            launch.run()
            torch.cuda.synchronize()
            row |= percentiles_ms(device_ms({kernel: launch.run}, 12)[kernel])
        except Exception as error:  # out of resources, or a compiler's refusal: the others still count
            row["failed"] = f"{type(error).__name__}: {error}"[:200]
        rows.append(row)
    return rows


def main() -> None:
    """Tune and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--heads", choices=HEADS, nargs="+", default=list(HEADS))
    parser.add_argument("--k", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--seconds", type=float, default=600.0)
    options = parse_measuring(parser, "tiles")
    share = options.seconds / (len(options.heads) * len(KERNELS))
    for heads in options.heads:
        workload = Workload(
            f"{heads}_k{options.k}",
            options.tokens,
            options.k,
            *HEADS[heads],
            reset=True,
            dtype=torch.bfloat16,
        )
        x = AttentionInputs.of(workload, "cuda")
        best = []
        for kernel in KERNELS:
            rows = [{**row, "workload": workload.name} for row in tune(kernel, x, time.monotonic() + share)]
            for row in rows:
                print(row, flush=True)
            options.rows.append(rows)
            timed = [row for row in rows if "p50_ms" in row]
            best.append(min(timed, key=lambda row: row["p50_ms"])["tile"] if timed else "none fits")
        print(f"best for {workload.name}, in the order of KERNELS:")
        print(*best, sep="\n", flush=True)
    print(f"rows: {options.rows}")


if __name__ == "__main__":
    main()
