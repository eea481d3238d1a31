"""A GPU that is not there: the benchmarks' code for a GPU runs on a CPU at toy size, so that no Python error waits for the real one.

With `DTI_REHEARSE=1` in the environment, `DEVICE` is "cpu" and the functions of `torch.cuda` that the benchmarks call answer for an
imaginary card. Everything else is the code that runs on a GPU, line by line. Numbers of a rehearsal mean nothing and are never recorded.
"""

from __future__ import annotations

import os
import time
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch

REHEARSING = os.environ.get("DTI_REHEARSE") == "1"
DEVICE = "cpu" if REHEARSING else "cuda"
# What the imaginary card says it is: tiles are those of its architecture.
CAPABILITY = (9, 0)


class _Event:
    """A `torch.cuda.Event` on the host's clock."""

    def __init__(self, enable_timing: bool = False, **_: Any) -> None:
        self._time = 0.0

    def record(self, *_: Any) -> None:
        self._time = time.perf_counter()

    def elapsed_time(self, other: _Event) -> float:
        return 1e3 * (other._time - self._time)

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


class _Stream:
    """A `torch.cuda.Stream` that everything has already happened on."""

    def wait_stream(self, *_: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass


class _Graph:
    """A `torch.cuda.CUDAGraph`: what was captured has been computed, and a replay would give it again."""

    def replay(self) -> None:
        pass


def _nothing(*_: Any, **__: Any) -> None:
    pass


def _zero(*_: Any, **__: Any) -> int:
    return 0


def _memory_stats(*_: Any) -> dict[str, int]:
    return {"requested_bytes.all.current": 0, "requested_bytes.all.peak": 0}


_STAND_INS: dict[str, Any] = {
    "Event": _Event,
    "synchronize": _nothing,
    "empty_cache": _nothing,
    "reset_peak_memory_stats": _nothing,
    "set_sync_debug_mode": _nothing,
    "_sleep": _nothing,
    "memory_allocated": _zero,
    "max_memory_allocated": _zero,
    "memory_stats": _memory_stats,
    "current_device": _zero,
    "Stream": _Stream,
    "current_stream": lambda *_: _Stream(),
    "stream": lambda *_: nullcontext(),
    "CUDAGraph": _Graph,
    "graph": lambda *_, **__: nullcontext(),
    "get_device_name": lambda *_: "rehearsal (no GPU)",
    "get_device_capability": lambda *_: CAPABILITY,
    "get_device_properties": lambda *_: SimpleNamespace(
        name="rehearsal (no GPU)", total_memory=80 << 30, multi_processor_count=132, gcnArchName=""
    ),
}


def _start() -> None:
    for name, stand_in in _STAND_INS.items():
        setattr(torch.cuda, name, stand_in)
    torch.cuda.profiler.start = torch.cuda.profiler.stop = _nothing


if REHEARSING:
    _start()
