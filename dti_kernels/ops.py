"""Operator schemas, shapes without data, and which implementation runs on which device.

`dti::windowed_attn_fwd` and `dti::windowed_attn_bwd` take tensors and numbers only, so that they trace, compile and
checkpoint like any other operator. Anybody may call them, so they check what they get: kinds, shapes and devices always, and on a CPU also
that rows see what lies inside the batch. On a GPU that would be a wait per call: there it is `StreamLayout` that checks arrays which it has
not made. CUDA and ROCm tensors run the Triton kernels, CPU tensors the compiled `cpu_native.py`, or
`cpu.py` where there is no compiler. With TRITON_INTERPRET=1 in the environment CPU tensors run the Triton kernels too, in Triton's
interpreter. Triton is imported when a kernel is launched, never before.
"""

from __future__ import annotations

import functools
import os
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dti_kernels import isolation
from dti_kernels.contract import accumulation_dtype, check_inputs, check_memory, check_saved
from dti_kernels.cpu import blocks as cpu
from dti_kernels.cpu import compiled as cpu_native
from dti_kernels.layout import check_spans
from dti_kernels.private_folders import in_private_folder

_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? k_sum, Tensor? k_initial, Tensor? v_initial, Tensor? ratios, Tensor? slopes, "
    "Tensor rows, Tensor keys"
)
_LIBRARY = torch.library.Library("dti", "DEF")
_LIBRARY.define(f"windowed_attn_fwd({_INPUTS}, float scale, SymInt mean_span) -> (Tensor out, Tensor lse)")
_LIBRARY.define(
    f"windowed_attn_bwd(Tensor grad_out, {_INPUTS}, Tensor out, Tensor lse, float scale, SymInt mean_span, bool slopes_grad) -> "
    "(Tensor dq, Tensor dk, Tensor dv, Tensor dk_sum, Tensor dk_initial, Tensor dv_initial, Tensor dslopes)"
)


@functools.cache
def _triton_modules() -> tuple[ModuleType, ModuleType]:
    _give_triton_a_home()
    try:
        from dti_kernels.gpu import backward as triton_bwd
        from dti_kernels.gpu import forward as triton_fwd
    except ImportError as error:
        raise ImportError("windowed_attn on a GPU needs Triton: pip install triton") from error
    return triton_fwd, triton_bwd


def _give_triton_a_home() -> None:
    """Where nobody knows the user's home, Triton would keep compiled kernels beneath the current folder, and run what lies there."""
    if not {"TRITON_HOME", "TRITON_CACHE_DIR"} & os.environ.keys() and not os.path.isabs(
        os.path.expanduser("~/")
    ):
        os.environ["TRITON_HOME"] = in_private_folder(str)


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


# The arguments are those of the schema: stated there, in the fakes below and in each implementation.
# Without k_sum there is one key stream and one gradient of it. The kernels have two pointers to keys and always write both gradients.
def _fwd_triton(q: Tensor, k: Tensor, v: Tensor, k_sum: Tensor | None, *args: Any) -> tuple[Tensor, Tensor]:
    outputs: tuple[Tensor, Tensor] = _triton_modules()[0].forward(
        q, k, v, k if k_sum is None else k_sum, *args
    )
    return outputs


def _bwd_triton(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, k_sum: Tensor | None, *args: Any
) -> tuple[Tensor, ...]:
    keys, slopes_grad = k if k_sum is None else k_sum, args[-1]
    dq, dk, dv, dk_sum, *others, dslopes = _triton_modules()[1].backward(grad_out, q, k, v, keys, *args[:-1])
    if k_sum is None:
        dk, dk_sum = dk + dk_sum, q.new_empty(0)
    return dq, dk, dv, dk_sum, *others, dslopes if slopes_grad else q.new_empty(0)


def _widened(args: tuple[Any, ...]) -> list[Any]:
    """bfloat16 as float32: the interpreter computes with NumPy, which does not have it."""
    return [x.float() if isinstance(x, Tensor) and x.dtype == torch.bfloat16 else x for x in args]


# Inputs of the forward and, behind the gradient, of the backward.
_FORWARD, _BACKWARD = slice(0, 10), slice(1, 11)


def _check_fwd(*args: Any) -> None:
    check_inputs(*args[_FORWARD])


_NAMES = (
    "q",
    "k",
    "v",
    "k_sum",
    "reset.k_initial",
    "reset.v_initial",
    "ratios",
    "alibi_slopes",
    "rows",
    "keys",
)


def _check_memory(inputs: tuple[Any, ...]) -> None:
    for name, x in zip(_NAMES, inputs):
        if x is not None:
            check_memory(name, x)


def _check_bwd(*args: Any) -> None:
    check_inputs(*args[_BACKWARD])
    check_saved(args[0], args[1], *args[11:13])


def _fwd_gpu(*args: Any) -> tuple[Tensor, Tensor]:
    _check_fwd(*args)
    return _fwd_triton(*args)


def _bwd_gpu(*args: Any) -> tuple[Tensor, ...]:
    _check_bwd(*args)
    return _bwd_triton(*args)


def _fwd_cpu(*args: Any) -> tuple[Tensor, Tensor]:
    _check_fwd(*args)
    if not _interpreting() and cpu_native.available():  # which checks the spans itself
        return isolation.forward(cpu_native.forward, args[:8], *args[8:-1])
    _check_memory(args[_FORWARD])
    check_spans(*args[8:10])
    if _interpreting():
        out, lse = _fwd_triton(*_widened(args))
        return out.to(args[0].dtype), lse
    with torch.autocast("cpu", enabled=False):
        return isolation.forward(cpu.forward, args[:8], *args[8:-1])


def _bwd_cpu(*args: Any) -> tuple[Tensor, ...]:
    _check_bwd(*args)
    rows, keys, out, lse, scale, _, slopes_grad = args[9:]
    of_cpu = (args[0], args[1:9], rows, keys, out, lse, scale, slopes_grad)
    if not _interpreting() and cpu_native.available():
        return isolation.backward(cpu_native.backward, *of_cpu)
    _check_memory(args[_BACKWARD])
    check_spans(rows, keys)
    if _interpreting():
        grad_out, q, k, v, k_sum, k_initial, v_initial, _, slopes = args[:9]
        inputs = (q, k, v, k_sum, k_initial, v_initial, slopes)
        grads = _bwd_triton(*_widened(args))
        return tuple(grad.to(grad_out.dtype if x is None else x.dtype) for grad, x in zip(grads, inputs))
    with torch.autocast("cpu", enabled=False):
        return isolation.backward(cpu.backward, *of_cpu)


_LIBRARY.impl("windowed_attn_fwd", _fwd_cpu, "CPU")
_LIBRARY.impl("windowed_attn_bwd", _bwd_cpu, "CPU")
_LIBRARY.impl("windowed_attn_fwd", _fwd_gpu, "CUDA")
_LIBRARY.impl("windowed_attn_bwd", _bwd_gpu, "CUDA")


@torch.library.register_fake("dti::windowed_attn_fwd", lib=_LIBRARY)
def _fwd_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_sum: Tensor | None,
    k_initial: Tensor | None,
    v_initial: Tensor | None,
    ratios: Tensor | None,
    slopes: Tensor | None,
    rows: Tensor,
    keys: Tensor,
    scale: float,
    mean_span: int,
) -> tuple[Tensor, Tensor]:
    _check_fwd(q, k, v, k_sum, k_initial, v_initial, ratios, slopes, rows, keys)
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=accumulation_dtype(q.dtype))


@torch.library.register_fake("dti::windowed_attn_bwd", lib=_LIBRARY)
def _bwd_fake(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_sum: Tensor | None,
    k_initial: Tensor | None,
    v_initial: Tensor | None,
    ratios: Tensor | None,
    slopes: Tensor | None,
    rows: Tensor,
    keys: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    mean_span: int,
    slopes_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    _check_bwd(grad_out, q, k, v, k_sum, k_initial, v_initial, ratios, slopes, rows, keys, out, lse)

    def like(x: Tensor | None) -> Tensor:
        return q.new_empty(0) if x is None else x.new_empty(x.shape)

    return (
        like(q),
        like(k),
        like(v),
        like(k_sum),
        like(k_initial),
        like(v_initial),
        like(slopes if slopes_grad else None),
    )
