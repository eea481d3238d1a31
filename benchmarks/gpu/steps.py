"""The steps of `benchmarks.gpu_suite` on a GPU: the command of each, the seconds that it may take, and what it gives.

Slot A is everything about the kernels, slot B a fine-tuned language model. A step is a module with a `main`, run in a process of its own.
It appends its rows to the one file of rows, prints what a person wants to read, and ends with status 0, or with one of
`benchmarks.recording.STATUSES` after a last line that says why.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

SLOTS = ("A", "B")


class Places:
    """The files of a folder of results. There are five; while a call runs, `kept/` is there too, which the archive holds at its end."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.rows = out / "rows.jsonl"  # of all steps
        self.log = out / "log.txt"  # what all steps print
        self.summary = out / "summary.json"  # how each step ended
        self.tiles = out / "tiles.json"  # the winners, which steps after `tiles` run with
        self.kept = out / "kept"  # what is bulky: profiles and reports of other programs
        self.archive = out / "kept.tar.xz"  # `kept/`, packed
        self.lock = out / ".lock"  # there while a call writes here


@dataclass(frozen=True)
class Step:
    """One line of the plan."""

    name: str  # in summary and log
    module: str  # what runs, by `python -m`
    # of the command. `{rows}`, `{kept}`, `{tiles}` and `{out}` stand for places, `{jobs}` for processes, `{data}`, `{weights}`, `{k}`
    # and `{epochs}` for options, and `{seconds}` for the seconds that the step gets, less `spare`
    arguments: tuple[str, ...]
    limit: float  # the most seconds it may take
    gives: str  # what for, in a few words
    least: float = 10  # it is left out where fewer seconds are left
    spare: float = 0  # seconds for a start, an end, and what cannot be cut short
    rehearsed: tuple[str, ...] | None = None  # arguments of a rehearsal; None: the same
    resumed: tuple[str, ...] = ()  # more arguments where a former call's rows are there
    stops: bool = False  # where it fails, nothing after it makes sense; a doubtful result stops nothing
    # run it again in a resumed call: what it leaves is not in the folder, but on the machine
    always: bool = False
    old_table: bool = False  # run with the tiles of the table, whatever won
    interpreted: bool = False  # in a rehearsal, run the kernels in Triton's interpreter
    jobs: int = 1  # most processes of `{jobs}`

    def command(
        self, places: Places, values: Mapping[str, str], seconds: float, *, rehearse: bool, resume: bool
    ) -> list[str]:
        """The command line, from the interpreter on.

        Args:
            places: where the results are.
            values: of `{data}`, `{weights}`, `{k}` and `{epochs}`, as far as the step has them.
            seconds: that it gets.
            rehearse: take the arguments of a rehearsal.
            resume: add the arguments of a resumed call.
        """
        arguments = self.rehearsed if rehearse and self.rehearsed is not None else self.arguments
        jobs = 2 if rehearse else max(1, min(self.jobs, os.cpu_count() or 1))
        known = {
            **values,
            "out": str(places.out),
            "rows": str(places.rows),
            "kept": str(places.kept),
            "tiles": str(places.tiles),
            "seconds": f"{max(1.0, seconds - self.spare):.0f}",
            "jobs": str(jobs),
        }
        filled = [argument.format_map(known) for argument in (*arguments, *(self.resumed if resume else ()))]
        return [sys.executable, "-m", self.module, *filled]


def _rows(*arguments: str) -> tuple[str, ...]:
    return (*arguments, "--out", "{rows}")


# Its limit is that of the first `import torch` on a bare machine with a slow disk.
_DEVICE = Step(
    "device", "benchmarks.gpu.device", _rows(), 120, "versions, card, clocks, C compiler; is the carried cache good",
    least=5, always=True, stops=True,
)  # fmt: skip


def _precompile(name: str, *sets: str, flex: bool = False) -> Step:
    more = ("--flex", "{seconds}") if flex else ()
    return Step(
        name, "benchmarks.gpu.precompile", _rows("--set", *sets, "--jobs", "{jobs}", *more), 130,
        "all kernels compiled in parallel, into Triton's cache", least=50 if flex else 10, spare=40 if flex else 0,
        rehearsed=_rows("--set", "smoke", "--jobs", "{jobs}"), always=True, jobs=15,
    )  # fmt: skip


SLOT_A = (
    _DEVICE,
    _precompile("precompile", "smoke", "tests", "tune", "bench", "train", "score", flex=True),
    Step(
        "smoke", "benchmarks.gpu.smoke", _rows(), 50,
        "does it work at all: three cases, output and gradients, error / budget", stops=True,
    ),
    Step(
        "gpu-tests", "benchmarks.gpu.tests", _rows("--of", "kernels", "--select", "not inductor", "--jobs", "{jobs}"), 100,
        "parity, equal runs, leaks, unwritten memory, offsets beyond 2**31",
        rehearsed=_rows("--of", "kernels", "--select", "(one_token and bfloat16) or never_read", "--jobs", "1"), interpreted=True, jobs=10,
    ),
    Step(
        "tiles", "benchmarks.tune_tiles", _rows("--slot", "--seconds", "{seconds}", "--winners", "{tiles}"), 70,
        "the fastest tile of each kernel, for all steps after this", spare=25, least=35, old_table=True, interpreted=True,
    ),
    Step(
        "attention", "benchmarks.bench_attention", _rows("--device", "cuda", "--seconds", "{seconds}"), 170,
        "attention alone, beside all others", spare=30, least=45, resumed=("--resume",),
    ),
    Step(
        "training", "benchmarks.bench_train_gpu",
        _rows("--seconds", "{seconds}", "--profile", "{kept}/training-step.json.gz"), 80,
        "targets a second, streaming against sliding windows; one profiled step", spare=35, least=50,
    ),
    Step(
        "graph-tests", "benchmarks.gpu.tests", _rows("--of", "graphs", "steps", "--jobs", "2"), 100,
        "passes and training steps as CUDA graphs have the bits of eager ones", least=30,
        rehearsed=_rows("--of", "graphs", "steps", "--select", "dti-one or several_shapes", "--jobs", "1"),
    ),
    Step(
        "score", "benchmarks.bench_score", _rows("--part", "candidates", "--device", "cuda", "--shape", "smollm"), 70,
        "milliseconds for 1, 100 and 500 candidates", least=20,
    ),
    Step(
        "host", "benchmarks.gpu.host", _rows("--seconds", "{seconds}"), 45, "host microseconds a call", spare=15, least=20,
    ),
    Step(
        "ncu", "benchmarks.gpu.ncu", _rows("--kept", "{kept}"), 60, "why the context kernels are as fast as they are",
        least=20,
    ),
    Step(
        "inductor", "benchmarks.gpu.tests", _rows("--of", "kernels", "--select", "inductor", "--jobs", "1"), 120,
        "torch.compile, where time is left", least=30,
    ),
)  # fmt: skip


def slot_b(k: str) -> tuple[Step, ...]:
    """Slot B at `k` targets per prompt; the name of its step says which, so that two of them share a folder."""
    given = ("--data", "{data}", "--weights", "{weights}", "--k", "{k}", "--epochs", "{epochs}")
    return (
        _DEVICE,
        _precompile("precompile-training", "train", "score"),
        Step(
            f"finetune-k{k}", "benchmarks.gpu.finetune", _rows(*given, "--seconds", "{seconds}"), 290,
            "a language model fine-tuned on clicks: validation before and after, and the test of the best",
            spare=60, least=100,
        ),
    )  # fmt: skip


def steps_of(slot: str, k: str = "50") -> tuple[Step, ...]:
    """The steps of slot "A" or "B", in order."""
    return SLOT_A if slot == "A" else slot_b(k)
