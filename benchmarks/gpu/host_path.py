"""The host's time for a call of `windowed_attn` on a GPU, measured without one: checks, dispatch, memory and launches up to the driver's door.

    python -m benchmarks.gpu.host_path [--arch sm_90] [--profile]

Prints microseconds of the processor per call, at the size of `benchmarks.gpu.host`: for a call whose like has run before, and for one that is
the first of its kind, as the first layer's of a new batch is. What the driver does, and an allocator for a device, comes on top.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from benchmarks.attention import AttentionInputs, by_mode, windowed
from benchmarks.gpu.host import TINY
from benchmarks.measuring import launches_at_the_door
from dti_kernels import gpu

_CALLS, _BATCHES = 50, 20


def call_us(call: Callable[[], Any], first: bool) -> tuple[float, float]:
    """P10 and P50 of the processor's microseconds per call. `first`: each is the first of its kind."""
    found = []
    for _ in range(_BATCHES + 1):
        start = time.process_time()
        for _ in range(_CALLS):
            if first:
                gpu.forget_plans()
            call()
        found.append(1e6 * (time.process_time() - start) / _CALLS)
    return float(np.percentile(found[1:], 10)), float(np.percentile(found[1:], 50))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", choices=gpu.TABLE, default="sm_90", help="whose launches")
    parser.add_argument("--profile", action="store_true", help="print where the time goes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with launches_at_the_door(options.arch) as door:
        for reset in (False, True):
            x = AttentionInputs.of(replace(TINY, reset=reset), "cpu")
            calls = by_mode(windowed(x), x)
            for mode in ("forward", "forward+backward"):
                door.launched.clear()
                door.listening = True
                calls[mode]()
                door.listening = False
                row: dict[str, Any] = {"mode": mode, "reset": reset, "launches": len(door.launched)}
                for kind, first in (("again", False), ("first of its kind", True)):
                    p10, p50 = call_us(calls[mode], first)
                    print(row | {"call": kind, "p10_us": round(p10, 1), "p50_us": round(p50, 1)}, flush=True)
                if options.profile:
                    profile = cProfile.Profile()
                    profile.runcall(call_us, calls[mode], first=False)
                    pstats.Stats(profile).sort_stats("tottime").print_stats(30)


if __name__ == "__main__":
    main()
