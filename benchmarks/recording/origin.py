"""Date, commit, machine and versions of a row."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
UNKNOWN_COMMIT = "unknown"
# On an imaginary card (`benchmarks/measuring/rehearsal.py`).
REHEARSING = os.environ.get("DTI_REHEARSE") == "1"


@cache
def provenance() -> dict[str, Any]:
    """Of this process; a rehearsal names the imaginary card, so that nobody records it."""
    import torch  # here: the GPU suite itself starts without it

    gpu = torch.cuda.get_device_name() if REHEARSING or torch.cuda.is_available() else None
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": commit_of(ROOT),
        "machine": gpu or f"{_cpu_name()}, {torch.get_num_threads()} threads",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version_of("triton"),
    }


def version_of(package: str) -> str | None:
    """Of an installed package, without importing it; None where it is missing."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit_of(root: Path) -> str:
    """Of a checkout, `-dirty` where files differ from it.

    Where there is no git, or git knows no repository there, it is what the variable DTI_COMMIT says, which whoever carried the copy there
    knows, or else "unknown".
    """
    unknown = os.environ.get("DTI_COMMIT") or UNKNOWN_COMMIT
    try:
        # A copy without its .git that lies in somebody else's repository has no commit either.
        if Path(_git(root, "rev-parse", "--show-toplevel")).resolve() != root:
            return unknown
        return _git(root, "describe", "--always", "--dirty")
    except (OSError, subprocess.CalledProcessError):
        return unknown


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
