"""Measuring: providers interleaved in one process, percentiles, and rows with everything needed to read them later."""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

Name = TypeVar("Name")
RESULTS = Path(__file__).parent / "results"


def parse_sized(parser: argparse.ArgumentParser, smoke: Mapping[str, Any]) -> argparse.Namespace:
    """Arguments of a benchmark that has `--size full` and `--size smoke`.

    Args:
        parser: of everything else.
        smoke: defaults of the smoke size: seconds instead of minutes. It shows that everything runs, and no speed, so its rows go under
            runs/smoke/ unless `--out` says otherwise.
    """
    parser.add_argument(
        "--size", choices=("full", "smoke"), default="full", help="smoke: does it run? No timing claim"
    )
    if parser.parse_known_args()[0].size == "smoke":
        parser.set_defaults(out=Path("runs/smoke") / f"{Path(parser.prog).stem}.jsonl", **smoke)
    return parser.parse_args()


def interleaved_ms(
    functions: Mapping[Name, Callable[[], Any]], repeats: int, warmup: int = 1, device: str = "cpu"
) -> dict[Name, np.ndarray]:
    """Milliseconds of every function, run by turns so that a slow moment of the machine hits all of them.

    Args:
        functions: what to time, by name; inputs are made before.
        repeats: timed rounds.
        warmup: rounds that are not counted.
        device: "cpu", or a CUDA device that is waited for before and after each call.

    Returns:
        `(repeats,)` float64 per name.
    """
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    times: dict[Name, list[float]] = {name: [] for name in functions}
    for round_ in range(warmup + repeats):
        for name, function in functions.items():
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


@cache
def provenance() -> dict[str, Any]:
    """Date, commit, machine and versions of this process."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": commit.stdout.strip() or None,
        "machine": gpu or f"{_cpu_name()}, {torch.get_num_threads()} threads",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def append_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Append JSON lines, each with the provenance of this process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        for row in rows:
            file.write(json.dumps({**provenance(), **row}) + "\n")
