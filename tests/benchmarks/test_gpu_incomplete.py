"""GPU benchmarks that run out of time: what was left out is rows and a status of its own, never a silent success."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import bench_attention, tune_tiles
from benchmarks.attention import flex_tuned
from benchmarks.attention import gpu as attention_gpu
from benchmarks.attention.workloads import AttentionInputs, Workload
from benchmarks.gpu import host as host_gpu
from benchmarks.gpu import precompile
from benchmarks.measuring import stand_in
from benchmarks.recording import INCOMPLETE, TIME_IS_UP, RowFiles

SMALL = Workload("small", 300, 3, 4, 2, 16, window=2, mean_tokens=7, std_tokens=2, dtype=torch.float16)


pytestmark = pytest.mark.usefixtures("card")


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def sweeps(*kernels: str) -> list[tune_tiles.Sweep]:
    x = AttentionInputs.of(SMALL)
    return [tune_tiles.Sweep("small", kernel, x, "sm_90") for kernel in kernels]


def run_main(module: Any, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Any:
    monkeypatch.setattr("sys.argv", ["benchmark", *arguments])
    with pytest.raises(SystemExit) as ended:
        module.main()
    return ended.value.code


def test_a_sweep_without_time_is_incomplete(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It ended with status 0 and without winners, so nothing ever ran it again."""
    monkeypatch.setattr(tune_tiles, "sweeps", lambda workloads: sweeps("ctx_fwd"))
    assert (
        run_main(tune_tiles, monkeypatch, "--seconds", "-1", "--out", str(tmp_path / "r.jsonl")) == INCOMPLETE
    )


def test_candidates_that_were_left_out_are_incomplete(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    todo = sweeps("ctx_fwd", "ctx_dq")
    monkeypatch.setattr(
        tune_tiles, "launches", lambda x: {s.kernel: SimpleNamespace(run=_slow) for s in todo}
    )
    monkeypatch.setattr(tune_tiles, "_SHARE", 0.0)
    files, winners = RowFiles((tmp_path / "rows.jsonl",)), tune_tiles.Winners(tmp_path / "tiles.json")
    assert not tune_tiles.tune(todo, files, winners, 0.02)
    rows = rows_of(tmp_path / "rows.jsonl")
    assert TIME_IS_UP in {row.get("failed") for row in rows}
    assert {row["kernel"] for row in rows if row["won"]} == {"ctx_fwd"}
    # Run again, it begins with the kernel that has no winner yet, and keeps that of the other.
    again = tune_tiles.Winners(tmp_path / "tiles.json")
    assert [again.has(sweep.place) for sweep in todo] == [True, False]
    tune_tiles.tune(todo, files, again, 0.02)
    assert rows_of(tmp_path / "rows.jsonl")[len(rows)]["kernel"] == "ctx_dq"
    assert {entry["kernel"] for entry in json.loads((tmp_path / "tiles.json").read_text())} == {
        "ctx_fwd",
        "ctx_dq",
    }
    assert tune_tiles.tune(todo, files, again, 600.0)


def _slow() -> None:
    time.sleep(0.02)


def test_host_times_that_do_not_fit_are_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    assert run_main(host_gpu, monkeypatch, "--seconds", "-1", "--out", str(path)) == INCOMPLETE
    assert {row["failed"] for row in rows_of(path)} == {TIME_IS_UP}
    monkeypatch.setattr(host_gpu, "ways", lambda x: [(host_gpu.OURS, "eager", "forward", lambda: _slow)])
    monkeypatch.setattr(host_gpu, "host_us", lambda call: {"p50_us": 1.0})
    assert host_gpu.measure(RowFiles((path,)), 600.0) == (True, True)


def test_host_times_are_of_kernels_that_are_compiled_before() -> None:
    """Four query heads per key head were nobody's: every kernel was compiled within the step's seconds."""
    if reason := stand_in.why_not_compiled():
        pytest.skip(reason)
    with stand_in.driver_of("sm_90"):
        compiled = precompile.gather(["bench"], "sm_90")
        with stand_in.recorded_launches("sm_90") as launches:
            for reset in (False, True):
                x = AttentionInputs.of(dataclasses.replace(host_gpu.TINY, reset=reset))
                host_gpu.by_mode(host_gpu.providers(x)[host_gpu.OURS], x)["forward+backward"]()
        needed = stand_in.distinct_launches(launches)
    assert needed
    assert set(needed) <= set(compiled)


def test_compilations_leave_rows_and_logs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their output, and how they ended, was thrown away: a slow FlexAttention could not be told from a broken one."""
    program = tmp_path / "python"
    program.write_text(
        "#!/bin/sh\ncase $6 in default) exit 0;; mask) sleep 60;; *) echo before; echo RuntimeError: no >&2; exit 3;; esac\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr(flex_tuned.sys, "executable", str(program))
    monkeypatch.setattr(flex_tuned, "HEADS", {"smollm": (9, 3, 64)})
    monkeypatch.setattr(flex_tuned, "OPTIONS", flex_tuned.OPTIONS[:2])
    found = {row["options"]: row for row in flex_tuned.Warming(tmp_path / "logs").wait(1.0)}
    assert {name: row["status"] for name, row in found.items()} == {
        "default": 0,
        "long rows": 3,
        "mask": None,
    }
    assert "failed" not in found["default"]
    assert found["long rows"]["failed"] == "RuntimeError: no"
    assert found["mask"]["failed"] == TIME_IS_UP
    assert found["default"]["seconds"] < 1.0 <= found["mask"]["seconds"] < 30
    assert (tmp_path / "logs" / "flex-smollm-long-rows.txt").read_text() == "before\nRuntimeError: no\n"
    assert "before" in capsys.readouterr().out


def test_compilations_run_beside_those_of_our_kernels(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One after the other they took half of the seconds of the attention step; whose rows are there compiles nothing again."""
    if reason := stand_in.why_not_compiled():
        pytest.skip(reason)
    happened: list[str] = []

    class Warming:
        def __init__(self, logs: Path | None = None) -> None:
            happened.append("started")

        def wait(self, seconds: float) -> list[dict[str, Any]]:
            happened.append(f"waited {seconds:.0f}")
            return [{"benchmark": "flex_warm", "options": "default"}]

    monkeypatch.setattr(precompile, "Warming", Warming)
    monkeypatch.setattr(flex_tuned, "Warming", Warming)
    monkeypatch.setattr(precompile, "compile_all", lambda launches, jobs: happened.append("compiled") or {})
    path = tmp_path / "rows.jsonl"
    arguments = ["--set", "score", "--arch", "sm_90", "--flex", "70", "--out", str(path)]
    assert run_main(precompile, monkeypatch, *arguments) == 0
    assert happened == ["started", "compiled", "waited 70"]
    assert [row["benchmark"] for row in rows_of(path)] == ["precompile", "flex_warm"]
    session = attention_gpu.Session(RowFiles((path,)), 100.0, set())
    monkeypatch.setattr(session, "guarded", lambda *_: None)
    attention_gpu._run_baselines(session, list(attention_gpu.plans()), None)
    assert len(happened) == 3
    path.unlink()
    attention_gpu._run_baselines(session, list(attention_gpu.plans()), None)
    assert happened[3:] == ["started", "waited 25"]


def test_attention_without_time_is_incomplete(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A run of `--seconds -1` printed what it left out, and ended with status 0."""
    monkeypatch.setattr(flex_tuned, "configure", lambda: None)
    monkeypatch.setattr(attention_gpu, "gate", lambda *_: pytest.fail("measures"))
    path = tmp_path / "rows.jsonl"
    arguments = ["--device", "cuda", "--seconds", "-1", "--out", str(path)]
    assert run_main(bench_attention, monkeypatch, *arguments) == INCOMPLETE
    rows = rows_of(path)
    assert {row["failed"] for row in rows} == {TIME_IS_UP}
    named = {(row["workload"], name) for row in rows for name in row["left_out"]}
    assert {(plan.workload.name, name) for plan in attention_gpu.plans() for name in plan.baselines} < named
