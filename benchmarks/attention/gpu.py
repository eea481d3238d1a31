"""Attention alone on a GPU: every provider, forward, backward and both, over the workloads of the project's claims.

    python -m benchmarks.bench_attention --device cuda [--out FILE] [--seconds 110] [--resume] [--only ours]

Times are of the device (`benchmarks/measuring/device_time.py`). Ours comes first, alone, over all workloads; then each baseline by turns with ours,
in order of weight. Rows are saved after each provider. Work that no longer fits into the seconds given is recorded as left out, and the status
is 75; `--resume` measures what a file of rows lacks. A provider that fails is a row that says why.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import benchmarks.attention.flex_tuned as flex_tuned
from benchmarks.attention.parity import MOST_SHARE, gate
from benchmarks.attention.providers import GPU_PROVIDERS, MODES, OURS, Unavailable, by_mode, settle
from benchmarks.attention.rows import about_tiles, have_rows, measured, printed, speeds
from benchmarks.attention.workloads import SHORT_TOKENS, AttentionInputs, Workload, gpu_workload
from benchmarks.measuring import (
    DEVICE,
    REHEARSING,
    DeviceLost,
    Timing,
    card_state,
    check_device,
    device_times,
)
from benchmarks.recording import TIME_IS_UP, RowFiles, failure
from benchmarks.shapes import HEADS

# Wall-clock seconds for each provider and mode: 40 repeats of a millisecond with their pauses.
_SHARE = 0.01 if REHEARSING else 0.2
# Seconds of all, at most, in which FlexAttention's options are compiled side by side, and tried for one head_dim.
_WARM_SHARE, _TUNE_SHARE = 0.25, 0.12
_EQUAL_RUNS = 3 if REHEARSING else 100

_WINDOWED = ("flex", flex_tuned.NAME, "varlen_scalar_window", "flash_scalar_window")
# These cost the same at every k: once per heads and number of tokens.
_DENSE = ("sdpa_causal", "sdpa_dense_mask")


@dataclass(frozen=True)
class Plan:
    """A workload, and who runs it beside ours."""

    workload: Workload
    baselines: tuple[str, ...] = _WINDOWED


def plans() -> Iterator[Plan]:
    """In order of weight: headline, SmolLM2, short spans, other k, the reset, which only ours has, and four times the tokens."""
    yield Plan(
        gpu_workload("llama8b_k50_16k", "llama8b", 16384, 50),
        (*_WINDOWED, *_DENSE, "flex_with_mask_construction"),
    )
    yield Plan(gpu_workload("smollm_k50_16k", "smollm", 16384, 50), (*_WINDOWED, *_DENSE))
    yield Plan(gpu_workload("smollm_span300_k50_16k", "smollm", 16384, 50, tokens=SHORT_TOKENS))
    for k in (1, 200, None):
        yield Plan(gpu_workload(f"llama8b_k{k or 'all'}_16k", "llama8b", 16384, k))
    for heads in HEADS:
        yield Plan(gpu_workload(f"{heads}_k50_16k_reset", heads, 16384, 50, reset=True), ())
    yield Plan(gpu_workload("llama8b_k50_64k", "llama8b", 65536, 50), (*_WINDOWED, "sdpa_causal"))
    yield Plan(gpu_workload("smollm_k50_64k", "smollm", 65536, 50))


def workloads() -> Iterator[Workload]:
    """The workloads of all plans."""
    return (plan.workload for plan in plans())


@dataclass(frozen=True)
class _Calls:
    """The calls of one provider on one batch, settled: by mode, the call and the MiB it takes at its peak."""

    name: str
    by_mode: dict[str, Callable[[], Any]]
    peak_mib: dict[str, float]


class Session:
    """One run over the workloads: what is kept from one to the next.

    Attributes:
        files: that rows are appended to.
        seconds: of the whole run.
        deadline: of `time.monotonic`, after which nothing is started.
        done: what the files have already (`attention_rows.measured`).
        failed: ours failed somewhere.
        broken: workloads on which ours does not run at all.
        complete: nothing was left out.
    """

    def __init__(self, files: RowFiles, seconds: float, done: set[tuple[str, str]]) -> None:
        self.files, self.seconds, self.done = files, seconds, done
        self.deadline = time.monotonic() + seconds
        self.failed, self.complete = False, True
        self.broken: set[str] = set()
        self._shares: dict[tuple[int, int, bool], float] = {}  # by heads, head_dim and reset of gates so far
        self._options: dict[int, dict[str, flex_tuned.Options]] = {}  # by head_dim, then mode
        self._about = about_tiles()

    def save(self, rows: list[dict[str, Any]]) -> None:
        """Append rows, and print them."""
        rows = [{"benchmark": "attention", **self._about, **row} for row in rows]
        self.files.append(rows)
        for row in rows:
            if row.get("provider") == OURS and "failed" in row:
                self.failed = True
                if "check" not in row and "mode" not in row:
                    self.broken.add(row["workload"])
            print(printed(row), flush=True)

    def guarded(self, name: str, what: list[str], measure: Callable[[], None]) -> None:
        """Measure, unless the time is up; a failure of the whole workload, its parity gate's included, is a row of ours."""
        if self.time_is_up(name, what):
            return
        try:
            measure()
        except DeviceLost:  # the row of who lost it is there, and what was timed of ours stands
            raise
        except Exception as error:
            self.save([{"workload": name, "provider": OURS, "failed": failure(error)}])
            check_device(error)
        torch.cuda.empty_cache()

    def time_is_up(self, name: str, what: list[str]) -> bool:
        """Whether it is, with a row of what is left out of a workload."""
        if time.monotonic() <= self.deadline:
            return False
        self.complete = False
        self.save([{"workload": name, "left_out": what, "failed": TIME_IS_UP}])
        return True

    def alone(self, workload: Workload) -> None:
        """Rows of ours, with nobody beside it."""
        x, facts = self._batch(workload)
        facts["alone"] = True
        ours = self._settled(OURS, x, facts)
        self._time(x, facts, [ours])

    def beside(self, plan: Plan) -> None:
        """Rows of each baseline that is not measured yet, by turns with ours."""
        todo = [name for name in plan.baselines if (plan.workload.name, name) not in self.done]
        x, facts = self._batch(plan.workload)
        ours = self._settled(OURS, x, facts)
        for i, name in enumerate(todo):
            if self.time_is_up(plan.workload.name, todo[i:]):
                return
            baseline = self._settled(name, x, facts)
            if baseline.by_mode:
                self._time(x, facts, [ours, baseline])

    def _batch(self, workload: Workload) -> tuple[AttentionInputs, dict[str, Any]]:
        """Inputs behind the parity gate, and the fields of all their rows."""
        share = self._gate(workload)
        x = AttentionInputs.of(workload, DEVICE)
        pairs, rows = x.layout.num_visible_pairs(), x.layout.num_rows
        facts = {"workload": workload.name, "rows": rows, "visible_pairs": pairs}
        return x, {**facts, "mean_span": round(pairs / rows, 1), "budget_share": round(share, 3)}

    def _gate(self, workload: Workload) -> float:
        """The largest share of the error budget; above 1 a row says so, above `MOST_SHARE` it raises."""
        kind = (workload.num_heads, workload.head_dim, workload.reset)
        if kind not in self._shares:
            found = gate(workload, DEVICE, MOST_SHARE)
            worst = self._shares[kind] = max(found.values())
            if worst > 1:
                rounded = {name: round(share, 3) for name, share in found.items()}
                row = {"workload": workload.name, "provider": OURS, "check": "parity", "shares": rounded}
                self.save([{**row, "budget_share": round(worst, 3)}])
        return self._shares[kind]

    def _settled(self, name: str, x: AttentionInputs, facts: dict[str, Any]) -> _Calls:
        """The calls of a provider that run; a mode that fails is a row, and without a forward there is nothing."""
        found = _Calls(name, {}, {})
        row = {**facts, "provider": name}
        try:
            calls = self._calls(name, x)
        except Exception as error:  # of a baseline or its compiler: the others are still measured
            self._refused(row, error)
            return found
        for mode in MODES:
            try:
                if mode not in calls:
                    raise Unavailable("none of FlexAttention's options runs: see the rows of flex_options")
                settle(calls[mode])
                found.peak_mib[mode] = peak_mib(calls[mode])
                found.by_mode[mode] = calls[mode]
            except Exception as error:
                self._refused(row if mode == "forward" else {**row, "mode": mode}, error)
                if mode == "forward":
                    break
        return found

    def _refused(self, row: dict[str, Any], error: Exception) -> None:
        self.save([{**row, "failed": failure(error)}])
        check_device(error)
        torch.cuda.empty_cache()

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

    def _time(self, x: AttentionInputs, facts: dict[str, Any], providers: list[_Calls]) -> None:
        """Save the rows of providers that take turns: ours, and perhaps a baseline."""
        before, rows = card_state(), []
        baseline = None if len(providers) == 1 else providers[-1].name
        for mode in MODES:
            runs = {calls.name: calls for calls in providers if mode in calls.by_mode}
            if baseline is not None and baseline not in runs:
                continue
            timings = device_times({name: calls.by_mode[mode] for name, calls in runs.items()}, _SHARE)
            self._check_device({**facts, "provider": providers[-1].name, "mode": mode}, timings)
            ours_ms = timings[OURS].row().get("p50_ms") if OURS in timings else None
            for name, timing in timings.items():
                row = {**facts, "provider": name, "mode": mode, **timing.row()}
                if "p50_ms" in row:
                    row |= speeds(name, x, mode, row["p50_ms"])
                row["peak_mib"] = runs[name].peak_mib[mode]
                if name == flex_tuned.NAME:
                    row["options"] = self._options[x.q.shape[2]][mode].name
                if baseline is not None and name == OURS:
                    row["beside"] = baseline
                elif baseline is not None and ours_ms is not None:
                    row["ours_p50_ms"] = ours_ms
                rows.append(row)
        clocks = {"clocks_before": before, "clocks_after": card_state()}
        self.save([{**row, **clocks} for row in rows])

    def _check_device(self, row: dict[str, Any], timings: dict[str, Timing]) -> None:
        """A failure that took the device with it failed every function after it: one row says so."""
        failures = [timing.failed for timing in timings.values() if timing.failed is not None]
        if failures:
            try:
                check_device(RuntimeError(failures[0]))
            except DeviceLost:
                self.save([{**row, "failed": failures[0]}])
                raise


def peak_mib(call: Callable[[], Any]) -> float:
    """Memory that a call takes beyond what is there already, at its peak, in MiB."""
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
    row = {"workload": f"{short.name}, {long.name}", "check": "memory", "provider": OURS}
    return {**row, "peak_mib": peaks, "memory_ratio": ratio, "rows_ratio": round(rows[1] / rows[0], 2)}


def run_on_gpu(
    files: RowFiles, seconds: float, resume: bool = False, only_ours: bool = False, logs: Path | None = None
) -> bool:
    """Measure until the time is up; whether nothing was left out.

    Args:
        files: to append to.
        seconds: after which nothing is started.
        resume: leave out what the files have already of this card, commit and tile file.
        only_ours: measure no baseline.
        logs: folder for what FlexAttention's compilations print; None: a temporary one.

    Raises:
        SystemExit: ours failed somewhere: its rows say where, and the others are there.
        DeviceLost: the device no longer answers.
    """
    flex_tuned.configure()
    session = Session(files, seconds, measured(files.paths) if resume else set())
    todo = list(plans())
    if REHEARSING:
        todo = todo[::3]  # the others run no other line
    for workload in (plan.workload for plan in todo):
        if (workload.name, OURS) not in session.done:
            session.guarded(workload.name, [OURS], partial(session.alone, workload))
    if not only_ours:
        _check(session)
        _run_baselines(session, todo, logs)
    if session.failed:
        raise SystemExit("windowed_attn failed: see its rows")
    return session.complete


def _check(session: Session) -> None:
    """Claims about ours besides its speed."""
    by_name = {workload.name: workload for workload in workloads()}
    short, long = by_name["llama8b_k50_16k"], by_name["llama8b_k50_64k"]
    checks = {"equal runs": lambda: equal_runs(short), "memory": lambda: linear_memory(short, long)}

    def save(check: Callable[[], dict[str, Any]]) -> None:
        session.save([check()])

    for name, check in checks.items():
        if ("check", name) not in session.done:
            session.guarded(name, [name], partial(save, check))


def _run_baselines(session: Session, todo: list[Plan], logs: Path | None) -> None:
    """Baselines beside ours, workload by workload; FlexAttention's options are compiled before the first."""
    missing = {
        plan.workload.name: [
            name for name in plan.baselines if (plan.workload.name, name) not in session.done
        ]
        for plan in todo
        if plan.workload.name not in session.broken
    }
    left = session.deadline - time.monotonic()
    # `benchmarks.gpu.precompile --flex` has done it already where the file has rows about it.
    warmed = have_rows(session.files.paths, "flex_warm")
    if left > 0 and not warmed and any(flex_tuned.NAME in names for names in missing.values()):
        session.files.append(flex_tuned.Warming(logs).wait(min(left, _WARM_SHARE * session.seconds)))
    for plan in todo:
        names = missing.get(plan.workload.name)
        if names:
            session.guarded(plan.workload.name, names, partial(session.beside, plan))
