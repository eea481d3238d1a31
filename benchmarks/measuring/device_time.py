"""Times of a GPU without those of its host: work is queued behind a pause of the device, between two events.

A call counts as measured when its last launch was queued before the device had reached the first event. Otherwise the host may be in the
time, so the call is repeated behind a longer pause. `host_ahead` is the share of the kept repeats that hold.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeVar

import numpy as np
import torch

from benchmarks.measuring.rehearsal import DEVICE
from benchmarks.recording import REHEARSING

Name = TypeVar("Name")
# Cycles of the first pause, about a millisecond, and of the longest: what is not queued by then waits for the device itself.
PAUSE, LONGEST_PAUSE = (1, 2) if REHEARSING else (2_000_000, 64_000_000)
# Every function gets this many repeats, however slow it is; a short one gets up to the second number while its time lasts.
LEAST_REPEATS, MOST_REPEATS = (1, 2) if REHEARSING else (5, 40)
# Larger than the last cache of any card, so that no call finds its inputs there.
_FLUSHED_NUMBERS = 1 << 10 if REHEARSING else 64 << 20


class DeviceLost(RuntimeError):
    """The device answers nothing any more."""


@dataclass
class Timing:
    """Measurements of one function."""

    ms: list[float] = field(default_factory=list)  # device time of each repeat, milliseconds
    # of each repeat, whether the host was ahead of the device
    ahead: list[bool] = field(default_factory=list)
    failed: str | None = None  # what the function raised, which ended its measuring; None: nothing
    _pause: int = PAUSE
    _spent: float = 0.0

    def row(self) -> dict[str, Any]:
        """P10, P50 and P90 of the milliseconds, the number of repeats and `host_ahead`; or `failed`."""
        if self.failed is not None or not self.ms:
            return {"failed": self.failed or "no repeat"}
        percentiles = {f"p{p}_ms": round(float(np.percentile(self.ms, p)), 4) for p in (10, 50, 90)}
        return {**percentiles, "repeats": len(self.ms), "host_ahead": round(float(np.mean(self.ahead)), 2)}


@cache
def _flushed() -> torch.Tensor:
    return torch.empty(_FLUSHED_NUMBERS, dtype=torch.int32, device=DEVICE)


def device_times(
    functions: Mapping[Name, Callable[[], Any]], seconds: float, most_repeats: int = MOST_REPEATS
) -> dict[Name, Timing]:
    """Device times of every function, run by turns so that a slow moment of the card hits all of them.

    Args:
        functions: what to time, by name; inputs are made and compilers are settled before.
        seconds: share of wall-clock time for each function. Beyond it, it gets no more than `LEAST_REPEATS`.
        most_repeats: of one function.

    Returns:
        A `Timing` per name. A function that raises is left out of the following turns.
    """
    timings = {name: Timing() for name in functions}
    for turn in range(most_repeats):
        wanted = [
            name
            for name, timing in timings.items()
            if timing.failed is None and (turn < LEAST_REPEATS or timing._spent < seconds)
        ]
        if not wanted:
            break
        for name in wanted:
            start = time.monotonic()
            try:
                _repeat(functions[name], timings[name])
            except Exception as error:  # one function's failure is a result of it, not the end of the others
                timings[name].failed = failure(error)
            timings[name]._spent += time.monotonic() - start
    return timings


def _repeat(function: Callable[[], Any], timing: Timing) -> None:
    """One repeat, behind longer and longer pauses until the host is ahead."""
    while True:
        _flushed().zero_()
        torch.cuda._sleep(timing._pause)
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        stop.record()
        ahead = not start.query()
        torch.cuda.synchronize()
        # A call that waits for the device can never be queued ahead of it: after the longest pause it is taken as it is.
        if ahead or timing._pause >= LONGEST_PAUSE:
            timing.ms.append(start.elapsed_time(stop))
            timing.ahead.append(ahead)
            return
        timing._pause = min(4 * timing._pause, LONGEST_PAUSE)


def failure(error: BaseException) -> str:
    """One line of an exception for a row: its type and the beginning of its message."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]


def check_device(error: BaseException) -> None:
    """Raise DeviceLost where the device no longer answers: after an illegal access every later row would be a failure of it."""
    try:
        torch.cuda.synchronize()
    except RuntimeError as lost:
        raise DeviceLost(f"the device is lost after {failure(error)}") from lost
