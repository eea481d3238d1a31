"""Operator schemas, shapes without data, and the implementation of each device.

`dti::windowed_attn_fwd` and `dti::windowed_attn_bwd` take the fields of `Inputs`: tensors and numbers only, so that they trace, compile
and checkpoint like any other operator. Anybody may call them, so they check their arguments: kinds, shapes and devices always, spans on
CPUs only. On a GPU a check of spans would wait for the device in every call; `StreamLayout` checks arrays that it has not made. There, a call
like one that has been checked is not checked again: `gpu/replay.py`.

CUDA and ROCm tensors run the Triton kernels of `gpu/`, CPU tensors the implementations of `cpu/`. With TRITON_INTERPRET=1 in the
environment CPU tensors run the Triton kernels too, in Triton's interpreter. Triton is imported at the first launch, not before.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable
from typing import Any, get_type_hints

import torch
from torch import Tensor

from dti_kernels import cpu
from dti_kernels.contract import accumulation_dtype, check_inputs, check_memory, check_saved
from dti_kernels.inputs import Gradients, Inputs
from dti_kernels.layout import check_spans
from dti_kernels.private_folders import in_private_folder

_KINDS = {Tensor: "Tensor", Tensor | None: "Tensor?", float: "float", int: "SymInt"}
_INPUTS = ", ".join(f"{_KINDS[kind]} {name}" for name, kind in get_type_hints(Inputs).items())
_NUM_INPUTS = len(Inputs._fields)
_GRADIENTS = ", ".join(f"Tensor {name}" for name in Gradients._fields)
_LIBRARY = torch.library.Library("dti", "DEF")
_LIBRARY.define(f"windowed_attn_fwd({_INPUTS}) -> (Tensor out, Tensor lse)")
_LIBRARY.define(
    f"windowed_attn_bwd({_INPUTS}, Tensor grad_out, Tensor out, Tensor lse, bool slopes_grad) -> ({_GRADIENTS})"
)


@functools.cache
def _triton() -> tuple[Callable[[Inputs], tuple[Tensor, Tensor]], Callable[..., Gradients]]:
    _give_triton_a_home()
    try:
        from dti_kernels.gpu import run_backward, run_forward
    except ImportError as error:
        raise ImportError("windowed_attn on a GPU needs Triton: pip install triton") from error
    return run_forward, run_backward


def _give_triton_a_home() -> None:
    """Without a home, Triton would keep compiled kernels beneath the current folder, and run those that it finds there."""
    chosen = {"TRITON_HOME", "TRITON_CACHE_DIR"} & os.environ.keys()
    if not chosen and not os.path.isabs(os.path.expanduser("~/")):
        os.environ["TRITON_HOME"] = in_private_folder(str)


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def _widened(values: Iterable[Any]) -> list[Any]:
    """bfloat16 as float32: the interpreter computes with NumPy, which does not have it."""
    return [x.float() if isinstance(x, Tensor) and x.dtype == torch.bfloat16 else x for x in values]


def _fwd_gpu(*args: Any) -> tuple[Tensor, Tensor]:
    return _triton()[0](Inputs(*args))  # checks what it has not seen the like of


def _bwd_gpu(*args: Any) -> Gradients:
    return _triton()[1](Inputs(*args[:_NUM_INPUTS]), *args[_NUM_INPUTS:])


def _fwd_cpu(*args: Any) -> tuple[Tensor, Tensor]:
    x = Inputs(*args)
    check_inputs(x)
    if not _interpreting():
        return cpu.forward(x)
    _check_values(x)
    out, lse = _triton()[0](Inputs(*_widened(x)))
    return out.to(x.q.dtype), lse


def _bwd_cpu(*args: Any) -> Gradients:
    x, others = Inputs(*args[:_NUM_INPUTS]), args[_NUM_INPUTS:]
    check_inputs(x)
    check_saved(x, *others[:3])
    if not _interpreting():
        return cpu.backward(x, *others)
    _check_values(x)
    grads = _triton()[1](Inputs(*_widened(x)), *_widened(others))
    dtypes = (x.q.dtype if of is None else of.dtype for of in x.differentiable(others[-1]))
    return Gradients(*(grad.to(dtype) for grad, dtype in zip(grads, dtypes)))


def _check_values(x: Inputs) -> None:
    check_memory(x)
    check_spans(x.rows, x.keys)


_LIBRARY.impl("windowed_attn_fwd", _fwd_cpu, "CPU")
_LIBRARY.impl("windowed_attn_bwd", _bwd_cpu, "CPU")
_LIBRARY.impl("windowed_attn_fwd", _fwd_gpu, "CUDA")
_LIBRARY.impl("windowed_attn_bwd", _bwd_gpu, "CUDA")


@torch.library.register_fake("dti::windowed_attn_fwd", lib=_LIBRARY)
def _fwd_fake(*args: Any) -> tuple[Tensor, Tensor]:
    x = Inputs(*args)
    check_inputs(x)
    q = x.q
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=accumulation_dtype(q.dtype))


@torch.library.register_fake("dti::windowed_attn_bwd", lib=_LIBRARY)
def _bwd_fake(*args: Any) -> Gradients:
    x, (*saved, slopes_grad) = Inputs(*args[:_NUM_INPUTS]), args[_NUM_INPUTS:]
    check_inputs(x)
    check_saved(x, *saved)
    of = x.differentiable(slopes_grad)
    return Gradients(*(x.q.new_empty(0) if like is None else like.new_empty(like.shape) for like in of))
