"""The compiled CPU attention as a program for another processor: parity over all cases, under an emulator where there is one.

On the host itself the same program runs always, so that the driver stays right.
"""

from __future__ import annotations

import os
import shlex
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dti_kernels import testing
from dti_kernels.contract import checked_inputs
from dti_kernels.cpu import build as cpu_build
from dti_kernels.cpu import compiled as cpu_native
from tests.cases import CASES, Case
from tests.numerics import golden_and_budgets

DRIVER = Path(__file__).with_name("native_driver.cpp")
INPUTS = ("q", "k", "v", "k_sum", "k_initial", "v_initial")


def tools(target: str) -> tuple[list[str], list[str]]:
    """Compiler, and what runs its programs."""
    if target == "host":
        return [*shlex.split(os.environ.get("CXX", "c++"))], []
    compiler = shutil.which(f"{target}-linux-gnu-g++")
    emulator = shutil.which(f"qemu-{target}") or shutil.which(f"qemu-{target}-static")
    if compiler is None or emulator is None:
        pytest.skip(
            f"no cross compiler and emulator for {target} (Debian: g++-{target}-linux-gnu, qemu-user)"
        )
    return [compiler, "-static"], [emulator]


@pytest.fixture(scope="module", params=["host", "aarch64"])
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command of the built driver."""
    compiler, emulator = tools(request.param)
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"no C++ compiler ({compiler[0]})")
    built = tmp_path_factory.mktemp("driver") / "driver"
    flags = [flag for flag in cpu_build.FLAGS if flag not in ("-shared", "-fPIC")]
    sources = ["-I", str(cpu_build.SOURCES), str(DRIVER), "-o", str(built)]
    subprocess.run([*compiler, *flags, "-O1", *sources], check=True, capture_output=True)
    return [*emulator, str(built)]


def run(program: list[str], case: Case, dtype: torch.dtype, folder: Path) -> dict[str, Tensor]:
    """Output and gradients of a case, as `Inputs.run` gives them."""
    x = case.inputs(dtype)
    reset, q = x.reset_settings, x.leaves["q"]
    ratios = None if reset is None else reset.ratios(x.layout.reset_window, dtype, q.device)
    tensors = [None if leaf is None else leaf.detach() for leaf in map(x.leaves.get, INPUTS)]
    slopes = x.leaves.get("alibi_slopes")
    leaves = {name: leaf.detach() for name, leaf in x.leaves.items()}
    arguments, _ = cpu_native._arguments(checked_inputs(leaves, x.layout, reset, None))
    head = bytes(arguments)[: 8 * len(cpu_native._INTEGERS) + 8]
    gradients = [None if tensor is None else torch.empty_like(tensor) for tensor in tensors]
    dslopes = (
        torch.zeros(q.shape[1], dtype=torch.float64) if slopes is not None and slopes.requires_grad else None
    )
    pointers = [
        *tensors,
        ratios,
        None if slopes is None else slopes.detach().to(dtype),
        x.layout.rows.to(torch.int32),
        torch.empty_like(tensors[0]),
        torch.empty(q.shape[1], q.shape[0], dtype=dtype),
        x.grad_out,
        *gradients,
        dslopes,
    ]
    written = [b"" if tensor is None else tensor.contiguous().numpy().tobytes() for tensor in pointers]
    with (folder / "in").open("wb") as file:
        file.write(head + struct.pack("<q", dtype == torch.float64))
        for content in written:
            file.write(struct.pack("<q", len(content)) + content)
    subprocess.run([*program, str(folder / "in"), str(folder / "out")], check=True)
    read, memory = [], (folder / "out").read_bytes()
    for tensor, content in zip(pointers, written):
        part, memory = memory[: len(content)], memory[len(content) :]
        read.append(
            None
            if tensor is None
            else torch.from_numpy(np.frombuffer(part, tensor.numpy().dtype).copy()).view(tensor.shape)
        )
    assert not memory
    results = {"out": read[9]}
    results |= {f"d{name}": grad for name, grad in zip(INPUTS, read[12:18]) if grad is not None}
    if dslopes is not None:
        results["dalibi_slopes"] = read[18].to(slopes.dtype)
    return results


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_parity(program: list[str], dtype: torch.dtype, tmp_path: Path) -> None:
    for case in CASES:
        golden, budgets = golden_and_budgets(case, dtype, rounds_factors=False)
        actual = run(program, case, dtype, tmp_path)
        testing.assert_within_budget(actual, golden, budgets, dtype)
