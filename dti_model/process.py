"""Settings of a process that computes on CPUs: threads that sleep soon, and memory that is kept."""

from __future__ import annotations

import ctypes
import os

# From malloc.h of the GNU C library, where 32 MiB is the most that the first may be.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MMAP_THRESHOLD_BYTES, _NEVER = 32 * 2**20, 2**31 - 1


def set_up_process() -> None:
    """Call it before PyTorch is loaded, which reads these settings. The environment's own settings stay.

    Threads that wait at barriers sleep after 1,000 turns: beside another busy process, spinning made steps 3 to 40 times slower, and
    the turns (some 10 microseconds) spare most of the waking. Freed memory of up to 32 MiB a block is kept: returning it to the
    system after every operator cost 6 to 9 % of a training step (benchmarks/LOG.md).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    if not {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"} & os.environ.keys():
        _keep_freed_memory()


def _keep_freed_memory() -> None:
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return
    mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_BYTES)
    mallopt(_M_TRIM_THRESHOLD, _NEVER)
