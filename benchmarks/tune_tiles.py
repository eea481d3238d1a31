"""Time candidate tiles of every kernel on this GPU: rows for `dti_kernels/gpu/tiles.py`, and a file of winners that it can read.

    python -m benchmarks.tune_tiles [--heads llama8b] [--k 50] [--seconds 600] [--out ROWS.jsonl] [--record]
    python -m benchmarks.tune_tiles --slot --seconds 25 --winners TILES.json [--out ROWS.jsonl]
    DTI_TILES=TILES.json python -m benchmarks.bench_attention --device cuda

Each candidate runs a kernel by itself, exactly as the operator launches it, all candidates of a kernel by turns. The table's own tile is
always among them, and another one must be faster by more than 2 % to replace it. A candidate that the compiler or the device refuses is
a row that says why. `--slot` takes the workloads of the GPU suite, context kernels first. Read the result beside
`benchmarks.compile_report`: a tile that spills may win here and lose on another shape.

The status is 75 where time is up before every candidate has been timed. Run again, it begins with the kernels that the file of winners
lacks, and keeps what that file has of others.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.attention import (
    SHORT_TOKENS,
    AttentionInputs,
    Workload,
    candidates_of,
    gpu_workload,
    numbers_of,
)
from benchmarks.measuring import DEVICE, REHEARSING, check_device, device_times
from benchmarks.recording import INCOMPLETE, TIME_IS_UP, RowFiles, failure, make_parser, parse_measuring
from benchmarks.shapes import HEADS
from dti_kernels import gpu
from dti_kernels.gpu import KERNELS, Tile
from dti_kernels.inputs import Inputs
from dti_model.files import whole_file

# Share of the table's time that another tile has to save before it replaces the table's: less is the noise of a sweep.
MARGIN = 0.02
# Wall-clock seconds for each candidate: some twenty repeats behind their pauses.
_SHARE = 0.01 if REHEARSING else 0.06


def launches(x: AttentionInputs) -> dict[str, gpu.Launch]:
    """All launches of forward and backward with the tiles now in force, by kernel. Only time is asked: what they read is zeros."""
    reset = x.reset
    ratios = None if reset is None else reset.ratios(x.layout.window, torch.float32, x.q.device)
    inputs = Inputs(
        q=x.q.detach(),
        k=x.k.detach(),
        v=x.v.detach(),
        k_sum=x.k_sum.detach(),
        k_initial=None if reset is None else reset.k_initial.detach(),
        v_initial=None if reset is None else reset.v_initial.detach(),
        ratios=ratios,
        slopes=x.alibi_slopes,
        rows=x.layout.rows,
        keys=x.layout.keys,
        scale=x.q.shape[-1] ** -0.5,
        mean_span=x.layout.mean_span,
    )
    batch = gpu.Batch(inputs)
    out = torch.zeros_like(batch.x.q)
    lse = torch.zeros(out.shape[1], batch.num_rows, device=out.device)
    buffers = gpu.Buffers.of(batch)
    for buffer in buffers:  # not what lay there: NaNs multiply at another power, so at another clock
        if buffer is not None:
            buffer.zero_()
    all_launches = gpu.forward_launches(batch, out, lse)
    all_launches += gpu.backward_launches(batch, buffers, x.grad_out, out, lse)
    return {launch.kernel.fn.__name__.removesuffix("_kernel"): launch for launch in all_launches}


@dataclasses.dataclass(frozen=True)
class Sweep:
    """One kernel under one workload."""

    workload: str  # its name
    kernel: str  # one of `KERNELS`
    x: AttentionInputs  # inputs
    arch: str  # whose rows of the table are meant

    @property
    def table_tile(self) -> Tile:
        """The tile of the frozen table."""
        bits = 8 * self.x.q.element_size()
        return gpu.table_tile(self.arch, self.kernel, self.x.q.shape[2], bits, self.x.layout.mean_span)

    def candidates(self) -> list[Tile]:
        """The table's tile first, then the others, each once."""
        others = candidates_of(self.kernel, self.x.q.shape[2])
        found = list(dict.fromkeys([self.table_tile, *others]))
        if REHEARSING:
            return found[: 2 if self.kernel == "ctx_fwd" else 1]
        return found

    def run(self, deadline: float) -> list[dict[str, Any]]:
        """Rows of all candidates; after `deadline` (of `time.monotonic`) no further one is compiled."""
        rows: dict[Tile, dict[str, Any]] = {}
        calls: dict[Tile, Callable[[], None]] = {}
        for tile in self.candidates():
            row = rows[tile] = {"benchmark": "tiles", "workload": self.workload, "kernel": self.kernel}
            row |= {"arch": self.arch, "head_dim": self.x.q.shape[2], "tile": numbers_of(tile)}
            row["in_table"] = tile == self.table_tile
            if calls and time.monotonic() > deadline:
                row["failed"] = TIME_IS_UP
                continue
            try:
                with gpu.forced({self.kernel: tile}):
                    launch = launches(self.x)[self.kernel]
                launch.run()
                torch.cuda.synchronize()
                calls[tile] = launch.run
            except Exception as error:  # out of resources, or a compiler's refusal: the others still count
                row["failed"] = failure(error)
                check_device(error)
        for tile, timing in device_times(calls, _SHARE).items():
            rows[tile] |= timing.row()
        winner = self.winner(list(rows.values()))
        return [{**row, "won": row is winner} for row in rows.values()]

    def winner(self, rows: list[dict[str, Any]]) -> dict[str, Any] | None:
        """The row of the tile to run with: the fastest, or the table's where that is within `MARGIN`. None: nothing was timed."""
        timed = [row for row in rows if "p50_ms" in row]
        if not timed:
            return None
        best = min(timed, key=lambda row: row["p50_ms"])
        kept = next((row for row in timed if row["in_table"]), None)
        return kept if kept is not None and best["p50_ms"] > (1 - MARGIN) * kept["p50_ms"] else best

    def entry(self, rows: list[dict[str, Any]]) -> dict[str, Any] | None:
        """The winner as `dti_kernels.gpu.tiles` reads it from the file that DTI_TILES names."""
        won = next((row for row in rows if row["won"]), None)
        return None if won is None else {**self.place, "tile": won["tile"]}

    @property
    def place(self) -> dict[str, Any]:
        """Keys of the table's row, as `table_tile` finds it."""
        head_dim = self.x.q.shape[2]
        return {
            "arch": self.arch,
            "kernel": self.kernel,
            "head_dim": 64 if head_dim <= 64 else 128 if head_dim <= 128 else 256,
            "bits": 8 * self.x.q.element_size(),
            "short_span": self.x.layout.mean_span <= 256,
        }


def slot_workloads() -> list[Workload]:
    """The workloads that the GPU suite tunes for; with a reset, so that the [SUM] kernels run all they have."""
    return [
        gpu_workload("llama8b_k50_16k", "llama8b", 16384, 50, reset=True),
        gpu_workload("smollm_k50_16k", "smollm", 16384, 50, reset=True),
        gpu_workload("smollm_span300_k50_16k", "smollm", 16384, 50, reset=True, tokens=SHORT_TOKENS),
    ]


def sweeps(workloads: list[Workload]) -> list[Sweep]:
    """All kernels under all workloads: the context kernels of every workload, then those of [SUM] rows."""
    if REHEARSING:  # the interpreter computes with NumPy, which has no bfloat16
        workloads = [dataclasses.replace(workload, dtype=torch.float16) for workload in workloads[1:2]]
    arch = gpu.architecture(torch.device(DEVICE))
    inputs = [(workload.name, AttentionInputs.of(workload, DEVICE)) for workload in workloads]
    ordered = sorted(KERNELS, key=lambda kernel: kernel.startswith("sum"))
    return [Sweep(name, kernel, x, arch) for kernel in ordered for name, x in inputs]


class Winners:
    """The best tiles so far, in the file that DTI_TILES names.

    Attributes:
        path: of the file; what it has is kept until it is measured again. None: they are not kept.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._entries: list[dict[str, Any]] = []
        if path is not None and path.exists():
            self._entries = json.loads(path.read_text())

    def has(self, place: dict[str, Any]) -> bool:
        """Whether there is a winner for this row of the table."""
        return any(self._is_of(entry, place) for entry in self._entries)

    def put(self, entry: dict[str, Any]) -> None:
        """Add a winner in place of an earlier one, and write the file."""
        place = {name: value for name, value in entry.items() if name != "tile"}
        self._entries = [old for old in self._entries if not self._is_of(old, place)] + [entry]
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(self.path) as temporary:
                temporary.write_text("[\n" + ",\n".join(map(json.dumps, self._entries)) + "\n]\n")

    @staticmethod
    def _is_of(entry: dict[str, Any], place: dict[str, Any]) -> bool:
        return {name: value for name, value in entry.items() if name != "tile"} == place


def tune(todo: list[Sweep], files: RowFiles, winners: Winners, seconds: float) -> bool:
    """Run sweeps, those without a winner first; whether every candidate was timed or refused.

    Args:
        todo: sweeps, the important ones first.
        files: to append rows to.
        winners: to put the best tiles into.
        seconds: of all together; each gets an equal share of what is left.
    """
    deadline = time.monotonic() + seconds
    todo = sorted(todo, key=lambda sweep: winners.has(sweep.place))
    complete = True
    for i, sweep in enumerate(todo):
        left = deadline - time.monotonic()
        if left <= 0:
            print(f"{TIME_IS_UP} before {sweep.kernel} of {sweep.workload}", flush=True)
            return False
        rows = sweep.run(time.monotonic() + left / (len(todo) - i))
        files.append(rows)
        for row in rows:
            said = row.get("failed") or f"p50 {row['p50_ms']:8.4f} ms{'  <- best' if row['won'] else ''}"
            print(f"{sweep.workload:24} {sweep.kernel:8} {row['tile']!s:24} {said}", flush=True)
        complete &= all(row.get("failed") != TIME_IS_UP for row in rows)
        entry = sweep.entry(rows)
        if entry is not None:
            winners.put(entry)
    return complete


def main() -> None:
    """Tune and print; exit with `INCOMPLETE` where candidates were left out."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--heads", choices=HEADS, nargs="+", default=list(HEADS))
    add("--k", type=int, default=50)
    add("--tokens", type=int, default=16384)
    add("--seconds", type=float, default=600.0)
    add("--slot", action="store_true", help="the GPU suite's workloads instead of --heads, --k")
    add("--winners", type=Path, help="file of the best tiles, for DTI_TILES")
    options = parse_measuring(parser, "tiles")
    if REHEARSING:
        os.environ["TRITON_INTERPRET"] = "1"
    workloads = slot_workloads()
    if not options.slot:
        workloads = [
            gpu_workload(f"{heads}_k{options.k}", heads, options.tokens, options.k, reset=True)
            for heads in options.heads
        ]
    complete = tune(sweeps(workloads), options.rows, Winners(options.winners), options.seconds)
    print(f"rows: {options.rows}")
    if not complete:
        sys.exit(INCOMPLETE)


if __name__ == "__main__":
    main()
