"""Which precision a device computes in; processors are made up, so that every machine runs the same tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dti_model import precision
from dti_model.precision import Precision, computing, has_bfloat16, notice, processor_flags, resolve

X86 = "processor\t: 0\nvendor_id\t: GenuineIntel\nflags\t\t: fpu avx512f {} ssse3\nbugs\t\t: bf16_not\n\nprocessor\t: 1\n"
ARM = "processor\t: 0\nBogoMIPS\t: 243.75\nFeatures\t: fp asimd {} i8mm\nCPU part\t: 0xd40\n"


def use_processor(monkeypatch: pytest.MonkeyPatch, *flags: str) -> None:
    monkeypatch.setattr(precision, "processor_flags", lambda: frozenset(flags))


@pytest.mark.parametrize(
    ("text", "has"),
    [
        (X86.format("avx512_bf16"), True),
        (X86.format("amx_bf16 amx_tile"), True),
        (X86.format("avx512_fp16 avx512bw"), False),
        (ARM.format("bf16"), True),
        (ARM.format("svebf16"), False),  # of vectors whose length PyTorch may not know
        ("", False),
    ],
)
def test_flags_of_a_processor(text: str, has: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(precision, "_CPU_INFO", tmp_path / "cpuinfo")
    assert has_bfloat16("cpu") is has


def test_no_file_says_what_the_processor_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_CPU_INFO", tmp_path / "no such file")
    assert processor_flags() == frozenset()
    assert not has_bfloat16("cpu")


@pytest.mark.parametrize(("told", "emulates", "has"), [(8, True, True), (7, True, False)])
def test_cuda_is_asked_without_emulation(
    told: int, emulates: bool, has: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NoDevice:
        def __init__(self, device: object) -> None:
            assert device == torch.device("cuda", 1)

        def __enter__(self) -> None: ...
        def __exit__(self, *_: object) -> None: ...

    def supported(including_emulation: bool = True) -> bool:
        return told >= 8 or (including_emulation and emulates)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", NoDevice)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Card")
    assert has_bfloat16("cuda:1") is has
    line = notice("auto", "cuda:1", "--precision")
    assert line == (
        "computes in bfloat16 (Card); --precision fp32 for float32"
        if has
        else "computes in float32: Card has no bfloat16 instructions"
    )


@pytest.mark.parametrize("device", ["mps", "xpu", "meta"])
def test_other_devices_compute_in_float32(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_processor(monkeypatch, "avx512_bf16")
    assert not has_bfloat16(device)
    assert resolve("bf16", device) == "bf16", "but do as they are told"
    assert notice("auto", device, "--x") == f"computes in float32: bfloat16 has not been measured on {device}"


@pytest.mark.parametrize(
    ("flags", "asked", "resolved", "line"),
    [
        (("avx512_bf16",), "auto", "bf16", "computes in bfloat16 (AVX512-BF16); --x fp32 for float32"),
        (
            ("avx512_bf16", "amx_bf16"),
            "auto",
            "bf16",
            "computes in bfloat16 (AMX-BF16); --x fp32 for float32",
        ),
        (("bf16",), "auto", "bf16", "computes in bfloat16 (Arm's BF16); --x fp32 for float32"),
        (("avx2",), "auto", "fp32", "computes in float32: this processor has no bfloat16 instructions"),
        (("avx512_bf16",), "fp32", "fp32", None),
        (("avx2",), "bf16", "bf16", None),
    ],
)
def test_what_is_asked_for_and_what_is_said(
    flags: tuple[str, ...],
    asked: Precision,
    resolved: str,
    line: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use_processor(monkeypatch, *flags)
    assert resolve(asked, "cpu") == resolved
    assert notice(asked, "cpu", "--x") == line


def test_context_that_models_compute_in() -> None:
    x = torch.ones(2, 2)
    with computing("bf16", torch.device("cpu")):
        assert (x @ x).dtype == torch.bfloat16
    with computing("fp32", "cpu"):
        assert (x @ x).dtype == torch.float32


@pytest.mark.parametrize("misspelt", ["float32", "FP32", "fp16", None, torch.float32])
def test_a_misspelt_precision_is_refused(misspelt: Any) -> None:
    """It computed in bfloat16, whatever it said."""
    with pytest.raises(ValueError, match="precision must be one of auto, bf16, fp32, got"):
        resolve(misspelt, "cpu")
    with pytest.raises(ValueError, match="precision must be one of bf16, fp32, got"):
        computing(misspelt, "cpu")


def test_float32_is_float32_within_a_callers_autocast() -> None:
    ones = torch.ones(2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        with computing("fp32", "cpu"):
            assert (ones @ ones).dtype == torch.float32
        with computing("bf16", "cpu"):
            assert (ones @ ones).dtype == torch.bfloat16
