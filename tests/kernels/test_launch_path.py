"""Everything between an operator and a GPU launch, without a GPU: what Triton's just-in-time path refuses, it refuses here."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from dti_kernels.gpu.tiles import TABLE
from tests.cases import CASES
from tests.kernels import gpu_calls

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    "TRITON_INTERPRET" in os.environ, reason="interpreted kernels are not launched"
)

from benchmarks.gpu import precompile  # noqa: E402
from benchmarks.measuring import stand_in  # noqa: E402
from benchmarks.recording import read_rows  # noqa: E402

KERNELS = (
    "ctx_fwd",
    "ctx_dq",
    "ctx_dkv",
    "sum_fwd",
    "sum_dq",
    "sum_self",
    "sum_dkv",
    "isolated_rows",
    "isolated_keys",
)


def launches_of(arch: str, calls: list[Callable[[], object]]) -> list[Any]:
    with stand_in.recorded_launches(arch) as launches:
        for call in calls:
            call()
    return launches


def every_call() -> list[Callable[[], object]]:
    calls: list[Callable[[], object]] = []
    for dtype in gpu_calls.DTYPES:
        for case in (*CASES, *gpu_calls.REAL_CASES):
            calls.append(partial(gpu_calls.run, case, dtype))
            if not case.name.startswith("no_targets"):
                calls.append(partial(gpu_calls.run_sums_only, case, dtype))
    return calls


@pytest.mark.parametrize("arch", TABLE)
def test_every_launch_of_every_case_is_accepted(arch: str) -> None:
    """Every backward was refused (`Keyword argument lse_ptr was specified but unrecognised`), which the interpreter did not notice."""
    launches = launches_of(arch, every_call())
    kernels = {launch.kernel.fn.__name__ for launch in launches}
    assert kernels == {f"{kernel}_kernel" for kernel in KERNELS}
    for launch in launches:
        assert set(launch.arguments) == {parameter.name for parameter in launch.kernel.params}
        assert 1 <= launch.grid[0] < 2**31
        assert 1 <= launch.grid[1] < 2**16
    with stand_in.driver_of(arch):
        found = stand_in.distinct_launches(launches)
    assert {key.kernel for key in found} == kernels


def test_a_launch_with_a_name_too_many_is_refused() -> None:
    launch = launches_of("sm_90", [partial(gpu_calls.run, CASES[1], torch.float32)])[0]
    launch.arguments["lse_tile_ptr"] = launch.arguments["lse_ptr"]
    with stand_in.driver_of("sm_90"), pytest.raises(KeyError, match="lse_tile_ptr"):
        stand_in.distinct_launches([launch])


def kernels_of(*calls: Callable[[], object]) -> set[stand_in.Key]:
    launches = launches_of("sm_90", list(calls))
    with stand_in.driver_of("sm_90"):
        return set(stand_in.distinct_launches(launches))


def test_what_is_compiled_already_is_distinct_too() -> None:
    """Kernels that another test had compiled were missing from what was found next."""
    launches = launches_of("sm_90", [partial(gpu_calls.run, CASES[1], torch.float32)])
    with stand_in.driver_of("sm_90"):
        before = stand_in.distinct_launches(launches)
        stand_in.warm_up(launches[0])
        assert launches[0].kernel.device_caches
        assert set(stand_in.distinct_launches(launches)) == set(before)
        assert launches[0].kernel.device_caches


def test_lengths_compile_nothing_new() -> None:
    """Batches of any lengths run the kernels of the first one."""
    heads = {"num_heads": 2, "num_groups": 1, "head_dim": 16}
    same = [case for case in CASES if {name: getattr(case, name) for name in heads} == heads]
    same = [case for case in same if case.reset and case.alibi and case.separate_k_sum and case.num_targets]
    same = [case for case in same if not case.name.startswith("no_targets")]
    assert len(same) > 8
    first, *others = (kernels_of(partial(gpu_calls.run, case, torch.bfloat16)) for case in same)
    assert len(first) == 10  # rows are isolated in two ways
    for case, kernels in zip(same[1:], others):
        assert kernels == first, case.name


@pytest.fixture(scope="module")
def compilations() -> dict[stand_in.Key, Any]:
    """The kernels of all cases in bfloat16, as the tests for GPUs launch them."""
    calls = [partial(gpu_calls.run, case, torch.bfloat16) for case in CASES]
    calls += [partial(gpu_calls.run_sums_only, case, torch.bfloat16) for case in CASES[:4]]
    launches = launches_of("sm_90", calls)
    with stand_in.driver_of("sm_90"):
        return stand_in.distinct_launches(launches)


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_case_compiles_for_hopper(kernel: str, compilations: dict[stand_in.Key, Any]) -> None:
    found = {key: launch for key, launch in compilations.items() if key.kernel == f"{kernel}_kernel"}
    assert len(found) >= 7
    with stand_in.driver_of("sm_90"):
        for launch in found.values():
            assert stand_in.warm_up(launch).metadata.name == f"{kernel}_kernel"


@pytest.mark.parametrize("name", precompile.SETS)
def test_sets_have_kernels(name: str) -> None:
    with stand_in.driver_of("sm_90"):
        found = precompile.gather([name], "sm_90")
    kernels = {key.kernel for key in found}
    assert {"ctx_fwd_kernel", "sum_fwd_kernel"} <= kernels
    assert ("ctx_dkv_kernel" in kernels) is (name != "score")


def test_precompile_fills_the_cache(tmp_path: Any) -> None:
    """In processes beside each other; what is compiled is found again, and a row says how long it took."""
    cache, rows = tmp_path / "cache", tmp_path / "rows.jsonl"
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu.precompile",
        "--set",
        "score",
        "--jobs",
        "2",
        "--out",
        str(rows),
    ]
    environment = os.environ | {"TRITON_CACHE_DIR": str(cache)}
    done = subprocess.run([*command, "--arch", "sm_90"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (row,) = read_rows(rows)
    assert row["failed"] == []
    assert len(list(cache.rglob("ctx_fwd_kernel.cubin"))) >= 1
