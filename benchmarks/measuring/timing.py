"""Times of the host, by turns in one process, and their percentiles for rows and tables."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
import torch

Name = TypeVar("Name")
# Of fewer repeats, the 99th percentile is about the slowest of them.
P99_REPEATS = 100


def interleaved_ms(
    functions: Mapping[Name, Callable[[], Any]],
    repeats: int,
    warmup: int = 1,
    device: str = "cpu",
    seconds: float = math.inf,
    least: int = 1,
) -> dict[Name, np.ndarray]:
    """Milliseconds of every function, run by turns so that a slow moment of the machine hits all of them.

    Args:
        functions: what to time, by name; inputs are made before.
        repeats: timed rounds.
        warmup: rounds that are not counted.
        device: "cpu", or a CUDA device that is waited for before and after each call.
        seconds: after so many of its own, timed ones, a function gets no more turns
        least: unless it has had fewer than so many.

    Returns:
        `(repeats,)` float64 per name, or fewer where time was up.
    """
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    times: dict[Name, list[float]] = {name: [] for name in functions}
    for round_ in range(warmup + repeats):
        for name, function in functions.items():
            if len(times[name]) >= least and sum(times[name]) >= 1e3 * seconds:
                continue
            wait()
            start = time.perf_counter()
            function()
            wait()
            if round_ >= warmup:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: np.asarray(values) for name, values in times.items()}


def percentiles_ms(times: np.ndarray) -> dict[str, float]:
    """p20, p50 and p80, rounded to microseconds."""
    return {f"p{p}_ms": round(float(np.percentile(times, p)), 3) for p in (20, 50, 80)}


def slowest_ms(times: np.ndarray) -> dict[str, float]:
    """`p99_ms` where there are repeats enough for one, else `max_ms`, rounded to microseconds."""
    if len(times) < P99_REPEATS:
        return {"max_ms": round(float(times.max()), 3)}
    return {"p99_ms": round(float(np.percentile(times, 99)), 3)}


def median_and_p99(row: Mapping[str, Any], digits: int) -> str:
    """Of a row, for a table: "p50 / p99", without what is called p99 of too few repeats."""
    said = f"{row['p50_ms']:.{digits}f}"
    if "p99_ms" in row and row["repeats"] >= P99_REPEATS:
        said += f" / {row['p99_ms']:.{digits}f}"
    return said
