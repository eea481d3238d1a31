"""The tests that need a GPU, in several processes, with a row for each as it ends.

    python -m benchmarks.gpu.tests [--of kernels graphs steps] [--select "not inductor"] [--jobs 10] [--out ROWS.jsonl]

A run that is ended halfway has the rows of the tests that were done. A row holds what the test recorded: of parity tests the share of
its error budget that each tensor uses.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
import time
from collections import Counter
from typing import Any

import pytest

from benchmarks.measuring import REHEARSING
from benchmarks.recording import RowFiles, make_parser, parse_measuring

TESTS = {
    "kernels": "tests/kernels/test_gpu.py",
    "graphs": "tests/model/test_graphs_gpu.py",
    "steps": "tests/training/test_graphed_steps_gpu.py",
}


class TestRows:
    """A plugin of pytest, in its first process."""

    __test__ = False  # pytest looks for tests in classes of such names

    def __init__(self, files: RowFiles) -> None:
        self.files, self._start = files, time.monotonic()
        self.outcomes: Counter[str] = Counter()
        self.largest: dict[str, float] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A row for the test itself, and for a set-up or an end that fails or skips it."""
        if report.when != "call" and report.passed:
            return
        row: dict[str, Any] = {"test": report.nodeid.split("::", 1)[-1], "outcome": report.outcome}
        row |= {"seconds": round(report.duration, 2), **dict(report.user_properties)}
        if report.failed:
            row["failed"] = message_of(report)
        elif report.skipped:
            why = report.longrepr
            row["reason"] = str(why[-1] if isinstance(why, tuple) else why)
        for name, share in row.get("shares", {}).items():
            self.largest[name] = max(self.largest.get(name, 0.0), share)
        self._note(row)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A row for a file that cannot be collected."""
        if report.failed:
            self._note({"test": report.nodeid, "outcome": "failed", "failed": message_of(report)})

    def _note(self, row: dict[str, Any]) -> None:
        self.outcomes[row["outcome"]] += 1
        # Since the start of all: it tells where a run that is ended was waiting.
        row["after_s"] = round(time.monotonic() - self._start, 1)
        self.files.append([{"benchmark": "gpu_tests", **row}])
        print(f"\n{line_of(row)}", end=" ", flush=True)


def message_of(report: pytest.TestReport | pytest.CollectReport) -> str:
    """The failure of a test: the exception, without the way there, which pytest prints."""
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(crash.message if crash is not None else report.longreprtext)[:600]


def _shares(shares: dict[str, float]) -> str:
    return ", ".join(f"{name} {share:.2f}" for name, share in shares.items())


def line_of(row: dict[str, Any]) -> str:
    """One test in one line."""
    line = f"{row['outcome'].upper()} {row['test']}, {row.get('seconds', 0.0)} s"
    if "shares" in row:
        line += f": error / budget {_shares(row['shares'])}"
    for name in ("failed", "reason"):
        if name in row:
            line += f": {(row[name].splitlines() or [''])[0]}"
    return line


def main() -> None:
    """Run them; the exit status is pytest's, and 1 where no test ran."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--of", nargs="+", choices=TESTS, default=list(TESTS), help="default: all")
    add("--select", default="", help="as pytest's -k")
    add("--jobs", type=int, default=1, help="processes")
    options = parse_measuring(parser, "gpu-tests")
    plugin = TestRows(options.rows)
    arguments = [
        "-m",
        "gpu",
        *(TESTS[name] for name in options.of),
        "-k",
        options.select,
        "--durations=10",
        "--tb=short",
    ]
    if REHEARSING:
        arguments += ["-W", "ignore::RuntimeWarning"]  # the interpreter's NumPy: overflows in masked lanes
    if options.jobs > 1 and importlib.util.find_spec("xdist") is not None:
        arguments += ["-n", str(options.jobs)]
    with tempfile.TemporaryDirectory() as folder:  # pytest would keep its own
        code = int(pytest.main([*arguments, "--basetemp", f"{folder}/pytest"], plugins=[plugin]))
    print(
        f"\nlargest error / budget by tensor:\n{_shares(dict(sorted(plugin.largest.items()))) or 'none recorded'}"
    )
    counts = {outcome: plugin.outcomes[outcome] for outcome in ("passed", "failed", "skipped")}
    options.rows.append([{"benchmark": "gpu_tests", "test": "all", "outcome": "counts", **counts}])
    print(counts, flush=True)
    if code == 0 and not counts["passed"]:
        print("no test ran")
        code = 1
    sys.exit(code)


if __name__ == "__main__":
    main()
