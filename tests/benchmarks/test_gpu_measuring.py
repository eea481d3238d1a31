"""How the GPU benchmarks measure, on an imaginary card: pauses, failures, what a resumed run leaves out, clocks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import bench_train_gpu, tune_tiles
from benchmarks.attention import flex_tuned
from benchmarks.attention.workloads import AttentionInputs, Workload
from benchmarks.measuring import clocks, device_time
from benchmarks.measuring.device_time import LONGEST_PAUSE, PAUSE, device_times
from dti_kernels.gpu import tiles
from dti_kernels.gpu.tiles import Tile
from tests.conftest import ROOT

SMALL = Workload("small", 300, 3, 4, 2, 16, window=2, mean_tokens=7, std_tokens=2)


def test_a_repeat_with_the_host_in_it_is_repeated_behind_a_longer_pause(card: SimpleNamespace) -> None:
    card.needed = 3 * PAUSE
    timing = device_times({"call": lambda: None}, 10.0, most_repeats=3)["call"]
    assert card.pauses == [PAUSE, 4 * PAUSE, 4 * PAUSE, 4 * PAUSE]
    assert (timing.row()["repeats"], timing.row()["host_ahead"]) == (3, 1.0)


def test_a_call_that_waits_for_the_device_is_taken_and_said(card: SimpleNamespace) -> None:
    card.needed = LONGEST_PAUSE + 1
    timing = device_times({"call": lambda: None}, 10.0, most_repeats=2)["call"]
    assert card.pauses[-2:] == [LONGEST_PAUSE, LONGEST_PAUSE]
    assert len(card.pauses) < 8
    assert (timing.row()["repeats"], timing.row()["host_ahead"]) == (2, 0.0)


def test_short_calls_get_more_repeats_than_slow_ones(card: SimpleNamespace) -> None:
    found = device_times({"short": lambda: None, "slow": lambda: time.sleep(0.05)}, 0.04)
    assert found["slow"].row()["repeats"] == device_time.LEAST_REPEATS
    assert found["short"].row()["repeats"] == device_time.MOST_REPEATS
    row = found["slow"].row()
    assert 45 < row["p10_ms"] <= row["p50_ms"] <= row["p90_ms"] < 5000


def test_a_function_that_raises_ends_no_other(card: SimpleNamespace) -> None:
    def fails() -> None:
        raise LookupError("no\n  such thing")

    found = device_times({"fails": fails, "works": lambda: None}, 0.01)
    assert found["fails"].row() == {"failed": "LookupError: no such thing"}
    assert found["works"].row()["repeats"] >= device_time.LEAST_REPEATS


def test_a_lost_device_ends_the_run(card: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an illegal access every row would be a failure of the workload before it."""
    device_time.check_device(ValueError("a provider's"))

    def lost() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(RuntimeError, match="the device is lost after ValueError: a provider's"):
        device_time.check_device(ValueError("a provider's"))


def test_options_that_are_refused_in_one_mode_count_in_the_others(
    card: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch 2.11 refuses FlexAttention's backward with fine blocks of the mask; its forward is the fastest of all."""

    def prepare(x: AttentionInputs, options: flex_tuned.Options) -> Any:
        def call(y: AttentionInputs) -> torch.Tensor:
            if options.name == "long rows":
                raise NotImplementedError("no valid choices")
            assert not (torch.is_grad_enabled() and options.name.startswith("fine")), "it has no backward"
            time.sleep(0.0 if options.name == "fine mask" else 0.01)
            return y.q * 1.0

        return call

    monkeypatch.setattr(flex_tuned, "prepare", prepare)
    x = AttentionInputs.of(SMALL)
    best, rows = flex_tuned.tune(x, 60.0)
    assert best["forward"].name == "fine mask"
    backward = {"default", "square backward", "wide backward"}
    assert {best["backward"].name, best["forward+backward"].name} <= backward
    by_name = {row["options"]: row for row in rows}
    for mode in ("forward", "backward", "forward+backward"):
        assert by_name["long rows"][mode] == {"failed": "NotImplementedError: no valid choices"}
        assert (mode in by_name["fine mask"]) == (mode in by_name["fine keys"]) == (mode == "forward")
        assert "p50_ms" in by_name["wide backward"][mode]
    assert json.dumps(rows)
    late, rows = flex_tuned.tune(x, -1.0)
    assert {options.name for options in late.values()} == {"default"}
    assert [row.get("failed") for row in rows] == [None] + ["left out: time is up"] * (len(rows) - 1)


def test_a_tile_that_is_refused_is_a_row_and_the_others_are_timed(
    card: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def launches(x: AttentionInputs) -> dict[str, Any]:
        tile = tiles._forced["ctx_fwd"]

        def launch() -> None:
            if tile.block_n == 128:
                raise RuntimeError(f"out of resource: shared memory for {tile}")

        return {"ctx_fwd": SimpleNamespace(run=launch)}

    monkeypatch.setattr(tune_tiles, "launches", launches)
    monkeypatch.setattr(tune_tiles, "_SHARE", 0.01)
    sweep = tune_tiles.Sweep("small", "ctx_fwd", AttentionInputs.of(SMALL), "sm_90")
    rows = sweep.run(time.monotonic() + 60)
    assert [row["tile"] for row in rows] == [tune_tiles.numbers_of(tile) for tile in sweep.candidates()]
    for row in rows:
        assert ("failed" in row) == (row["tile"][1] == 128)
    assert sum(row["won"] for row in rows) == 1
    late = sweep.run(time.monotonic() - 1)
    assert [("p50_ms" in row) for row in late] == [True] + [False] * (len(rows) - 1)
    assert late[1]["failed"] == "left out: time is up"


def test_winners_are_written_as_the_table_reads_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = {"arch": "sm_90", "kernel": "ctx_fwd", "head_dim": 64, "bits": 16, "short_span": True}
    entries = [
        {**entry, "tile": [128, 64, 8, 3, 16, 1]},
        {**entry, "kernel": "ctx_dq", "tile": [64, 64, 4, 3, 16]},
    ]
    winners = tune_tiles.Winners(tmp_path / "new" / "tiles.json")
    for found in ({**entries[0], "tile": [64, 64, 4, 3, 16]}, *entries):  # the second replaces the first
        winners.put(found)
    assert json.loads((tmp_path / "new" / "tiles.json").read_text()) == entries
    monkeypatch.setenv("DTI_TILES", str(tmp_path / "new" / "tiles.json"))
    tiles._tuned_tiles.cache_clear()
    found = [tiles.table_tile("sm_90", kernel, 64, 16, 256) for kernel in ("ctx_fwd", "ctx_dq")]
    tiles._tuned_tiles.cache_clear()
    assert found == [Tile(128, 64, 8, 3, ahead=True), Tile(64, 64, 4, 3)]


NVIDIA_SMI = "1980, 2619, 412.35\n"
AMD_SMI = {
    "gpu_data": [
        {
            "gpu": 0,
            "clock": {"gfx_0": {"clk": {"value": 2104, "unit": "MHz"}}, "mem_0": {"clk": {"value": 1300}}},
            "power": {"socket_power": {"value": 748, "unit": "W"}},
        }
    ]
}
ROCM_SMI = {
    "card0": {
        "sclk clock speed:": "(2101Mhz)",
        "mclk clock speed:": "(1300Mhz)",
        "Current Socket Graphics Package Power (W)": "640.0",
    }
}


@pytest.mark.parametrize(
    ("tool", "output", "expected"),
    [
        ("nvidia-smi", NVIDIA_SMI, (1980.0, 2619.0, 412.35)),
        ("amd-smi", json.dumps(AMD_SMI), (2104.0, 1300.0, 748.0)),
        ("amd-smi", json.dumps(AMD_SMI["gpu_data"]), (2104.0, 1300.0, 748.0)),
        ("rocm-smi", json.dumps(ROCM_SMI), (2101.0, 1300.0, 640.0)),
        ("rocm-smi", "not JSON", (None, None, None)),
        ("none", "", (None, None, None)),
    ],
)
def test_clocks_come_from_whatever_tool_there_is(
    tool: str,
    output: str,
    expected: tuple[float | None, ...],
    card: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(clocks, "_output", lambda command: output if command[0] == tool else None)
    monkeypatch.setattr(clocks, "_nvml", lambda: (_ for _ in ()).throw(ImportError("pynvml")))
    assert tuple(clocks.card_state().values()) == expected


def test_a_gpu_machine_needs_no_package_that_reads_raw_data(tmp_path: Path) -> None:
    """The suite's machine may have neither a network nor all dependencies; and triton is imported by a launch, never before."""
    rows = tmp_path / "rows.jsonl"
    code = (
        "import sys\n"
        "for name in ('triton', 'polars', 'msgspec', 'jsonargparse', 'gguf'): sys.modules[name] = None\n"
        "from benchmarks import bench_score, bench_train_gpu, tune_tiles; from benchmarks.attention import flex_tuned; from benchmarks.gpu import host\n"
        "bench_score.main()\n"
    )
    arguments = ["--part", "candidates", "--shape", "smollm", "--device", "cuda", "--out", str(rows)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"DTI_REHEARSE": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, env=environment, cwd=tmp_path)
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [row["provider"] for row in found[:3]] == ["one pass", "encoded history", "one prompt each"]
    assert all(row["max_ms"] >= row["p50_ms"] > 0 for row in found)
    assert {row["machine"] for row in found} == {"rehearsal (no GPU)"}


def test_a_model_that_fails_leaves_the_other_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--device", "cpu", "--tokens", "1024", "--steps", "1", "--out", str(tmp_path / "rows.jsonl")]
    monkeypatch.setattr("sys.argv", ["bench_train_gpu", "--model", "smollm", "tiny", *arguments])
    monkeypatch.setitem(bench_train_gpu.MODELS, "smollm", {"hidden_size": -1})
    monkeypatch.setattr(bench_train_gpu, "check_device", lambda error: None)
    with pytest.raises(SystemExit):
        bench_train_gpu.main()
    failed, streaming, sliding = map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())
    assert failed["model"] == "smollm"
    assert failed["failed"]
    # A streaming row does fewer operations per target, and the share compares the speeds with that.
    assert streaming["flops_ratio"] == pytest.approx(
        sliding["gflop_per_target"] / streaming["gflop_per_target"], rel=1e-2
    )
    assert streaming["flops_ratio"] > 5
    share = streaming["speedup"] / streaming["flops_ratio"]
    assert streaming["share_of_flops_ratio"] == pytest.approx(share, rel=1e-2)
