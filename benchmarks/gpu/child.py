"""A step of `benchmarks.gpu_suite` as a process: run for a time, ended with everybody whom it started, and how it ended in words."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from benchmarks.recording import ROOT, STATUSES

# Between asking a step to end and ending it.
GRACE_S = 2.0
_ERROR = re.compile(r"^(?:E\s+)?((?:\w+\.)*\w*(?:Error|Exception|OutOfResources|Interrupt)\b.*|FAILED .*)$")


def run_child(
    command: Sequence[str], environment: Mapping[str, str], log: Path, seconds: float
) -> tuple[int | None, str]:
    """Run a command whose output is appended to `log`; at the end nothing of its session is left.

    Args:
        command: to run in the checkout.
        environment: all of it.
        log: a file.
        seconds: after these it is ended, with all its children: tests run in processes of their own.

    Returns:
        Its exit status, None where it was ended; and the end of what it printed.
    """
    with log.open("ab") as file:
        beginning = file.tell()
        child = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        code: int | None = None
        try:
            with suppress(subprocess.TimeoutExpired):
                code = child.wait(seconds)
        finally:
            _end_session(child)
    with log.open("rb") as written:
        size = written.seek(0, os.SEEK_END)
        written.seek(max(beginning, size - (200 << 10)))
        return code, written.read().decode(errors="replace")


def _end_session(child: subprocess.Popen[bytes]) -> None:
    """End a process that leads a session and everybody in it, also where the leader has ended."""
    for signal_ in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal_)
        with suppress(subprocess.TimeoutExpired):
            child.wait(GRACE_S)


def how_it_ended(code: int | None, printed: str, seconds: float) -> tuple[str, str]:
    """Status of a step, and why it is not "ok".

    Args:
        code: its exit status; None: it was ended.
        printed: the end of what it printed.
        seconds: that it had.
    """
    if code is None:
        return "timed out", f"stopped after {seconds:.0f} s"
    if code in STATUSES:
        return STATUSES[code], last_line(printed) if code else ""
    crash = f"{signal.Signals(-code).name}: " if code < 0 else ""
    return "failed", crash + first_error(printed)


def first_error(printed: str) -> str:
    """The line that says why a command failed: the first error of a list of tests, else the last exception, else the last line."""
    found = [match[1] for line in printed.splitlines() if (match := _ERROR.match(line))]
    tests = [line for line in found if line.startswith("FAILED")]
    return tests[0] if tests else found[-1] if found else last_line(printed)


def last_line(printed: str) -> str:
    """The last line with something in it."""
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    return lines[-1] if lines else "it printed nothing"
