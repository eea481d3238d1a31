"""Everything that needs a GPU, without a network, in two calls that together take less than fifteen minutes of an H100.

    python -m benchmarks.gpu_suite --slot A --out DIR                                   the kernels: 420 s
    python -m benchmarks.gpu_suite --slot B --out DIR --data DATA --weights WEIGHTS     a language model fine-tuned: 280 s
    python -m benchmarks.gpu_suite --rehearse --out DIR                                 both without a GPU, at toy size

`gpu_steps.py` lists the steps. Each runs in a process of its own under its own time-out. DIR then holds `rows.jsonl` (every number),
`log.txt` (everything printed), `summary.json` (how each step ended), `tiles.json` (the winning tiles) and `kept.tar.xz` (profiles; `kept/`
unpacked). All five are up to date after every step, so whatever ends the call, they can be carried away, and `--resume` goes on
from them, on another machine too.
"""

from __future__ import annotations

import argparse
import json
import lzma
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from benchmarks.gpu_steps import SKIPPED, SLOTS, Places, Step, steps_of
from dti_model.files import whole_file

ROOT = Path(__file__).resolve().parents[1]
DEFAULT_OUT = Path("runs/benchmarks/gpu")
DEADLINES_S = {"A": 480.0, "B": 280.0}
# A rehearsal proves nothing about time, and two busy cores take theirs.
REHEARSAL_DEADLINE_S, REHEARSAL_PATIENCE = 3600.0, 5.0
# For the last archive, the table, and a step that has to be killed.
RESERVE_S = 10.0
# Between asking a step to end and ending it.
GRACE_S = 2.0
# One file is carried with at most 16 MiB; xz packs this many unpacked bytes in a few seconds.
MOST_PACKED, MOST_UNPACKED = 15 << 20, 60 << 20
ENDED_WELL = ("ok", "skipped", "done before")
_ERROR = re.compile(r"^(?:E\s+)?((?:\w+\.)*\w*(?:Error|Exception|OutOfResources|Interrupt)\b.*|FAILED .*)$")


@dataclass
class Call:
    """One call of the suite.

    Attributes:
        places: where results go.
        values: of the placeholders that are options.
        deadline_s: the call ends before this many seconds have passed.
        rehearse: on a CPU, at toy size.
        resume: leave out what a former call ended well.
        start: when it began, on the monotonic clock.
    """

    places: Places
    values: Mapping[str, str]
    deadline_s: float
    rehearse: bool = False
    resume: bool = False
    start: float = field(default_factory=time.monotonic)

    def left_s(self) -> float:
        """Seconds that steps may still use."""
        return self.deadline_s - RESERVE_S - (time.monotonic() - self.start)


def run_steps(steps: Sequence[Step], call: Call) -> list[dict[str, Any]]:
    """Run steps in order; summary and archive are up to date after each.

    Returns:
        What `summary.json` holds of these steps, in order.
    """
    places = call.places
    places.kept.mkdir(parents=True, exist_ok=True)
    unpack(places)
    summary = read_summary(places)
    stopped_by, entries = None, []
    for step in steps:
        before = summary["steps"].get(step.name, {})
        allotted = min(step.limit * (REHEARSAL_PATIENCE if call.rehearse else 1.0), call.left_s())
        if call.resume and not step.always and before.get("status") == "ok":
            entry = {**before, "step": step.name, "status": "done before"}
        elif stopped_by is not None:
            entry = _left_out(step, stopped_by)
        elif allotted < step.least:
            entry = _left_out(step, f"no time: {max(0.0, allotted):.0f} s left, it needs {step.least:.0f}")
        else:
            entry = run_step(step, call, allotted)
        if step.stops and entry["status"] not in ENDED_WELL:
            stopped_by = stopped_by or f"{step.name} {entry['status']}"
        entries.append(entry)
        if entry["status"] != "done before":
            # What a former call did well is not forgotten because there was no time to do it again.
            keep = entry["status"] == "left out" and before.get("status") == "ok"
            summary["steps"][step.name] = before if keep else entry
        _note_origin(summary, places)
        write_summary(places, summary)
        pack(places)
    with suppress(OSError):
        places.kept.rmdir()  # where it is empty
    return entries


def run_step(step: Step, call: Call, seconds: float) -> dict[str, Any]:
    """Run one step for at most `seconds`; what it did, for the summary."""
    places = call.places
    command = step.command(places, call.values, seconds, rehearse=call.rehearse, resume=call.resume)
    shown = " ".join(["python", *command[1:]])
    now = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
    _log(places, f"\n=== {step.name} ({step.gives}), {now} UTC, at most {seconds:.0f} s\n=== {shown}\n")
    print(f"{step.name}: {step.gives}", flush=True)
    start, rows_before = time.monotonic(), num_rows(places)
    code, printed = run_child(command, environment_of(step, call), places.log, seconds)
    entry: dict[str, Any] = {
        "step": step.name,
        "status": "ok" if code == 0 else "skipped" if code == SKIPPED else "failed",
        "exit": code,
        "seconds": round(time.monotonic() - start, 1),
        "rows": num_rows(places) - rows_before,
        "started": now,
    }
    if code is None:
        entry |= {"status": "timed out", "error": f"stopped after {seconds:.0f} s"}
    elif entry["status"] == "skipped":
        entry["error"] = last_line(printed)
    elif entry["status"] == "failed":
        crash = f"{signal.Signals(-code).name}: " if code < 0 else ""
        entry["error"] = crash + first_error(printed)
    if "error" in entry:
        entry["error"] = _without_places(str(entry["error"]), places)[:300]
    if entry["status"] in ("failed", "timed out"):
        print("\n".join(printed.splitlines()[-12:])[-1500:], flush=True)
    _log(places, f"=== {step.name}: {entry['status']}, {entry['seconds']} s\n")
    return entry


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


def environment_of(step: Step, call: Call) -> dict[str, str]:
    """This process's, with the checkout before what PYTHONPATH has, and the winning tiles where there are some."""
    # Steps run in the checkout: what was relative to this process's folder would be lost.
    before = [os.path.abspath(entry) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *before]),
        "PYTHONUNBUFFERED": "1",
        "TRITON_INTERPRET": str(int(call.rehearse and step.interpreted)),
    }
    environment.pop("DTI_TILES", None)
    if call.places.tiles.is_file() and not step.old_table:
        environment["DTI_TILES"] = str(call.places.tiles)
    if call.rehearse:
        environment["DTI_REHEARSE"] = "1"
    return environment


def first_error(printed: str) -> str:
    """The line that says why a command failed: the first error of a list of tests, else the last exception, else the last line."""
    found = [match[1] for line in printed.splitlines() if (match := _ERROR.match(line))]
    tests = [line for line in found if line.startswith("FAILED")]
    return tests[0] if tests else found[-1] if found else last_line(printed)


def last_line(printed: str) -> str:
    """The last line with something in it."""
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    return lines[-1] if lines else "it printed nothing"


def _without_places(text: str, places: Places) -> str:
    return text.replace(f"{places.out}/", "").replace(f"{ROOT}/", "")


def num_rows(places: Places) -> int:
    """Lines of the file of rows."""
    return places.rows.read_bytes().count(b"\n") if places.rows.is_file() else 0


def _left_out(step: Step, reason: str) -> dict[str, Any]:
    print(f"{step.name}: left out, {reason}", flush=True)
    return {"step": step.name, "status": "left out", "exit": None, "seconds": 0.0, "error": reason}


def _log(places: Places, text: str) -> None:
    with places.log.open("a") as file:
        file.write(text)


def read_summary(places: Places) -> dict[str, Any]:
    """`origin` (commit and versions) and `steps` by name; empty where there is none, or none that can be read."""
    empty: dict[str, Any] = {"origin": {}, "steps": {}}
    if not places.summary.is_file():
        return empty
    try:
        summary = json.loads(places.summary.read_text())
    except ValueError:
        print(f"{places.summary.name} is damaged and begins anew", flush=True)
        return empty
    return summary if isinstance(summary, dict) and summary.keys() >= empty.keys() else empty


def write_summary(places: Places, summary: Mapping[str, Any]) -> None:
    """Replace `summary.json` as a whole."""
    with whole_file(places.summary) as temporary:
        temporary.write_text(json.dumps(summary, indent=1) + "\n")


def _note_origin(summary: dict[str, Any], places: Places) -> None:
    """Take commit, versions and card from the last row of the step `device`, and say what differs from a former call."""
    if not places.rows.is_file():
        return
    rows = [line for line in places.rows.read_text().splitlines() if '"benchmark": "device"' in line]
    if not rows:
        return
    names = ("commit", "sources", "torch", "triton", "triton_files", "machine")
    origin = {name: json.loads(rows[-1]).get(name) for name in names}
    for name, value in summary["origin"].items():
        if origin.get(name) != value:
            line = f"{name} was {value} in a former call and is {origin.get(name)} now"
            print(f"CHANGED: {line}", flush=True)
            _log(places, f"=== changed: {line}\n")
    summary["origin"] = origin


def pack(places: Places) -> None:
    """Put what `kept/` holds into the archive, if anything is new; what is too large stays beside it."""
    files = sorted((x for x in places.kept.rglob("*") if x.is_file()), key=lambda x: x.stat().st_size)
    newest = max((file.stat().st_mtime for file in files), default=0.0)
    if not files or (places.archive.is_file() and places.archive.stat().st_mtime > newest):
        return
    left_out = []
    while True:
        if sum(file.stat().st_size for file in files) <= MOST_UNPACKED:
            _write_archive(places, files)
            if places.archive.stat().st_size <= MOST_PACKED:
                break
        left_out.append(files.pop().name)
    for name in left_out:
        _log(places, f"=== {name} is too large for {places.archive.name}\n")


def _write_archive(places: Places, files: Sequence[Path]) -> None:
    with whole_file(places.archive) as temporary, tarfile.open(temporary, "w:xz", preset=1) as archive:
        for file in files:
            archive.add(file, str(file.relative_to(places.out)), filter=_nobody)


def _nobody(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member


def unpack(places: Places) -> None:
    """Files of the archive that `kept/` lacks: the folder may have been carried without it."""
    if not places.archive.is_file():
        return
    try:
        with tarfile.open(places.archive) as archive:
            for member in archive:
                target = (places.out / member.name).resolve()
                content = archive.extractfile(member)
                if content and target.is_relative_to(places.kept.resolve()) and not target.exists():
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(content.read())
    except (tarfile.TarError, lzma.LZMAError, OSError, EOFError) as error:
        print(f"{places.archive.name} cannot be unpacked: {error}", flush=True)


def table(entries: Sequence[Mapping[str, Any]]) -> str:
    """Step, status, seconds and the first line of the error."""
    lines = [
        f"{entry['step']:20} {entry['status']:12} {entry['seconds']:7.1f} s  {entry.get('error', '')}".rstrip()
        for entry in entries
    ]
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    """Options; what belongs together is checked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--slot", choices=SLOTS, help="A: the kernels, B: fine-tuning; both in a rehearsal")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder; default: %(default)s")
    parser.add_argument("--data", type=Path, help="slot B: folder made by `dti prepare`")
    parser.add_argument("--weights", type=Path, help="slot B: pretrained model, a folder or a GGUF file")
    parser.add_argument("--k", type=int, default=50, help="slot B: targets per prompt, 1 for sliding windows")
    parser.add_argument(
        "--epochs", type=int, default=0, help="slot B; 0: one or two, by slot A's training speed"
    )
    parser.add_argument("--deadline", type=float, help=f"seconds for the whole call; default: {DEADLINES_S}")
    parser.add_argument("--resume", action="store_true", help="leave out what summary.json has as ok")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU, at toy size")
    parser.add_argument("--step", nargs="+", help="only these")
    options = parser.parse_args()
    if options.slot is None and not options.rehearse:
        parser.error("say --slot A or --slot B, or --rehearse for both on a CPU")
    options.slots = SLOTS if options.slot is None else (options.slot,)
    if "B" in options.slots and not options.rehearse and not (options.data and options.weights):
        parser.error("slot B needs --data and --weights")
    # Two slots have the step `device` in common: it runs once.
    steps = {step.name: step for slot in options.slots for step in steps_of(slot, str(options.k))}
    unknown = set(options.step or ()) - steps.keys()
    if unknown:
        parser.error(f"no step {min(unknown)!r}; there are {', '.join(steps)}")
    options.steps = [step for step in steps.values() if not options.step or step.name in options.step]
    return options


def _terminated(*_: int | FrameType | None) -> None:
    raise SystemExit(128 + signal.SIGTERM)


def main() -> None:
    """Run a slot; exit with 0 if every step ended well."""
    options = parse()
    # Ends the step that runs, whose session no signal to this process reaches.
    signal.signal(signal.SIGTERM, _terminated)
    values = {"k": str(options.k), "epochs": str(options.epochs)}
    values |= {name: str(path.resolve()) if path else "" for name, path in
               (("data", options.data), ("weights", options.weights))}  # fmt: skip
    deadline = options.deadline or (
        REHEARSAL_DEADLINE_S if options.rehearse else DEADLINES_S[options.slots[0]]
    )
    call = Call(Places(options.out.resolve()), values, deadline, options.rehearse, options.resume)
    entries = run_steps(options.steps, call)
    print(f"\n{table(entries)}\n{time.monotonic() - call.start:.0f} s in all", flush=True)
    sys.exit(any(entry["status"] not in ENDED_WELL for entry in entries))


if __name__ == "__main__":
    main()
