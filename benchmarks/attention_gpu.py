"""Attention alone on a GPU: every provider, forward, backward and both, over the workloads of the project's claims.

    python -m benchmarks.bench_attention --device cuda [--out FILE] [--seconds 110] [--resume] [--only ours]

Times are of the device (`benchmarks/device_time.py`). Workloads come in order of weight; those that no longer fit into the seconds given
are recorded as left out, and `--resume` measures what a file of rows lacks. A provider that fails is a row that says why.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import flex_tuned
from benchmarks.bench_attention import gate
from benchmarks.clocks import card_state
from benchmarks.compile_report import visited_pairs
from benchmarks.device_time import Timing, check_device, device_times, failure
from benchmarks.measure import RowFiles
from benchmarks.providers import GPU_PROVIDERS, MODES, OURS, Unavailable, by_mode, settle
from benchmarks.rehearsal import DEVICE, REHEARSING
from benchmarks.tune_tiles import numbers_of
from benchmarks.workloads import HEADS as HEADS
from benchmarks.workloads import SHORT_TOKENS, AttentionInputs, Workload, gpu_workload, useful_flops
from dti_kernels.tiles import KERNELS, choose_tile

# Wall-clock seconds for each provider and mode: 40 repeats of a millisecond with their pauses.
_SHARE = 0.01 if REHEARSING else 0.2
# Seconds of all, at most, in which FlexAttention's options are compiled side by side, and tried for one head_dim.
_WARM_SHARE, _TUNE_SHARE = 0.25, 0.12
_EQUAL_RUNS = 3 if REHEARSING else 100
# Matmuls of head_dim x pairs that each kernel computes, masked or not: forward 2, dQ 3, dK/dV 4.
_MATMULS = {"ctx_fwd": 2, "sum_fwd": 2, "ctx_dq": 3, "sum_dq": 3, "ctx_dkv": 4, "sum_dkv": 4}
# Useful FLOPs and bytes of q, k, v, out (and of their gradients), by what the forward has of them.
_FLOPS_OF = {"forward": 1.0, "backward": 2.5, "forward+backward": 3.5}
_BYTES_OF = {"forward": 1, "backward": 2, "forward+backward": 3}

_WINDOWED = (OURS, "flex", flex_tuned.NAME, "varlen_scalar_window", "flash_scalar_window")
# These cost the same at every k: once per heads and number of tokens.
_DENSE = ("sdpa_causal", "sdpa_dense_mask")


@dataclass(frozen=True)
class Plan:
    """A workload and who runs it."""

    workload: Workload
    providers: tuple[str, ...] = _WINDOWED


def plans() -> Iterator[Plan]:
    """In order of weight: headline, SmolLM2, short spans, other k, four times the tokens, and the reset, which only ours has."""
    yield Plan(
        gpu_workload("llama8b_k50_16k", "llama8b", 16384, 50),
        (*_WINDOWED, *_DENSE, "flex_with_mask_construction"),
    )
    yield Plan(gpu_workload("smollm_k50_16k", "smollm", 16384, 50), (*_WINDOWED, *_DENSE))
    yield Plan(gpu_workload("smollm_span300_k50_16k", "smollm", 16384, 50, **SHORT_TOKENS))
    for k in (1, 200, None):
        yield Plan(gpu_workload(f"llama8b_k{k or 'all'}_16k", "llama8b", 16384, k))
    yield Plan(gpu_workload("llama8b_k50_64k", "llama8b", 65536, 50), (*_WINDOWED, "sdpa_causal"))
    yield Plan(gpu_workload("smollm_k50_64k", "smollm", 65536, 50))
    for heads in HEADS:
        yield Plan(gpu_workload(f"{heads}_k50_16k_reset", heads, 16384, 50, reset=True), (OURS,))


def workloads() -> Iterator[Workload]:
    """The workloads of all plans."""
    return (plan.workload for plan in plans())


def tiles_in_force(x: AttentionInputs, mode: str) -> dict[str, list[int]]:
    """The tiles of the kernels that a mode launches, as the tuner writes them."""
    about = x.q.device, x.q.shape[2], x.q.dtype, x.layout.mean_span
    return {kernel: numbers_of(choose_tile(kernel, *about)) for kernel in KERNELS if _launches(kernel, mode)}


def _launches(kernel: str, mode: str) -> bool:
    return mode == "forward+backward" or kernel.endswith("fwd") == (mode == "forward")


def computed_flops(x: AttentionInputs, mode: str) -> int:
    """Operations of our kernels, masked parts of the visited tiles included."""
    num_heads, head_dim = x.q.shape[1:]
    group = num_heads // x.k.shape[1]
    layout = x.layout.to("cpu")
    total = 0
    for kernel, matmuls in _MATMULS.items():
        if _launches(kernel, mode):
            tile = choose_tile(kernel, x.q.device, head_dim, x.q.dtype, x.layout.mean_span)
            streams = 2 if x.reset is not None and kernel.startswith("sum") else 1
            total += 2 * matmuls * streams * num_heads * head_dim * visited_pairs(layout, kernel, tile, group)
    return total


def flops_per_byte(x: AttentionInputs, mode: str) -> float:
    """Useful FLOPs over the bytes of q, k, v and out, and of their gradients, each moved once."""
    num_heads, head_dim = x.q.shape[1:]
    useful = useful_flops(x.layout, num_heads, head_dim, backward=False) * _FLOPS_OF[mode]
    num_bytes = 2 * (x.q.numel() + x.k.numel()) * x.q.element_size() * _BYTES_OF[mode]
    return round(useful / num_bytes, 1)


class Session:
    """One run over the workloads: what is kept from one to the next.

    Attributes:
        files: that rows are appended to.
        seconds: of the whole run.
        only_ours: leave all baselines out.
    """

    def __init__(self, files: RowFiles, seconds: float, only_ours: bool) -> None:
        self.files, self.seconds, self.only_ours = files, seconds, only_ours
        self.ours_failed = False
        self._passed: set[tuple[int, int, bool]] = set()  # heads, head_dim and reset of gates that were green
        self._options: dict[int, dict[str, flex_tuned.Options]] = {}  # by head_dim, then mode
        # The winners of a tuner or the frozen table: rows of both may stand in one file.
        self.table = "DTI_TILES" if os.environ.get("DTI_TILES") else "frozen"

    def save(self, rows: list[dict[str, Any]]) -> None:
        """Append rows, and print them."""
        rows = [{"benchmark": "attention", "table": self.table, **row} for row in rows]
        self.files.append(rows)
        for row in rows:
            if row.get("provider") == OURS and "failed" in row:
                self.ours_failed = True
            print(_line(row), flush=True)

    def measure(self, plan: Plan) -> None:
        """Rows of one workload, behind the parity gate; a provider that fails is a row that says why."""
        workload = plan.workload
        kind = (workload.num_heads, workload.head_dim, workload.reset)
        if kind not in self._passed:
            gate(workload, DEVICE)
            self._passed.add(kind)
        x = AttentionInputs.of(workload, DEVICE)
        pairs = x.layout.num_visible_pairs()
        facts = {"workload": workload.name, "rows": x.layout.num_rows, "visible_pairs": pairs}
        facts["mean_span"] = round(pairs / x.layout.num_rows, 1)
        before = card_state()
        calls, memory = self._prepare(plan, x, facts)
        rows = []
        for mode in MODES:
            of_mode = {name: modes[mode] for name, modes in calls.items() if mode in modes}
            timings = device_times(of_mode, _SHARE)
            for name, timing in timings.items():
                row = {**facts, "provider": name, "mode": mode, **self._figures(name, x, mode, timing)}
                rows.append({**row, "peak_mib": memory[name, mode]})
        clocks = {"clocks_before": before, "clocks_after": card_state()}
        self.save([{**row, **clocks} for row in rows])

    def _prepare(
        self, plan: Plan, x: AttentionInputs, facts: dict[str, Any]
    ) -> tuple[dict[str, dict[str, Callable[[], Any]]], dict[tuple[str, str], float]]:
        """Calls by provider and mode, settled, and what each takes of memory at its peak, MiB."""
        calls: dict[str, dict[str, Callable[[], Any]]] = {}
        memory = {}
        for name in [OURS] if self.only_ours else plan.providers:
            row, calls[name] = {**facts, "provider": name}, {}
            try:
                for mode, call in self._calls(name, x).items():
                    if mode != "forward":  # without a forward there is nothing
                        row["mode"] = mode
                    settle(call)
                    memory[name, mode] = peak_mib(call)
                    calls[name][mode] = call
            except Exception as error:  # of a baseline or its compiler: the others are still measured
                self.save([{**row, "failed": failure(error)}])
                check_device(error)
                torch.cuda.empty_cache()
        return calls, memory

    def _calls(self, name: str, x: AttentionInputs) -> dict[str, Callable[[], Any]]:
        if name != flex_tuned.NAME:
            return by_mode(GPU_PROVIDERS[name](x), x)
        best = self._options.get(x.q.shape[2])
        if best is None:
            best, rows = flex_tuned.tune(x, _TUNE_SHARE * self.seconds)
            self._options[x.q.shape[2]] = best
            self.files.append(rows)
        if not best:
            raise Unavailable("none of FlexAttention's options runs: see the rows of flex_options")
        made = {options: by_mode(flex_tuned.prepare(x, options), x) for options in set(best.values())}
        return {mode: made[options][mode] for mode, options in best.items()}

    def _figures(self, name: str, x: AttentionInputs, mode: str, timing: Timing) -> dict[str, Any]:
        """Times, speeds, and what they were measured with."""
        row = timing.row()
        if "p50_ms" in row:
            num_heads, head_dim = x.q.shape[1:]
            useful = useful_flops(x.layout, num_heads, head_dim, backward=False) * _FLOPS_OF[mode]
            row["useful_tflops"] = _tflops(useful, row["p50_ms"])
            row["flops_per_byte"] = flops_per_byte(x, mode)
            if name == OURS:
                row["computed_tflops"] = _tflops(computed_flops(x, mode), row["p50_ms"])
                row["tiles"] = tiles_in_force(x, mode)
        if name == flex_tuned.NAME:
            row["options"] = self._options[x.q.shape[2]][mode].name
        return row


def _line(row: dict[str, Any]) -> str:
    """A row for the eyes."""
    if "failed" in row:
        return f"{row['workload']:24} {row.get('provider', ''):28} failed: {row['failed'][:120]}"
    if "check" in row:
        return f"{row['workload']:24} {row['check']}: {row.get('equal', row.get('peak_mib'))}"
    return (
        f"{row['workload']:24} {row['provider']:28} {row['mode']:17} p50 {row['p50_ms']:9.3f} ms  "
        f"{row['useful_tflops']:6.1f} useful TFLOP/s"
    )


def _tflops(flops: float, ms: float) -> float:
    return round(flops / max(ms, 1e-6) / 1e9, 1)


def peak_mib(call: Callable[[], Any]) -> float:
    """What a call takes beyond what is there already, at its peak, in MiB."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)


def equal_runs(workload: Workload) -> dict[str, Any]:
    """Whether repeated runs give equal bits: the output and every gradient, compared with those of the first run."""
    x = AttentionInputs.of(workload, DEVICE)
    call = GPU_PROVIDERS[OURS](x)

    def run() -> list[torch.Tensor]:
        out = call(x)
        return [out.detach(), *torch.autograd.grad(out, x.leaves(), x.grad_out)]

    first = run()
    names = ["out", *(f"d{name}" for name, leaf in x.named().items() if leaf.requires_grad)]
    different: set[str] = set()
    for _ in range(_EQUAL_RUNS - 1):
        different |= {name for name, a, b in zip(names, first, run(), strict=True) if not torch.equal(a, b)}
    row: dict[str, Any] = {"workload": workload.name, "check": "equal runs", "provider": OURS}
    row |= {"runs": _EQUAL_RUNS, "equal": not different}
    return row if not different else {**row, "failed": f"runs differ in {sorted(different)}"}


def linear_memory(short: Workload, long: Workload) -> dict[str, Any]:
    """Peak memory of forward and backward at two lengths, MiB, and their ratio beside that of the rows."""
    peaks, rows = [], []
    for workload in (short, long):
        x = AttentionInputs.of(workload, DEVICE)
        call = by_mode(GPU_PROVIDERS[OURS](x), x)["forward+backward"]
        settle(call)
        peaks.append(peak_mib(call))
        rows.append(x.layout.num_rows)
        del x, call
        torch.cuda.empty_cache()
    ratio = round(peaks[1] / peaks[0], 2) if peaks[0] else None
    return {
        "workload": f"{short.name}, {long.name}",
        "check": "memory",
        "provider": OURS,
        "peak_mib": peaks,
        "memory_ratio": ratio,
        "rows_ratio": round(rows[1] / rows[0], 2),
    }


def measured(paths: tuple[Path, ...], table: str) -> set[str]:
    """Workloads and checks that files of rows have already, measured with this table of tiles."""
    found = set()
    for path in paths:
        for line in path.read_text().splitlines() if path.exists() else ():
            row = json.loads(line)
            kind = row.get("benchmark"), row.get("table"), row.get("provider")
            if kind == ("attention", table, OURS) and "failed" not in row:
                found.add(row.get("check", row["workload"]))
    return found


def run(files: RowFiles, seconds: float, resume: bool = False, only_ours: bool = False) -> None:
    """Measure until the time is up; each workload's rows are saved as it ends.

    Args:
        files: to append to.
        seconds: after which no workload is started.
        resume: leave out what the files have already.
        only_ours: measure no baseline.

    Raises:
        SystemExit: ours failed somewhere: its rows say where, and the others are there.
        RuntimeError: the device no longer answers.
    """
    deadline = time.monotonic() + seconds
    flex_tuned.configure()
    session = Session(files, seconds, only_ours)
    done = measured(files.paths, session.table) if resume else set()
    todo = [plan for plan in plans() if plan.workload.name not in done]
    if REHEARSING:
        todo = todo[::3]  # the others run no other line
    if not only_ours and any(flex_tuned.NAME in plan.providers for plan in todo):
        took = flex_tuned.warm(_WARM_SHARE * seconds)
        print(f"FlexAttention's options compiled side by side: {took:.1f} s", flush=True)
    for plan in todo:
        _guarded(session, plan.workload.name, deadline, lambda plan=plan: session.measure(plan))
    if not only_ours:
        by_name = {workload.name: workload for workload in workloads()}
        short, long = by_name["llama8b_k50_16k"], by_name["llama8b_k50_64k"]
        checks = {"equal runs": lambda: equal_runs(short), "memory": lambda: linear_memory(short, long)}
        for name, check in checks.items():
            if name not in done:
                _guarded(session, name, deadline, lambda check=check: session.save([check()]))
    if session.ours_failed:
        raise SystemExit("windowed_attn failed: see its rows")


def _guarded(session: Session, name: str, deadline: float, measure: Callable[[], None]) -> None:
    """Measure, unless the time is up; a failure of the whole workload, its parity gate's included, is a row of ours."""
    if time.monotonic() > deadline:
        session.save([{"workload": name, "failed": "left out: time is up"}])
        return
    try:
        measure()
    except Exception as error:
        session.save([{"workload": name, "provider": OURS, "failed": failure(error)}])
        check_device(error)
    torch.cuda.empty_cache()
