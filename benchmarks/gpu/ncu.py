"""Nsight Compute on the kernels over context rows: where their cycles go.

    python -m benchmarks.gpu.ncu --kept FOLDER [--out ROWS.jsonl]

Clocks are left as they are. The report goes into FOLDER, its text to the terminal, and what explains a kernel's speed into a row for each
kernel. It needs an NVIDIA GPU and `ncu`, and ends with the status of a skipped step where one is missing.
"""

from __future__ import annotations

import csv
import glob
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.attention import AttentionInputs, Workload, gpu_workload
from benchmarks.measuring import DEVICE, REHEARSING
from benchmarks.recording import SKIPPED, make_parser, parse_measuring
from benchmarks.shapes import HEADS
from dti_kernels import windowed_attn

_PLACES = ("/usr/local/cuda*/bin/ncu", "/opt/nvidia/nsight-compute/*/ncu")
_KERNELS = "regex:ctx_(fwd|dq|dkv)"
# Beginnings of Nsight's names of metrics; releases spell the rest differently.
_METRICS = (
    "gpu__time_duration.sum",
    "sm__throughput.avg.pct",
    "gpu__compute_memory_throughput.avg.pct",
    "dram__throughput.avg.pct",
    "l1tex__data_bank_conflicts_pipe_lsu.sum",
    "sm__inst_executed_pipe_tensor",
    "sm__pipe_tensor",
    "sm__warps_active.avg.pct",
    "smsp__issue_active.avg.pct",
    "smsp__average_warps_issue_stalled",
    "launch__registers_per_thread",
    "launch__occupancy_limit",
)
_NOT_ALLOWED = "ERR_NVGPUCTRPERM"


def workloads() -> list[Workload]:
    """Of two models, 50 targets a prompt."""
    return [gpu_workload(f"{heads}_k50", heads, 16384, 50) for heads in HEADS]


def launch() -> None:
    """The profiled calls: one forward and backward of each workload, after one that is not."""
    for workload in workloads():
        x = AttentionInputs.of(workload, DEVICE)
        for profiled in (False, True):
            torch.cuda.synchronize()
            if profiled:
                torch.cuda.profiler.start()
            x.run(windowed_attn)
            torch.cuda.synchronize()
            if profiled:
                torch.cuda.profiler.stop()


def find_ncu() -> str | None:
    """Its path; None: it is not here."""
    found = shutil.which("ncu")
    places = [path for place in _PLACES for path in sorted(glob.glob(place), reverse=True)]
    return found or (places[0] if places else None)


def profile(ncu: str, report: Path) -> str:
    """Run `launch` under ncu; what it printed.

    Raises:
        SystemExit: with `SKIPPED` where this user may not read the counters, with 1 where ncu failed.
    """
    report.parent.mkdir(parents=True, exist_ok=True)
    command = [ncu, "--clock-control", "none", "--set", "full", "--profile-from-start", "off"]
    command += ["--kernel-name", _KERNELS, "--force-overwrite", "--export", str(report.with_suffix(""))]
    done = subprocess.run(
        [*command, sys.executable, "-m", "benchmarks.gpu.ncu", "--launch"], capture_output=True, text=True
    )
    printed = done.stdout + done.stderr
    if _NOT_ALLOWED in printed:
        print(f"skipped: the driver does not give this user the performance counters ({_NOT_ALLOWED})")
        sys.exit(SKIPPED)
    if done.returncode or not report.is_file():
        print(printed)
        print(
            f"RuntimeError: ncu ended with {done.returncode} and {'a' if report.is_file() else 'no'} report"
        )
        sys.exit(1)
    return printed


def rows_of(table: str) -> list[dict[str, Any]]:
    """Rows from ncu's page of raw numbers as CSV, whose second line holds the units: kernel and metrics, with the unit in the name."""
    lines = [line for line in table.splitlines() if line.startswith('"')]
    names, units, *values = csv.reader(lines) if len(lines) > 2 else ([], [])
    rows = []
    for value in values:
        row: dict[str, Any] = {"benchmark": "ncu", "kernel": value[names.index("Kernel Name")]}
        for name, unit, number in zip(names, units, value):
            if name.startswith(_METRICS):
                row[f"{name} [{unit}]" if unit else name] = _number(number)
        rows.append(row)
    return rows


def _number(text: str) -> float | str:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return text


def read(ncu: str, report: Path, *page: str) -> str:
    """A page of a report as text."""
    return subprocess.run(
        [ncu, "--import", str(report), *page], capture_output=True, text=True, check=True
    ).stdout


def main() -> None:
    """Profile, print, and keep report and rows."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--kept", type=Path, default=Path("runs/benchmarks"), help="folder of the report")
    add("--launch", action="store_true", help="only run what is profiled")
    options = parse_measuring(parser, "ncu")
    if options.launch or REHEARSING:
        launch()
    if options.launch:
        return
    ncu = None if torch.version.hip else find_ncu()
    if ncu is None:
        print("skipped: ncu profiles NVIDIA GPUs" if torch.version.hip else "skipped: no ncu here")
        sys.exit(SKIPPED)
    report = options.kept / "ctx.ncu-rep"
    print(profile(ncu, report))
    print(read(ncu, report, "--page", "details"))
    rows = rows_of(read(ncu, report, "--page", "raw", "--csv"))
    for row in rows:
        print(row, flush=True)
    options.rows.append(rows)


if __name__ == "__main__":
    main()
