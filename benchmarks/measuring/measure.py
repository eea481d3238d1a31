"""Measuring: providers interleaved in one process, percentiles, and rows with everything needed to read them later.

Where rows go is decided here, for every benchmark: to a scratch folder that git ignores, and with `--record` to results/ as well.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from benchmarks.measuring.rehearsal import REHEARSING

Name = TypeVar("Name")
RESULTS = Path(__file__).parents[1] / "results"
# In the working folder; git ignores it. A measurement that nobody asked to keep changes no file of the project.
SCRATCH = Path("runs/benchmarks")
UNKNOWN_COMMIT = "unknown"
# Of fewer repeats, the 99th percentile is about the slowest of them.
P99_REPEATS = 100
# What `failed` of a row says where nothing failed but the time.
TIME_IS_UP = "left out: time is up"


@dataclass(frozen=True)
class RowFiles:
    """The files that a benchmark appends its rows to."""

    paths: tuple[Path, ...]

    def append(self, rows: list[dict[str, Any]]) -> None:
        """Append JSON lines, each with the provenance of this process."""
        for path in self.paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.write("".join(json.dumps({**provenance(), **row}) + "\n" for row in rows))

    def __str__(self) -> str:
        return " and ".join(map(str, self.paths))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a file of JSON lines, as they were appended; none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def parse_measuring(
    parser: argparse.ArgumentParser, name: str, smoke: Mapping[str, Any] | None = None
) -> argparse.Namespace:
    """Arguments of a benchmark that writes rows: the parser's own, `--out`, `--record`, and `--size` where there is a smoke size.

    Args:
        parser: of everything else.
        name: of the file of rows; `{device}` stands for that option's value.
        smoke: defaults of the smoke size: seconds instead of minutes. It shows that everything runs, and no speed, so it is never
            recorded.

    Returns:
        The options; `rows` is the `RowFiles` to append to.
    """
    parser.add_argument("--out", type=Path, help=f"file of rows; default: {SCRATCH / name}.jsonl")
    add_record(parser)
    folder = SCRATCH
    if smoke is not None:
        parser.add_argument(
            "--size", choices=("full", "smoke"), default="full", help="smoke: does it run? No timing claim"
        )
        if parser.parse_known_args()[0].size == "smoke":
            parser.set_defaults(**smoke)
            folder = SCRATCH / "smoke"
    options = parser.parse_args()
    if folder != SCRATCH and options.record:
        parser.error("--record keeps measurements, and --size smoke makes none: leave one of them out")
    file = name.format_map(vars(options)) + ".jsonl"
    options.rows = RowFiles((options.out or folder / file, *([RESULTS / file] if options.record else [])))
    return options


def add_record(parser: argparse.ArgumentParser) -> None:
    """The option without which no benchmark changes benchmarks/results/."""
    parser.add_argument(
        "--record",
        action="store_true",
        help="also put the rows into benchmarks/results/, which is tracked and which README.md is made from",
    )


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


@cache
def provenance() -> dict[str, Any]:
    """Date, commit, machine and versions of this process; a rehearsal names the imaginary card, so that nobody records it."""
    gpu = torch.cuda.get_device_name() if REHEARSING or torch.cuda.is_available() else None
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": commit_of(Path(__file__).resolve().parents[2]),
        "machine": gpu or f"{_cpu_name()}, {torch.get_num_threads()} threads",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
    }


def _version(package: str) -> str | None:
    """Of an installed package, without importing it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit_of(root: Path) -> str:
    """Of a checkout, `-dirty` where files differ from it; "unknown" where there is no git, or git knows no repository there."""
    try:
        # A copy without its .git that lies in somebody else's repository has no commit either.
        if Path(_git(root, "rev-parse", "--show-toplevel")).resolve() != root:
            return UNKNOWN_COMMIT
        return _git(root, "describe", "--always", "--dirty")
    except (OSError, subprocess.CalledProcessError):
        return UNKNOWN_COMMIT


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], capture_output=True, text=True, cwd=root, check=True
    ).stdout.strip()


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
