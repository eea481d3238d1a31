"""The compiled CPU attention as a program for another processor: parity over all cases, under an emulator where there is one.

On the host itself the same program runs always, so that the driver stays right.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dti_kernels import testing
from dti_kernels.contract import accumulation_dtype, checked_inputs
from dti_kernels.cpu import build as cpu_build
from dti_kernels.cpu import compiled
from dti_kernels.inputs import Gradients
from tests.cases import CASES, Case
from tests.numerics import golden_and_budgets

DRIVER = Path(__file__).with_name("native_driver.cpp")


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


# Target, and options that give bfloat16 to its processor: pairs in float32 on the host, whatever it is, and Arm's bfdot.
TARGETS = {"host": "-DDTI_EMULATE_BFLOAT16", "aarch64": "-march=armv8.2-a+bf16"}


@pytest.fixture(scope="module", params=TARGETS)
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command of the built driver."""
    compiler, emulator = tools(request.param)
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"no C++ compiler ({compiler[0]})")
    built = tmp_path_factory.mktemp("driver") / "driver"
    flags = [flag for flag in cpu_build.FLAGS if flag not in ("-shared", "-fPIC")]
    sources = ["-I", str(cpu_build.SOURCES), str(DRIVER), "-o", str(built)]
    subprocess.run(
        [*compiler, *flags, "-O1", TARGETS[request.param], *sources], check=True, capture_output=True
    )
    return [*emulator, str(built)]


def run(program: list[str], case: Case, dtype: torch.dtype, folder: Path) -> dict[str, Tensor]:
    """Output and gradients of a case, as `Inputs.run` gives them."""
    x = case.inputs(dtype)
    x = dataclasses.replace(x, leaves={name: leaf.detach() for name, leaf in x.leaves.items()})
    inputs = checked_inputs(x.leaves, x.layout, x.reset_settings, None)
    arguments, kept = compiled._arguments(inputs)
    head = bytes(arguments)[: 8 * len(compiled._INTEGERS) + 8]
    slopes_grad = case.alibi and not case.fixed_slopes
    tensors = {name: kept.get(name) for name in compiled._INPUTS}
    tensors["out"] = torch.empty_like(inputs.q)
    tensors["lse"] = torch.empty(*inputs.q.shape[1::-1], dtype=accumulation_dtype(dtype))
    tensors["grad_out"] = x.grad_out
    for name, of in zip(Gradients._fields, inputs.differentiable(slopes_grad)):
        kind = torch.float64 if name == "dslopes" else dtype
        tensors[name] = None if of is None else torch.zeros(of.shape, dtype=kind)
    written = [
        b"" if tensor is None else bytes(tensor.detach().contiguous().view(torch.uint8).numpy())
        for tensor in tensors.values()
    ]
    with (folder / "in").open("wb") as file:
        file.write(head + struct.pack("<q", dtype.itemsize))
        for content in written:
            file.write(struct.pack("<q", len(content)) + content)
    subprocess.run([*program, str(folder / "in"), str(folder / "out")], check=True)
    read, memory = {}, (folder / "out").read_bytes()
    for (name, tensor), content in zip(tensors.items(), written):
        part, memory = memory[: len(content)], memory[len(content) :]
        if tensor is not None and name in ("out", *Gradients._fields):
            read[name] = torch.frombuffer(bytearray(part), dtype=tensor.dtype).view(tensor.shape)
    assert not memory
    if slopes_grad:
        read["dalibi_slopes"] = read.pop("dslopes").to(x.leaves["alibi_slopes"].dtype)
    return read


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_parity(
    program: list[str], dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "multiplies_bfloat16", lambda: True)  # the program does
    for case in CASES:
        golden, budgets = golden_and_budgets(case, dtype, rounds_factors=dtype == torch.bfloat16)
        actual = run(program, case, dtype, tmp_path)
        testing.assert_within_budget(actual, golden, budgets, dtype)
