"""The attention benchmark for GPUs on an imaginary card: the order of its rows, what a resumed run leaves out, failures, its gate."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.attention import flex_tuned, parity
from benchmarks.attention import gpu as attention_gpu
from benchmarks.attention.workloads import AttentionInputs, Workload
from benchmarks.measuring import clocks, device_time
from benchmarks.recording import RowFiles

SMALL = Workload("small", 300, 3, 4, 2, 16, window=2, mean_tokens=7, std_tokens=2)


def plan(name: str, *baselines: str) -> attention_gpu.Plan:
    return attention_gpu.Plan(
        Workload(name, 300, 3, 4, 2, 16, window=2, mean_tokens=7, std_tokens=2), baselines
    )


@pytest.fixture
def run(
    card: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[dict[str, Any]]]:
    """Runs the attention benchmark over two small plans, one of which has a provider that raises what Triton raises."""

    class OutOfResources(Exception):
        pass

    def refused(x: AttentionInputs) -> Any:
        raise OutOfResources("shared memory")

    monkeypatch.setitem(attention_gpu.GPU_PROVIDERS, "refused", refused)
    plans = [
        plan("llama8b_k50_16k", "refused", "sdpa_dense_mask"),
        plan("llama8b_k50_64k"),
    ]
    monkeypatch.setattr(attention_gpu, "plans", lambda: iter(plans))
    monkeypatch.setattr(attention_gpu, "_SHARE", 0.01)
    monkeypatch.setattr(attention_gpu, "_EQUAL_RUNS", 3)
    monkeypatch.setattr(flex_tuned, "configure", lambda: None)

    def run(seconds: float = 100.0, **more: bool) -> list[dict[str, Any]]:
        path = tmp_path / "rows.jsonl"
        before = len(path.read_text().splitlines()) if path.exists() else 0
        assert attention_gpu.run_on_gpu(RowFiles((path,)), seconds, **more) == (seconds > 0)
        return [json.loads(line) for line in path.read_text().splitlines()[before:]] if path.exists() else []

    return run


def test_attention_rows(run: Callable[..., list[dict[str, Any]]]) -> None:
    rows = run()
    timed = [row for row in rows if "mode" in row]
    # Ours alone over all workloads, then by turns with each baseline.
    assert [(row["workload"], row["provider"]) for row in timed] == [
        *[("llama8b_k50_16k", "windowed_attn")] * 3,
        *[("llama8b_k50_64k", "windowed_attn")] * 3,
        *[("llama8b_k50_16k", "windowed_attn"), ("llama8b_k50_16k", "sdpa_dense_mask")] * 3,
    ]
    assert [row.get("alone") for row in timed] == [True] * 6 + [None] * 6
    for own, other in zip(timed[6::2], timed[7::2], strict=True):
        assert own["mode"] == other["mode"]
        assert own["beside"] == "sdpa_dense_mask"
        assert other["ours_p50_ms"] == own["p50_ms"]
    for row in timed:
        assert row["p10_ms"] <= row["p50_ms"] <= row["p90_ms"]
        assert set(row["clocks_before"]) == set(row["clocks_after"]) == set(clocks.FIELDS)
        assert ("tiles" in row) == ("computed_tflops" in row) == (row["provider"] == "windowed_attn")
    ours = {row["mode"]: row for row in timed if row["provider"] == "windowed_attn"}
    assert set(ours["forward"]["tiles"]) == {"ctx_fwd", "sum_fwd"}
    assert len(ours["forward+backward"]["tiles"]) == 6
    # Twice the bytes and 2.5 times the operations of the forward, three times and 3.5 times.
    intensity = [ours[mode]["flops_per_byte"] for mode in ("forward", "backward", "forward+backward")]
    assert intensity[1] == pytest.approx(1.25 * intensity[0], rel=0.01)
    assert intensity[2] == pytest.approx(3.5 / 3 * intensity[0], rel=0.01)
    (failed,) = (row for row in rows if "failed" in row)
    assert (failed["provider"], failed["failed"]) == ("refused", "OutOfResources: shared memory")
    checks = {row["check"]: row for row in rows if "check" in row}
    assert checks["equal runs"]["equal"]
    assert set(checks) == {"equal runs", "memory"}


def test_a_resumed_run_measures_what_is_missing(
    run: Callable[..., list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rows = run(seconds=-1.0)
    assert {row["failed"] for row in rows} == {"left out: time is up"}
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"benchmark": "atten\n')  # a run was killed while it wrote
    assert len(run(resume=True)) == 15
    assert run(resume=True) == []
    # The same file has the rows of another table of tiles: they are no reason to leave these out.
    tile_file = tmp_path / "tiles.json"
    tile_file.write_text("[]")
    monkeypatch.setenv("DTI_TILES", str(tile_file))
    rows = run(resume=True, only_ours=True)
    assert {(row["provider"], row["table"]) for row in rows} == {("windowed_attn", "DTI_TILES")}
    assert run(resume=True, only_ours=True) == []
    tile_file.write_text("[ ]")
    assert len(run(resume=True, only_ours=True)) == 6


@pytest.mark.parametrize("name", ["machine", "commit", "tiles_sha256"])
def test_rows_of_another_card_or_code_are_measured_again(
    name: str, run: Callable[..., list[dict[str, Any]]], tmp_path: Path
) -> None:
    """A folder of results that travelled to another machine, or to another commit, has rows that say nothing of these."""
    path = tmp_path / "rows.jsonl"
    rows = run(only_ours=True)
    path.write_text("".join(json.dumps({**row, name: "another"}) + "\n" for row in rows))
    assert len(run(resume=True, only_ours=True)) == len(rows) == 6


def test_a_run_that_ends_early_has_what_was_timed(
    run: Callable[..., list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Rows of the headline were saved after all nine providers; a baseline that takes the device with it took them too."""

    def lost(error: BaseException) -> None:
        raise device_time.DeviceLost("the device is lost")

    with monkeypatch.context() as patch:
        patch.setattr(attention_gpu, "check_device", lost)
        with pytest.raises(device_time.DeviceLost):
            run()
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row.get("alone") for row in rows if "mode" in row] == [True] * 6
    assert [row["provider"] for row in rows if "failed" in row] == ["refused"]
    # Run again, it goes on behind the baseline that would lose the device once more.
    again = run(resume=True)
    assert {(row["provider"], row["workload"]) for row in again} == {
        ("windowed_attn", "llama8b_k50_16k"),
        ("sdpa_dense_mask", "llama8b_k50_16k"),
    }


def test_a_device_lost_while_timing_is_a_row_of_who_lost_it(
    run: Callable[..., list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Ours, by turns with it, fails after it too: its times from before must not be replaced by that."""
    before = attention_gpu.device_times

    def times(functions: dict[str, Any], seconds: float) -> dict[str, device_time.Timing]:
        found = before(functions, seconds)
        if len(functions) > 1:
            monkeypatch.setattr(torch.cuda, "synchronize", _raises)
            return {name: device_time.Timing(failed="AcceleratorError: illegal access") for name in found}
        return found

    monkeypatch.setattr(attention_gpu, "device_times", times)
    with pytest.raises(device_time.DeviceLost):
        run()
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["provider"] for row in rows if "failed" in row] == ["refused", "sdpa_dense_mask"]


def _raises() -> None:
    raise RuntimeError("an illegal memory access was encountered")


def test_an_error_a_little_above_its_budget_is_measured_and_said(
    run: Callable[..., list[dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(attention_gpu, "gate", lambda *_: {"out": 0.5, "dq": 1.4})
    rows = run(only_ours=True)
    said = [row for row in rows if row.get("check") == "parity"]
    assert [row["shares"] for row in said] == [{"out": 0.5, "dq": 1.4}]
    assert len([row for row in rows if row.get("budget_share") == 1.4 and "p50_ms" in row]) == 6
    assert "!!! llama8b_k50_16k: error above its budget" in capsys.readouterr().out


def test_a_cpu_is_held_to_the_budget_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "shares", lambda *_: {"out": 0.2, "dq": 1.1})
    with pytest.raises(AssertionError, match=r"budget: dq uses 1\.10 of it$"):
        parity.gate(SMALL)
    assert parity.gate(SMALL, most=parity.MOST_SHARE) == {"out": 0.2, "dq": 1.1}


@pytest.mark.parametrize(("factor", "passes"), [(1.0, True), (2.0, False), (float("nan"), False)])
def test_the_gate_passes_up_to_its_limit(
    factor: float, passes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A little above the budget is a card's rounding; a factor of two everywhere, or a number that is none, is a mistake."""
    correct = parity.windowed_attn
    monkeypatch.setattr(parity, "windowed_attn", lambda *given: correct(*given) * factor)
    workload = dataclasses.replace(SMALL, dtype=torch.bfloat16)
    if passes:
        assert max(parity.gate(workload, most=parity.MOST_SHARE).values()) <= 3
    else:
        with pytest.raises(AssertionError, match="not within 3 times the error budget"):
            parity.gate(workload, most=parity.MOST_SHARE)


def test_a_failure_of_ours_is_a_row_and_the_status(
    run: Callable[..., list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def red(workload: Workload, device: str, most: float) -> None:
        raise AssertionError("not within the error budget")

    monkeypatch.setattr(attention_gpu, "gate", red)
    with pytest.raises(SystemExit, match="windowed_attn failed"):
        run(only_ours=True)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["failed"] for row in rows] == ["AssertionError: not within the error budget"] * 2
    assert len(rows) == 2


def test_runs_that_differ_are_found(card: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def restless(x: AttentionInputs) -> Any:
        draws = iter(range(100))
        return lambda y: y.q * 0 + next(draws) + 0 * (y.k.sum() + y.v.sum() + y.k_sum.sum())

    monkeypatch.setitem(attention_gpu.GPU_PROVIDERS, "windowed_attn", restless)
    monkeypatch.setattr(attention_gpu, "_EQUAL_RUNS", 3)
    row = attention_gpu.equal_runs(SMALL)
    assert not row["equal"]
    assert row["failed"] == "runs differ in ['out']"
