"""Which CPU implementation computes: the compiled one, or the PyTorch fallback where there is no compiler.

The first use of the fallback warns and says why. DTI_CPU=torch in the environment chooses it, DTI_CPU=native makes a failed build an
error.
"""

from __future__ import annotations

import functools
import os
import warnings
from types import ModuleType

import torch
from torch import Tensor

from dti_kernels.contract import check_memory
from dti_kernels.cpu import blocks, compiled, isolation
from dti_kernels.inputs import Gradients, Inputs
from dti_kernels.layout import check_spans


def forward(x: Inputs) -> tuple[Tensor, Tensor]:
    """`out`, shape and dtype of q, and the natural log-sum-exp `(H, T or S)` in the accumulation dtype."""
    return isolation.forward(_implementation(x).forward, x)


def backward(x: Inputs, grad_out: Tensor, out: Tensor, lse: Tensor, slopes_grad: bool) -> Gradients:
    """The gradients, from what the forward returned."""
    return isolation.backward(_implementation(x).backward, x, grad_out, out, lse, slopes_grad)


def rounds_factors(dtype: torch.dtype) -> bool:
    """Whether probabilities and score gradients of inputs in `dtype` are rounded to it before products, as `dti_kernels.testing` has to know."""
    return dtype == torch.bfloat16 and _is_compiled() and compiled.multiplies_bfloat16()


def _implementation(x: Inputs) -> ModuleType:
    if _is_compiled():
        return compiled  # which checks memory and spans itself
    check_memory(x)
    check_spans(x.rows, x.keys)
    return blocks


def _is_compiled() -> bool:
    """Whether the compiled implementation is there and wanted; builds it the first time.

    Raises:
        ValueError: `DTI_CPU` is none of auto, native and torch.
        RuntimeError: `DTI_CPU=native`, and it cannot be built.
    """
    choice = os.environ.get("DTI_CPU") or "auto"
    if choice not in ("auto", "native", "torch"):
        raise ValueError(f"DTI_CPU must be one of auto, native, torch, got {choice!r}")
    if choice == "torch":
        return False
    library, error = compiled.library()
    if library is None:
        if choice == "native":
            raise RuntimeError(f"DTI_CPU=native, but it was not built: {error}")
        _warn(error)
    return library is not None


@functools.cache
def _warn(error: str) -> None:
    warnings.warn(
        f"attention on CPUs runs in PyTorch, more slowly than its C++ would: {error}. DTI_CPU=torch silences this",
        stacklevel=2,
    )
