"""The precision that models compute in: float32, or bfloat16 where the hardware multiplies it itself.

    auto    bf16 where `has_bfloat16` says so, else fp32
    bf16    products in bfloat16 (autocast), on any hardware: without instructions for it they are emulated, slowly
    fp32    float32

Weights, residual stream, norms and optimizer are what they are in every precision. Imports PyTorch only where it is used, so that the
settings may know the names.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    import torch

Precision = Literal["auto", "bf16", "fp32"]
Resolved = Literal["bf16", "fp32"]
PRECISIONS: tuple[str, ...] = get_args(Precision)
# Of training and of scoring.
DEFAULT: Precision = "auto"

# In words, and as PyTorch's types.
WORDS: dict[Resolved, str] = {"bf16": "bfloat16", "fp32": "float32"}

_CPU_INFO = Path("/proc/cpuinfo")
# Flags of processors, and the names that people know; the faster first. Arm's kernels call theirs `bf16`.
_INSTRUCTIONS = {"amx_bf16": "AMX-BF16", "avx512_bf16": "AVX512-BF16", "bf16": "Arm's BF16"}


def processor_flags() -> frozenset[str]:
    """What this machine's processor can do, in Linux's words; empty where nobody says. All cores of a machine have the same."""
    try:
        with _CPU_INFO.open(errors="replace") as lines:
            for line in lines:
                name, _, words = line.partition(":")
                if name.strip() in ("flags", "Features"):  # on x86, on Arm
                    return frozenset(words.split())
    except OSError:  # no Linux
        pass
    return frozenset()


def _instructions() -> str | None:
    flags = processor_flags()
    return next((name for flag, name in _INSTRUCTIONS.items() if flag in flags), None)


def has_bfloat16(device: torch.device | str) -> bool:
    """Whether a device multiplies bfloat16 itself.

    CPUs and CUDA (ROCm too) are asked. Of any other device the answer is no: what bfloat16 does to speed and scores has been measured on
    none. It computes in bfloat16 if it is told to and PyTorch can.
    """
    import torch

    device = torch.device(device)
    if device.type == "cpu":
        return _instructions() is not None
    if device.type == "cuda" and torch.cuda.is_available():
        with torch.cuda.device(device):
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return False


def resolve(precision: Precision, device: torch.device | str) -> Resolved:
    """What a device computes in; every process has to ask for itself.

    Raises:
        ValueError: there is no such precision.
    """
    _check(precision, PRECISIONS)
    if precision == "auto":
        return "bf16" if has_bfloat16(device) else "fp32"
    return precision


def computing(
    resolved: Resolved, device: torch.device | str, cached: bool = True
) -> AbstractContextManager[object]:
    """The context that a model computes in, also within another autocast. Hold it over a whole loop of passes without gradients.

    Args:
        resolved: the precision.
        device: of the model.
        cached: keep weights that autocast casts for the next pass inside the context.

    Raises:
        ValueError: `resolved` is neither.
    """
    import torch

    _check(resolved, tuple(WORDS))
    return torch.autocast(
        torch.device(device).type, torch.bfloat16, enabled=resolved == "bf16", cache_enabled=cached
    )


def wants_few_shapes(resolved: Resolved, device: torch.device) -> bool:
    """Whether products are of shapes that PyTorch prepares code for, one by one: see `token_logits`."""
    return resolved == "bf16" and device.type == "cpu"


def _check(precision: object, known: tuple[str, ...]) -> None:
    if precision not in known:
        raise ValueError(f"precision must be one of {', '.join(known)}, got {precision!r:.60}")


def notice(
    precision: Precision, device: torch.device | str, option: str, began: Resolved | None = None
) -> str | None:
    """What `auto` means and how one chooses otherwise, in one line; None: the choice was the user's own.

    Args:
        precision: as the user gave it.
        device: of the model.
        option: that sets it, such as "--optim.precision".
        began: of a run that goes on, in this precision.
    """
    if precision != "auto":
        return None
    name, here = _name_of(device), resolve("auto", device)
    if began == "bf16" and here == "fp32":
        return f"goes on in bfloat16, as the run began, and slowly: {name}"
    if began == "fp32" and here == "bf16":
        return f"goes on in float32, as the run began; a new one here computes in bfloat16 ({name})"
    if here == "bf16":
        return f"computes in bfloat16 ({name}); {option} fp32 for float32"
    return f"computes in float32: {name}"


def _name_of(device: torch.device | str) -> str:
    """What computes in bfloat16, or why nothing does."""
    import torch

    device = torch.device(device)
    if device.type == "cpu":
        return _instructions() or "this processor has no bfloat16 instructions"
    if device.type != "cuda":
        return f"bfloat16 has not been measured on {device.type}"
    card = torch.cuda.get_device_name(device)
    return card if has_bfloat16(device) else f"{card} has no bfloat16 instructions"
