"""Rows of benchmarks: JSON lines, each with everything needed to read it later."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.recording.origin import ROOT, provenance
from dti_model.files import whole_file

Rows = list[dict[str, Any]]
RESULTS = ROOT / "benchmarks" / "results"
# In the working folder; git ignores it. A measurement that nobody asked to keep changes no file of the project.
SCRATCH = Path("runs/benchmarks")
# `failed` of a row that nothing failed in but the time.
TIME_IS_UP = "left out: time is up"


@dataclass(frozen=True)
class RowFiles:
    """The files that a benchmark appends its rows to."""

    paths: tuple[Path, ...]

    def append(self, rows: Rows) -> None:
        """Append JSON lines, each with the provenance of this process."""
        for path in self.paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.write("".join(json.dumps({**provenance(), **row}) + "\n" for row in rows))

    def keep(self, rows: Rows) -> None:
        """Append the rows of a whole run, and print the names of the files."""
        self.append(rows)
        print(f"rows: {self}")

    def __str__(self) -> str:
        return " and ".join(map(str, self.paths))


def read_rows(path: Path) -> Rows:
    """Rows of a file, as they were appended; none where there is no file.

    Raises:
        ValueError: a line is no JSON.
    """
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def row_lines(path: Path) -> tuple[list[bytes], list[bytes]]:
    """Lines of a file that are rows, and lines that are not: a process that is killed while it writes leaves half a line."""
    good: list[bytes] = []
    damaged: list[bytes] = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            (good if isinstance(json.loads(line), dict) else damaged).append(line)
        except (ValueError, RecursionError):
            damaged.append(line)
    return good, damaged


def replace_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write a file of these rows alone, as an atomic write."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))


def last_run(rows: Iterable[dict[str, Any]]) -> Rows:
    """Rows of the last date and commit in a file that runs append to."""
    rows = list(rows)
    return [row for row in rows if (row["date"], row["commit"]) == (rows[-1]["date"], rows[-1]["commit"])]


def failure(error: BaseException) -> str:
    """`failed` of a row: an exception's type and the beginning of its message, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]
