"""Rows of attention on a GPU: what they say of a time, which of them a file has already, and how they are printed.

Rows of ours are of two kinds. `alone` ones come first, so that a run which ends early has them; no ratio is made of them. `beside` ones
name the baseline that ours took turns with, whose row has `ours_p50_ms` of the same turns.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.attention.providers import BF16, DENSE, MODES, OURS
from benchmarks.attention.tiles import numbers_of, visited_pairs
from benchmarks.attention.workloads import AttentionInputs, useful_flops
from benchmarks.recording import provenance, row_lines
from dti_kernels.gpu import KERNELS, choose_tile

# Matmuls of head_dim x pairs that each kernel computes, masked or not: forward 2, dQ 3, dK/dV 4.
_MATMULS = {"ctx_fwd": 2, "sum_fwd": 2, "ctx_dq": 3, "sum_dq": 3, "ctx_dkv": 4, "sum_dkv": 4}
# Useful FLOPs and bytes of q, k, v, out (and of their gradients), by what the forward has of them.
_FLOPS_OF = {"forward": 1.0, "backward": 2.5, "forward+backward": 3.5}
_BYTES_OF = {"forward": 1, "backward": 2, "forward+backward": 3}
# Rows are measured with the same code on the same card where these fields agree.
_SAME = ("machine", "commit", "table", "tiles_sha256")


def about_tiles() -> dict[str, Any]:
    """Fields of the tiles in force: the frozen table, or a tuner's winners and the hash of their file, whose content may change."""
    path = os.environ.get("DTI_TILES")
    if not path:
        return {"table": "frozen", "tiles_sha256": None}
    file = Path(path)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:16] if file.exists() else "missing"
    return {"table": "DTI_TILES", "tiles_sha256": digest}


def measured(paths: Iterable[Path]) -> set[tuple[str, str]]:
    """Keys of the rows that files have already of this card, commit and tile file: workload and provider, and `("check", name)`.

    A failure of ours is measured again. One of a baseline is not: it would fail again, and may take the device with it.
    """
    wanted = {**provenance(), **about_tiles()}
    modes: dict[tuple[str, str], set[str]] = {}
    for path in paths:
        for row in map(json.loads, row_lines(path)[0]):
            if row.get("benchmark") != "attention" or any(row.get(name) != wanted[name] for name in _SAME):
                continue
            if "provider" not in row or (row["provider"] == OURS and ("failed" in row or "beside" in row)):
                continue
            key = ("check", row["check"]) if "check" in row else (row["workload"], row["provider"])
            modes.setdefault(key, set()).update([row["mode"]] if "mode" in row else MODES)
    return {key for key, found in modes.items() if found.issuperset(MODES)}


def have_rows(paths: Iterable[Path], benchmark: str) -> bool:
    """Whether files have rows of a benchmark already."""
    return any(
        json.loads(line).get("benchmark") == benchmark for path in paths for line in row_lines(path)[0]
    )


def tiles_in_force(x: AttentionInputs, mode: str) -> dict[str, list[int]]:
    """The tiles of the kernels that a mode launches, as the tuner writes them."""
    about = x.q.device, x.q.shape[2], x.q.dtype, x.layout.mean_span
    return {kernel: numbers_of(choose_tile(kernel, *about)) for kernel in KERNELS if _launches(kernel, mode)}


def _launches(kernel: str, mode: str) -> bool:
    return mode == "forward+backward" or kernel.endswith("fwd") == (mode == "forward")


def computed_flops(x: AttentionInputs, mode: str) -> int:
    """Operations of our kernels, masked parts of the visited tiles included."""
    num_heads, head_dim = x.q.shape[1:]
    group = num_heads // x.k.shape[1]
    layout = x.layout.to("cpu")
    total = 0
    for kernel, matmuls in _MATMULS.items():
        if _launches(kernel, mode):
            tile = choose_tile(kernel, x.q.device, head_dim, x.q.dtype, x.layout.mean_span)
            streams = 2 if x.reset is not None and kernel.startswith("sum") else 1
            total += 2 * matmuls * streams * num_heads * head_dim * visited_pairs(layout, kernel, tile, group)
    return total


def _useful(x: AttentionInputs, mode: str) -> float:
    num_heads, head_dim = x.q.shape[1:]
    return useful_flops(x.layout, num_heads, head_dim, backward=False) * _FLOPS_OF[mode]


def flops_per_byte(x: AttentionInputs, mode: str) -> float:
    """Useful FLOPs over the bytes of q, k, v and out, and of their gradients, each moved once."""
    num_bytes = 2 * (x.q.numel() + x.k.numel()) * x.q.element_size() * _BYTES_OF[mode]
    return round(_useful(x, mode) / num_bytes, 1)


def speeds(name: str, x: AttentionInputs, mode: str, p50_ms: float) -> dict[str, Any]:
    """Throughput that a time means, and the tiles of ours."""
    row = {"useful_tflops": _tflops(_useful(x, mode), p50_ms), "flops_per_byte": flops_per_byte(x, mode)}
    if name != OURS:
        return row
    return {
        **row,
        "computed_tflops": _tflops(computed_flops(x, mode), p50_ms),
        "tiles": tiles_in_force(x, mode),
    }


def _tflops(flops: float, ms: float) -> float:
    return round(flops / max(ms, 1e-6) / 1e9, 1)


def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The CPU claims, forward and backward, from rows of one run: speed over others at the short length, and growth of time to the long one.

    Those of bfloat16 are there where rows are: its speed over our own float32, and over SDPA in each precision.
    """
    p50 = {(r["workload"], r["provider"]): r["p50_ms"] for r in rows if r["mode"] == "forward+backward"}
    short, long = dict.fromkeys(row["workload"] for row in rows)
    compared = {
        "speedup_over_sdpa_dense_mask": (short, DENSE, short, OURS),
        "growth": (long, OURS, short, OURS),
        "bf16_over_fp32": (short, OURS, short, OURS + BF16),
        "bf16_over_sdpa_dense_mask_fp32": (short, DENSE, short, OURS + BF16),
        "bf16_over_sdpa_dense_mask_bf16": (short, DENSE + BF16, short, OURS + BF16),
        "bf16_growth": (long, OURS + BF16, short, OURS + BF16),
    }
    return {
        name: p50[workload, provider] / p50[of, over]
        for name, (workload, provider, of, over) in compared.items()
        if {(workload, provider), (of, over)} <= p50.keys()
    }


def printed(row: dict[str, Any]) -> str:
    """A row for the eyes."""
    if "failed" in row:
        names = row.get("provider") or ", ".join(row.get("left_out", ()))
        return f"{row['workload']:24} {names:28} {row.get('mode', '')} failed: {row['failed'][:120]}"
    if row.get("check") == "parity":
        return f"!!! {row['workload']}: error above its budget, measured all the same: {row['shares']}"
    if "check" in row:
        return f"{row['workload']:24} {row['check']}: {row.get('equal', row.get('peak_mib'))}"
    said = (
        f"{row['workload']:24} {row['provider']:28} {row['mode']:17} p50 {row['p50_ms']:9.3f} ms  "
        f"{row['useful_tflops']:6.1f} useful TFLOP/s"
    )
    if "ours_p50_ms" in row:
        said += f"  {row['p50_ms'] / max(row['ours_p50_ms'], 1e-6):5.2f} times ours"
    return said
