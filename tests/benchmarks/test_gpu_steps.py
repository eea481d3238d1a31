"""Steps of the GPU suite by themselves: what they make of programs and machines that are not here."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.attention import parity
from benchmarks.attention.workloads import Workload
from benchmarks.gpu import device as device_gpu
from benchmarks.gpu import ncu as ncu_gpu
from benchmarks.gpu import precompile
from benchmarks.gpu import smoke as smoke_gpu
from benchmarks.measuring import stand_in
from benchmarks.recording import DOUBTFUL, SKIPPED
from dti_kernels import windowed_attn
from tests.cases import CASES, Case, Inputs
from tests.conftest import ROOT
from tests.kernels import gpu_calls, test_gpu
from tests.numerics import parity_shares

TESTS = """
import pytest
pytestmark = pytest.mark.gpu

def test_good(record_property):
    record_property("shares", {"out": 0.5, "dq": 0.25})

@pytest.mark.parametrize("x", [1])
def test_bad(x, record_property):
    record_property("shares", {"out": 1.5, "dq": 0.1})
    assert x == 2, "over budget"

def test_skipped():
    pytest.skip("no such card")

@pytest.fixture
def broken():
    raise OSError("no memory")

def test_without_its_fixture(broken):
    pass

def test_not_selected():
    raise AssertionError
"""
# The CSV that ncu prints: a heading, units, one line a kernel.
RAW_PAGE = """==PROF== Connected
"ID","Kernel Name","gpu__time_duration.sum","launch__registers_per_thread","launch__uuid"
"","","us","register/thread",""
"0","ctx_fwd_kernel","1,023.5","255","1"
"1","ctx_dq_kernel","12.25","n/a","2"
"""
FAKE_NCU = """#!/usr/bin/env python3
import pathlib, sys
words = sys.argv[1:]
if "--import" in words:
    print({raw!r} if "raw" in words else "Duration 1 ms")
elif {fails!r}:
    print({fails!r})
    sys.exit(1)
else:
    pathlib.Path(words[words.index("--export") + 1] + ".ncu-rep").write_text("report")
    print("profiled", words[-1])
"""


def fake_ncu(folder: Path, fails: str = "") -> str:
    path = folder / "ncu"
    path.write_text(FAKE_NCU.format(raw=RAW_PAGE, fails=fails))
    path.chmod(0o755)
    return str(path)


def run_tests(tmp_path: Path, select: str, jobs: int) -> tuple[int, list[dict], str]:
    """`benchmarks.gpu.tests` over a file of tests of our own; its status, rows and output."""
    (tmp_path / "test_made_up.py").write_text(TESTS)
    code = (
        f"import sys; from benchmarks.gpu import tests as gpu_tests; gpu_tests.TESTS = {{'made_up': {str(tmp_path / 'test_made_up.py')!r}}}; "
        f"sys.argv = ['gpu_tests', '--select', {select!r}, '--jobs', '{jobs}', '--out', {str(tmp_path / 'rows.jsonl')!r}]; "
        "gpu_tests.main()"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    return done.returncode, rows, done.stdout


@pytest.mark.parametrize("jobs", [1, 2])
def test_every_gpu_test_has_a_row(tmp_path: Path, jobs: int) -> None:
    """With its shares of the budget, whether it passed or not, and with its message where it failed; also from other processes."""
    code, rows, printed = run_tests(tmp_path, "not not_selected", jobs)
    assert code == 1
    by_name = {row["test"]: row for row in rows}
    assert by_name["test_good"]["shares"] == {"out": 0.5, "dq": 0.25}
    assert by_name["test_bad[1]"]["shares"]["out"] == 1.5
    assert "over budget" in by_name["test_bad[1]"]["failed"]
    assert by_name["test_skipped"]["reason"] == "Skipped: no such card"
    assert by_name["test_without_its_fixture"]["failed"] == "OSError: no memory"
    counts = {name: by_name["all"][name] for name in ("passed", "failed", "skipped")}
    assert counts == {"passed": 1, "failed": 2, "skipped": 1}
    assert "\nFAILED test_bad[1], " in printed
    assert "error / budget out 1.50, dq 0.10: AssertionError: over budget" in printed
    assert "dq 0.25, out 1.50" in printed


def test_nothing_tested_is_a_failure(tmp_path: Path) -> None:
    """All tests skip themselves where PyTorch sees no GPU, and pytest calls that a success."""
    code, rows, printed = run_tests(tmp_path, "test_skipped", 1)
    assert code == 1
    assert rows[-1]["passed"] == 0
    assert printed.splitlines()[-1] == "no test ran"


def test_ncu_gives_a_report_and_rows(tmp_path: Path) -> None:
    ncu = fake_ncu(tmp_path)
    report = tmp_path / "kept" / "ctx.ncu-rep"
    assert ncu_gpu.profile(ncu, report) == "profiled --launch\n"
    assert report.read_text() == "report"
    rows = ncu_gpu.rows_of(ncu_gpu.read(ncu, report, "--page", "raw", "--csv"))
    registers = "launch__registers_per_thread [register/thread]"
    assert rows == [
        {
            "benchmark": "ncu",
            "kernel": "ctx_fwd_kernel",
            "gpu__time_duration.sum [us]": 1023.5,
            registers: 255.0,
        },
        {
            "benchmark": "ncu",
            "kernel": "ctx_dq_kernel",
            "gpu__time_duration.sum [us]": 12.25,
            registers: "n/a",
        },
    ]
    assert ncu_gpu.rows_of("==ERROR== nothing was profiled") == []


@pytest.mark.parametrize(
    ("message", "status", "said"),
    [
        ("==ERROR== ERR_NVGPUCTRPERM - no permission", SKIPPED, "skipped: the driver does not give"),
        ("==ERROR== no kernel", 1, "RuntimeError: ncu ended with 1 and no report"),
    ],
)
def test_ncu_that_cannot(
    message: str, status: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a permission that only the machine's owner gives, the step is skipped; every other failure is one."""
    with pytest.raises(SystemExit) as exit_:
        ncu_gpu.profile(fake_ncu(tmp_path, message), tmp_path / "ctx.ncu-rep")
    assert exit_.value.code == status
    assert capsys.readouterr().out.splitlines()[-1].startswith(said)


@pytest.mark.parametrize(("hip", "said"), [(None, "no ncu here"), ("7.0", "ncu profiles NVIDIA GPUs")])
def test_ncu_says_why_it_is_skipped(
    hip: str | None, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(ncu_gpu, "find_ncu", lambda: None)
    monkeypatch.setattr(sys, "argv", ["ncu_gpu"])
    with pytest.raises(SystemExit) as exit_:
        ncu_gpu.main()
    assert exit_.value.code == SKIPPED
    assert capsys.readouterr().out == f"skipped: {said}\n"


def test_a_carried_cache_is_compared_with_its_stamp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert device_gpu.cache_state(tmp_path / "nowhere") == "empty"
    (tmp_path / "KERNEL").mkdir()
    assert device_gpu.cache_state(tmp_path) == "1 entries, no stamp"
    monkeypatch.setattr(sys, "argv", ["device_gpu", "--stamp"])
    device_gpu.main()
    assert device_gpu.cache_state(device_gpu.cache_folder()) == "1 entries, good"
    monkeypatch.setattr(device_gpu, "ROOT", tmp_path)
    assert device_gpu.cache_state(tmp_path) == "1 entries, other checkout, sources"


def test_launchers_are_compiled_with_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.6 compiles C at the first launch of every signature: on a lent GPU that is time of the lease."""
    if reason := stand_in.why_not_compiled():
        pytest.skip(reason)
    driver = pytest.importorskip("triton.backends.nvidia.driver")
    kernels: list[Any] = []

    class Launcher:
        def __init__(self, src: Any, metadata: Any) -> None:
            kernels.append((src.fn.__name__, metadata.num_warps))
            raise OSError("no libcuda.so.1")

    monkeypatch.setattr(driver, "CudaLauncher", Launcher)
    monkeypatch.setattr(driver, "make_launcher", None, raising=False)
    with stand_in.driver_of("sm_90"):
        launches = list(precompile.gather(["score"], "sm_90").values())[:2]
        monkeypatch.setattr(precompile, "_launches", launches)
        assert [precompile.compile_one(index)[2] for index in range(2)] == ["", ""]
    assert kernels == [(launch.kernel.fn.__name__, launch.tile.warps) for launch in launches]


def test_the_driver_of_either_vendor_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first program that is there; without one, or with a broken one, nothing raises."""
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/usr/bin{os.pathsep}/bin")
    assert device_gpu.state((("amd-smi-of-nobody",),)) == ""
    program = tmp_path / "amd-smi"
    program.write_text('#!/bin/sh\necho "$@"\necho odd >&2\nexit 3\n')
    program.chmod(0o755)
    assert device_gpu.state() == "metric --clock --power --temperature\nodd"
    program.write_text("no program")
    assert device_gpu.state().startswith("amd-smi: ")


def test_a_c_extension_is_built_as_triton_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a compiler nothing can be launched; what is missing is said, and a cached extension proves nothing."""
    build = pytest.importorskip("triton.runtime.build")

    def state() -> str:
        if hasattr(build, "_find_compiler"):
            build._find_compiler.cache_clear()  # a process has one compiler
        return device_gpu.c_compiler()

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    if (shutil.which("gcc") or shutil.which("clang")) and "CC" not in os.environ:
        assert state() == "good"
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path)
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("CC", "cc-of-nobody")
    assert state() == "no C compiler: CC=cc-of-nobody is not there"
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert state() == "no C compiler: no gcc and no clang here"
    assert device_gpu.cxx_compiler() is None
    compiler = tmp_path / "gcc"
    compiler.write_text("#!/bin/sh\nexit 3\n")
    compiler.chmod(0o755)
    assert state().startswith(f"{compiler} failed: CalledProcessError: ")
    monkeypatch.setattr(device_gpu.sysconfig, "get_paths", lambda **_: {"include": str(tmp_path)})
    assert state() == f"no Python.h in {tmp_path}: install Python's headers"


@pytest.mark.parametrize("rehearsing", [False, True])
def test_a_gpu_without_a_c_compiler_is_no_use(
    rehearsing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The row is there either way; only a rehearsal goes on."""
    monkeypatch.setattr(device_gpu, "REHEARSING", rehearsing)
    monkeypatch.setattr(device_gpu, "card", dict)
    monkeypatch.setattr(device_gpu, "c_compiler", lambda: "no C compiler")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(sys, "argv", ["device_gpu", "--out", str(tmp_path / "rows.jsonl")])
    message = ""
    try:
        device_gpu.main()
    except SystemExit as exit_:
        message = str(exit_)
    assert message == ("" if rehearsing else "RuntimeError: no kernel can be launched: no C compiler")
    assert json.loads((tmp_path / "rows.jsonl").read_text())["c_compiler"] == "no C compiler"


def test_without_a_gpu_the_suite_has_nothing_to_do() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit, match="PyTorch sees no GPU"):
        device_gpu.card()


def test_the_reference_is_computed_where_the_kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, a CPU's thread would take most of the time that the tests have."""
    devices, inputs = [], Case.inputs

    def noted(case: Case, dtype: torch.dtype, device: str = "cpu") -> Inputs:
        devices.append((dtype, device))
        return inputs(case, dtype)

    monkeypatch.setattr(Case, "inputs", noted)
    shares = parity_shares(CASES[1], torch.bfloat16, windowed_attn, "cuda")
    assert devices == [(torch.bfloat16, "cuda"), (torch.float64, "cuda")]
    assert max(shares.values()) <= 1


def test_memory_is_what_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of the allocator, whose sizes are its own affair, once failed the test of how memory grows."""
    stats = [{"requested_bytes.all.current": 100, "requested_bytes.all.peak": 100}]
    stats += [{"requested_bytes.all.current": 100, "requested_bytes.all.peak": 350}]
    monkeypatch.setattr(test_gpu, "DEVICE", "cpu")
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda: stats.pop(0))
    assert test_gpu.peak_bytes(100) == 250


def test_the_memory_test_runs_precompiled_kernels() -> None:
    """Tiles follow the mean span: that of a small batch would choose others."""
    span = gpu_calls.memory_inputs().layout.mean_span
    assert span == test_gpu.MEMORY.layout().mean_span
    assert span == dataclasses.replace(test_gpu.MEMORY, num_tokens=4 * 8192).layout().mean_span


def run_smoke(
    factors: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[int, list[dict]]:
    """Status and rows of a smoke test whose outputs are off by a factor each; nan: that case raises."""
    tiny = {
        "num_tokens": 40,
        "num_heads": 2,
        "num_groups": 1,
        "head_dim": 16,
        "window": 2,
        "mean_tokens": 5,
        "std_tokens": 1,
    }
    cases = [Workload(str(factor), k=4, dtype=torch.bfloat16, **tiny) for factor in factors]  # fmt: skip
    right = smoke_gpu.windowed_attn
    left = [factor for factor in factors for _ in range(1 if math.isnan(factor) else 2)]

    def attention(q: torch.Tensor, *args: object) -> torch.Tensor:
        factor = left.pop(0)
        if math.isnan(factor):
            raise RuntimeError("out of resources")
        return right(q, *args) * factor

    monkeypatch.setattr(smoke_gpu, "windowed_attn", attention)
    monkeypatch.setattr(smoke_gpu, "workloads", lambda: cases)
    monkeypatch.setattr(smoke_gpu, "DEVICE", "cpu")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(sys, "argv", ["smoke_gpu", "--out", str(tmp_path / "rows.jsonl")])
    status = 0
    try:
        smoke_gpu.main()
    except SystemExit as exit_:
        status = exit_.code
    return status, [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]


def test_smoke_finds_a_wrong_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong number in output and gradients, an exception in another case: rows for all, and status 1."""
    status, (good, wrong, raises) = run_smoke([1.0, 1.5, math.nan], tmp_path, monkeypatch)
    assert status == 1
    assert good["within_budget"]
    assert good["shares"].keys() == {"out", "dq", "dk", "dv", "dk_sum", "dalibi_slopes"}
    assert not wrong["within_budget"]
    assert wrong["shares"]["out"] > parity.MOST_SHARE
    assert raises["failed"] == "RuntimeError: out of resources"


def test_smoke_a_little_beyond_its_budget_is_doubtful(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All the rest of a slot is measured where an error is 2.9 times what it may be, and somebody is told."""
    right = parity.shares

    monkeypatch.setattr(parity, "shares", lambda *args: {**right(*args), "dq": 2.9})
    status, rows = run_smoke([1.0], tmp_path, monkeypatch)
    assert status == DOUBTFUL
    assert not rows[0]["within_budget"]
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "a little beyond the budget: 1 of 1 cases; the first: 1.0, error / budget {'dq': 2.9}"


@pytest.mark.parametrize(
    ("share", "status"), [(1.0, 0), (1.01, DOUBTFUL), (3.01, 1), (math.inf, 1), (math.nan, 1)]
)
def test_verdict_of_the_smoke_test(share: float, status: int) -> None:
    row = {"shares": {"dq": 0.5, "out": share}, "within_budget": share <= 1}
    assert smoke_gpu.verdict(row) == status
