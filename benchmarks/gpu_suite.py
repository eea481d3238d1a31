"""Everything that needs a GPU, without a network, in two calls that together take less than fifteen minutes of an H100.

    python -m benchmarks.gpu_suite --slot A --out DIR                                   the kernels: 480 s at most
    python -m benchmarks.gpu_suite --slot B --out DIR --data DATA --weights WEIGHTS     a language model fine-tuned: 280 s
    python -m benchmarks.gpu_suite --rehearse --out DIR                                 both without a GPU, at toy size

`gpu/steps.py` lists the steps. Each runs in a process of its own under its own time-out. DIR then holds `rows.jsonl` (every number),
`log.txt` (everything printed), `summary.json` (how each step ended), `tiles.json` (the winning tiles) and `kept.tar.xz` (profiles). All
five are up to date after every step, so whatever ends the call, they can be carried away, and `--resume` goes on from them. It runs
again what did not end well, and everything where card, sources or Triton are others than they were.

A machine that is lent by the second: give slot B `--deadline` = the seconds that are left of it, less 20.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from benchmarks.gpu import (
    SLOTS,
    Places,
    Step,
    how_it_ended,
    log,
    mend_rows,
    note_origin,
    num_rows,
    origin_of,
    pack,
    read_summary,
    remove_packed,
    run_child,
    same_origin,
    set_aside_tiles,
    steps_of,
    table,
    unpack,
    write_summary,
)
from benchmarks.recording import ROOT, make_parser
from dti_model.files import LockedError, locked

DEFAULT_OUT = Path("runs/benchmarks/gpu")
DEADLINES_S = {"A": 480.0, "B": 280.0}
# A rehearsal proves nothing about time, and two busy cores take theirs.
REHEARSAL_DEADLINE_S, REHEARSAL_PATIENCE = 3600.0, 5.0
# For the last archive, the table, and a step that has to be killed.
RESERVE_S = 10.0
ENDED_WELL = ("ok", "skipped", "done before")
# Nothing after such an end of a step that `stops` makes sense.
STOPPING = ("failed", "timed out", "left out")


@dataclass
class Call:
    """One call of the suite."""

    places: Places  # where results go
    values: Mapping[str, str]  # of the placeholders that are options
    deadline_s: float  # the call ends before this many seconds have passed
    rehearse: bool = False  # on a CPU, at toy size
    resume: bool = False  # leave out what a former call ended well
    start: float = field(default_factory=time.monotonic)  # when it began, on the monotonic clock
    interrupted: int = 0  # the exit status that a signal asked for; 0: none came

    def left_s(self) -> float:
        """Seconds that steps may still use."""
        return self.deadline_s - RESERVE_S - (time.monotonic() - self.start)


class Interrupted(BaseException):
    """Ctrl-C, or a caller's time-out; `status` is the exit status that says which."""

    def __init__(self, number: int) -> None:
        self.status = 128 + number
        super().__init__(self.status)


def run_steps(steps: Sequence[Step], call: Call) -> list[dict[str, Any]]:
    """Run steps in order; summary and archive are up to date after each.

    Returns:
        What `summary.json` holds of these steps, in order.
    """
    places = call.places
    places.kept.mkdir(parents=True, exist_ok=True)
    unpack(places)
    mend_rows(places)
    summary = read_summary(places)
    former = summary["origin"]
    stopped_by, entries = None, []
    for step in steps:
        before = summary["steps"].get(step.name, {})
        same = same_origin(origin_of(before, former), summary["origin"])
        if call.resume and same and not step.always and before.get("status") == "ok":
            entry = {**before, "step": step.name, "status": "done before"}
        elif stopped_by is not None:
            entry = _left_out(step, stopped_by)
        else:
            entry = run_in_time(step, call, call.resume and same)
        if call.interrupted or (step.stops and entry["status"] in STOPPING):
            stopped_by = stopped_by or f"{step.name} {entry['status']}"
        entries.append(entry)
        _note(entry, before, summary, places)
        set_aside_tiles(summary, places, former)
        write_summary(places, summary)
        pack(places)
    remove_packed(places)
    return entries


def _note(entry: dict[str, Any], before: dict[str, Any], summary: dict[str, Any], places: Places) -> None:
    """Put a step's entry into the summary, with what it ran on."""
    note_origin(summary, places)
    if entry["status"] == "done before":
        return
    if entry["status"] == "left out":
        # The results of a former call are not forgotten because there was no time to do it again.
        keep = before.get("status") in ("ok", "incomplete", "doubtful")
        summary["steps"][entry["step"]] = before if keep else entry
        return
    if summary["origin"]:
        entry["origin"] = summary["origin"]
    summary["steps"][entry["step"]] = entry


def run_in_time(step: Step, call: Call, resume: bool) -> dict[str, Any]:
    """Run a step for its limit or for the time that is left, or leave it out where that is too little."""
    allotted = min(step.limit * (REHEARSAL_PATIENCE if call.rehearse else 1.0), call.left_s())
    if allotted < step.least:
        return _left_out(step, f"no time: {max(0.0, allotted):.0f} s left, it needs {step.least:.0f}")
    return run_step(step, call, allotted, resume)


def run_step(step: Step, call: Call, seconds: float, resume: bool) -> dict[str, Any]:
    """Run one step for at most `seconds`; what it did, for the summary."""
    places = call.places
    command = step.command(places, call.values, seconds, rehearse=call.rehearse, resume=resume)
    shown = " ".join(["python", *command[1:]])
    now = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
    log(places, f"\n=== {step.name} ({step.gives}), {now} UTC, at most {seconds:.0f} s\n=== {shown}\n")
    print(f"{step.name}: {step.gives}", flush=True)
    start, rows_before, printed = time.monotonic(), num_rows(places), ""
    try:
        code, printed = run_child(command, environment_of(step, call), places.log, seconds)
        status, error = how_it_ended(code, printed, seconds)
    except Interrupted as signal_:
        call.interrupted, code = signal_.status, None
        status, error = "interrupted", "a signal ended the call"
    mend_rows(places)
    entry: dict[str, Any] = {
        "step": step.name,
        "status": status,
        "exit": code,
        "seconds": round(time.monotonic() - start, 1),
        "rows": num_rows(places) - rows_before,
        "started": now,
    }
    if error:
        entry["error"] = _without_places(error, places)[:300]
    if status in ("failed", "timed out"):
        print("\n".join(printed.splitlines()[-12:])[-1500:], flush=True)
    elif status == "doubtful":
        print(f"{'!' * 20} DOUBTFUL, {step.name}: {error}", flush=True)
    log(places, f"=== {step.name}: {status}, {entry['seconds']} s\n")
    return entry


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


def _without_places(text: str, places: Places) -> str:
    return text.replace(f"{places.out}/", "").replace(f"{ROOT}/", "")


def _left_out(step: Step, reason: str) -> dict[str, Any]:
    print(f"{step.name}: left out, {reason}", flush=True)
    return {"step": step.name, "status": "left out", "exit": None, "seconds": 0.0, "error": reason}


def seconds(text: str) -> float:
    """A positive number of seconds, as argparse reads it."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of seconds above 0, got {text!r}")
    return value


def suite_parser() -> argparse.ArgumentParser:
    """All options."""
    parser = make_parser(__doc__)
    parser.prog = "gpu_suite"
    add = parser.add_argument
    add("--slot", choices=SLOTS, help="A: the kernels, B: fine-tuning; both in a rehearsal")
    add("--out", type=Path, default=DEFAULT_OUT, help="folder; default: %(default)s")
    add("--data", type=Path, help="slot B: folder made by `dti prepare`")
    add("--weights", type=Path, help="slot B: pretrained model, a folder or a GGUF file")
    add("--k", type=int, default=50, help="slot B: targets per prompt, 1 for sliding windows")
    add("--epochs", type=int, default=0, help="slot B; 0: one to three, by slot A's training speed")
    add(
        "--deadline",
        type=seconds,
        help=f"seconds for the whole call; slot B: those that are left of a lent machine, less 20; default: {DEADLINES_S}",
    )
    add("--resume", action="store_true", help="leave out what summary.json has as ok on this card")
    add("--rehearse", action="store_true", help="without a GPU, at toy size")
    add("--step", nargs="+", help="only these; with --resume, `device` too")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Options; what belongs together is checked, and what slot B reads is there."""
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
    # A resumed call has to know whether this is the card that its folder is of.
    chosen = {*(options.step or steps), *(("device",) if options.resume else ())}
    options.steps = [step for step in steps.values() if step.name in chosen]
    if "B" in options.slots:
        reason = why_unusable(options.data, options.weights)
        if reason:
            parser.error(reason)
    return options


def why_unusable(data: Path | None, weights: Path | None) -> str:
    """The fault in what slot B reads, found before a GPU waits for it; empty: nothing. None: not given, for a rehearsal."""
    if data is not None:
        from dti_model.data import DataError, PreparedData  # slot A needs no pyarrow

        try:
            PreparedData.open(data)
        except (DataError, OSError) as error:
            return f"--data {error}"
    if weights is None or (weights / "config.json").is_file():
        return ""
    if not weights.is_file():
        return f"--weights {weights}: no GGUF file, and no folder with a config.json"
    with weights.open("rb") as file:
        return "" if file.read(4) == b"GGUF" else f"--weights {weights}: this file is no GGUF file"


def _interrupt(number: int, _: FrameType | None) -> None:
    for signal_ in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signal_, signal.SIG_IGN)  # what is left to do takes a moment
    raise Interrupted(number)


def main() -> None:
    """Run a slot; exit with 0 if every step ended well."""
    parser = suite_parser()
    options = parse(parser)
    values = {"k": str(options.k), "epochs": str(options.epochs)}
    values |= {name: str(path.resolve()) if path else "" for name, path in
               (("data", options.data), ("weights", options.weights))}  # fmt: skip
    deadline = options.deadline or (
        REHEARSAL_DEADLINE_S if options.rehearse else DEADLINES_S[options.slots[0]]
    )
    call = Call(Places(options.out.resolve()), values, deadline, options.rehearse, options.resume)
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(call.places.lock, "gpu_suite"))
            call.places.kept.mkdir(exist_ok=True)
        except LockedError as error:
            parser.exit(2, f"gpu_suite: {error}\n")
        except OSError as error:
            parser.error(f"--out {options.out}: {error}")
        # They end the step that runs, whose session no signal to this process reaches.
        for signal_ in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signal_, _interrupt)
        try:
            entries = run_steps(options.steps, call)
        except Interrupted as signal_:
            sys.exit(signal_.status)
    print(f"\n{table(entries)}\n{time.monotonic() - call.start:.0f} s in all", flush=True)
    sys.exit(call.interrupted or any(entry["status"] not in ENDED_WELL for entry in entries))


if __name__ == "__main__":
    main()
