"""A GPU that is not there: the benchmarks' code for a GPU runs on a CPU at toy size, so that no Python error waits for the real one.

With `DTI_REHEARSE=1` in the environment, `DEVICE` is "cpu" and the functions of `torch.cuda` that the benchmarks call answer for an
imaginary card. Everything else is the code that runs on a GPU, line by line. Numbers of a rehearsal mean nothing and are never recorded.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from benchmarks.recording import REHEARSING

DEVICE = "cpu" if REHEARSING else "cuda"
# The compute capability that the imaginary card claims: tiles are those of its architecture.
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


# Streams and graphs on which everything has already happened, and calls that do nothing.
_nothing = mock.MagicMock(return_value=None)


def _zero(*_: Any, **__: Any) -> int:
    return 0


_STAND_INS: dict[str, Any] = {
    "Event": _Event,
    "is_available": lambda: False,  # training takes the CPU
    "synchronize": _nothing,
    "empty_cache": _nothing,
    "reset_peak_memory_stats": _nothing,
    "set_sync_debug_mode": _nothing,
    "_sleep": _nothing,
    "memory_allocated": _zero,
    "max_memory_allocated": _zero,
    "memory_stats": lambda *_: {"requested_bytes.all.current": 0, "requested_bytes.all.peak": 0},
    "current_device": _zero,
    "Stream": mock.MagicMock,
    "current_stream": mock.MagicMock(),
    "stream": lambda *_: nullcontext(),
    "CUDAGraph": mock.MagicMock,
    "graph": lambda *_, **__: nullcontext(),
    "get_device_name": lambda *_: "rehearsal (no GPU)",
    "get_device_capability": lambda *_: CAPABILITY,
    "get_device_properties": lambda *_: SimpleNamespace(
        name="rehearsal (no GPU)", total_memory=80 << 30, multi_processor_count=132, gcnArchName=""
    ),
}


if REHEARSING:
    for _name, _stand_in in _STAND_INS.items():
        setattr(torch.cuda, _name, _stand_in)
    torch.cuda.profiler.start = torch.cuda.profiler.stop = _nothing
