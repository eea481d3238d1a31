"""FlexAttention at its best: a handful of kernel options and mask blocks, timed once per head_dim, the best kept for every mode.

    python -m benchmarks.flex_tuned --heads llama8b --options NAME      compile one of them, for the caches

Why not `torch.compile(mode="max-autotune-no-cudagraphs")`: it compiles some twenty kernels per head_dim, times them on a made-up mask in
which every block is visible, and cannot choose the blocks of the mask, which decide how much of a window's edge is computed in vain.

Each set of options is a compilation of forward and backward. `warm` makes them in processes of their own, side by side, whose results
wait in Inductor's and Triton's caches.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import Any

from benchmarks.device_time import check_device, device_times, failure
from benchmarks.providers import (
    MODES,
    Call,
    Unavailable,
    by_mode,
    flex_with,
    flex_with_mask_construction,
    settle,
)
from benchmarks.rehearsal import DEVICE, REHEARSING
from benchmarks.workloads import HEADS, AttentionInputs, gpu_workload

NAME = "flex_tuned"
_MASK = "mask"
# Wall-clock seconds for each set of options and mode.
_SHARE = 0.01 if REHEARSING else 0.1


@dataclass(frozen=True)
class Options:
    """One way to run FlexAttention.

    Attributes:
        name: how rows call it.
        block: rows and keys of a block of the mask.
        kernel: `kernel_options` of `flex_attention`.
    """

    name: str
    block: tuple[int, int]
    kernel: dict[str, Any] = field(hash=False)


def _options(
    name: str,
    block: tuple[int, int],
    forward: tuple[int, int, int, int],
    backward: tuple[int, int, int, int],
    **others: Any,
) -> Options:
    """From (rows, keys, warps, stages) of both directions; the backward turns its block around for dQ."""
    rows, keys, warps, stages = forward
    kernel = {"fwd_BLOCK_M": rows, "fwd_BLOCK_N": keys, "fwd_num_warps": warps, "fwd_num_stages": stages}
    rows, keys, warps, stages = backward
    kernel |= {"bwd_BLOCK_M1": rows, "bwd_BLOCK_N1": keys, "bwd_BLOCK_M2": keys, "bwd_BLOCK_N2": rows}
    kernel |= {"bwd_num_warps": warps, "bwd_num_stages": stages}
    # Every row sees itself, so the check for rows that see nothing may go.
    return Options(name, block, {**kernel, "ROWS_GUARANTEED_SAFE": True, "PRESCALE_QK": True, **others})


# PyTorch's own for Hopper are 128 x 64 (head_dim 128) or 128 x 128 (64) forward and 64 x 128 backward, with mask blocks of 128 x 128.
OPTIONS: tuple[Options, ...] = (
    Options("default", (128, 128), {}),
    _options("fine mask", (64, 64), (64, 64, 4, 3), (64, 64, 4, 3)),
    _options("fine keys", (128, 64), (128, 64, 8, 3), (64, 64, 4, 3)),
    _options("long rows", (128, 128), (128, 128, 8, 2), (32, 128, 8, 3)),
    _options("other warps", (128, 128), (128, 64, 4, 3), (64, 128, 8, 2)),
)


def prepare(x: AttentionInputs, options: Options) -> Call:
    """The call under these options."""
    return flex_with(x, options.kernel, options.block)


def tune(x: AttentionInputs, seconds: float) -> tuple[dict[str, Options], list[dict[str, Any]]]:
    """The best options for each of `MODES`, and a row for every set that was tried.

    Args:
        x: inputs to time with.
        seconds: after which no further set is compiled.

    Raises:
        Unavailable: none of them runs.
    """
    deadline = time.monotonic() + seconds
    calls, rows = {}, {}
    for options in OPTIONS[:2] if REHEARSING else OPTIONS:
        rows[options] = {"benchmark": "flex_options", "options": options.name, "block": list(options.block)}
        rows[options]["kernel_options"] = options.kernel
        if calls and time.monotonic() > deadline:
            rows[options]["failed"] = "left out: time is up"
            continue
        try:
            modes = by_mode(prepare(x, options), x)
            for call in modes.values():
                settle(call)
            calls[options] = modes
        except Exception as error:  # a compiler's refusal is a result
            check_device(error)
            rows[options]["failed"] = failure(error)
    best = {}
    for mode in MODES:
        timings = device_times({options: modes[mode] for options, modes in calls.items()}, _SHARE)
        timed = {options: timing.row() for options, timing in timings.items()}
        for options, row in timed.items():
            rows[options][mode] = row
        p50 = {options: row["p50_ms"] for options, row in timed.items() if "p50_ms" in row}
        if not p50:
            raise Unavailable(
                f"no options of FlexAttention run: {[row.get('failed') for row in rows.values()]}"
            )
        best[mode] = min(p50, key=lambda options: p50[options])
    return best, list(rows.values())


def warm(seconds: float) -> float:
    """Compile all options for all heads in processes of their own, at most for these seconds; returns those it took."""
    start = time.monotonic()
    names = [options.name for options in OPTIONS] + [_MASK]
    heads = list(HEADS)
    if REHEARSING:
        names, heads = names[1:2], heads[:1]
    environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1"}  # the processes are the threads
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.flex_tuned", "--heads", head, "--options", name],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for head in heads
        for name in names
    ]
    for process in processes:
        try:
            process.wait(max(0.0, start + seconds - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return time.monotonic() - start


def main() -> None:
    """Compile one set of options by running it once in every mode."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--heads", choices=HEADS, required=True)
    parser.add_argument("--options", choices=[*(options.name for options in OPTIONS), _MASK], required=True)
    given = parser.parse_args()
    x = AttentionInputs.of(gpu_workload("warm", given.heads, 16384, 50), DEVICE)
    if given.options == _MASK:
        flex_with_mask_construction(x)(x)
        return
    (options,) = (options for options in OPTIONS if options.name == given.options)
    for call in by_mode(prepare(x, options), x).values():
        call()


if __name__ == "__main__":
    main()
