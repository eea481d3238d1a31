"""Calls `native/attention.cpp`, the compiled CPU implementation of the operators, which `cpu_build.py` compiles and keeps.

Where it cannot be had, `cpu.py` computes the same in PyTorch, and a warning says why, once. Environment: `DTI_CPU=torch` chooses the
PyTorch implementation, `DTI_CPU=native` makes a failed build an error.
"""

from __future__ import annotations

import ctypes
import functools
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from dti_kernels.contract import check_memory
from dti_kernels.cpu import build as cpu_build
from dti_kernels.isolation import NotFinite
from dti_kernels.layout import check_spans

CHOICES = ("auto", "native", "torch")

_INTEGERS = (
    "num_rows",
    "num_context",
    "num_skipped",
    "num_heads",
    "num_groups",
    "head_dim",
    "num_ratios",
    "num_threads",
)
_POINTERS = (
    *("q", "k", "v", "k_sum", "k_initial", "v_initial", "ratios", "slopes", "rows"),
    *("out", "lse", "grad_out", "dq", "dk", "dv", "dk_sum", "dk_initial", "dv_initial", "dslopes"),
    *("key_gradients", "parallel"),
)
# What attention.cpp returns for rows that are of no layout, and for numbers that are not finite.
_NO_LAYOUT, _NOT_FINITE = 2, 3


class _Arguments(ctypes.Structure):
    """`Arguments` of native/segments.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in _INTEGERS),
        ("scale", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in _POINTERS),
        ("is_cleared", ctypes.c_int64),
    ]


def available() -> bool:
    """Whether the compiled implementation is there and wanted; builds it the first time.

    Raises:
        ValueError: `DTI_CPU` is none of auto, native and torch.
        RuntimeError: `DTI_CPU=native`, and it cannot be built.
    """
    choice = os.environ.get("DTI_CPU") or "auto"
    if choice not in CHOICES:
        raise ValueError(f"DTI_CPU must be one of {', '.join(CHOICES)}, got {choice!r}")
    if choice == "torch":
        return False
    library, error = _build()
    if library is None and choice == "native":
        raise RuntimeError(f"DTI_CPU=native, but it was not built: {error}")
    if library is None:
        _warn(error)
    return library is not None


@functools.cache
def _build() -> tuple[ctypes.CDLL | None, str]:
    """The loaded library, or None and why not."""
    try:
        return cpu_build.library(_check), ""
    except cpu_build.BuildError as error:
        return None, str(error)


def _check(library: ctypes.CDLL) -> None:
    for name in ("size_of_arguments", "num_gradients_float32", "num_gradients_float64"):
        getattr(library, f"dti_{name}").restype = ctypes.c_int64
    if library.dti_size_of_arguments() != ctypes.sizeof(_Arguments):
        raise AttributeError("it was built for other arguments")


@functools.cache
def _warn(error: str) -> None:
    warnings.warn(
        f"attention on CPUs runs in PyTorch, more slowly than its C++ would: {error}. DTI_CPU=torch silences this",
        stacklevel=2,
    )


@functools.cache
def _openmp_parallel() -> int | None:
    """Address of GOMP_parallel in the OpenMP runtime that PyTorch runs on: its threads, and no second pool that fights for cores.

    Other packages (scikit-learn) bring copies of their own: the one beside PyTorch comes first.
    """
    mapped = (line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines())
    loaded = {Path(path) for path in mapped if path.startswith("/") and "omp" in Path(path).name}
    pytorch = Path(torch.__file__).resolve().parent  # as the maps have it
    for path in sorted(loaded, key=lambda path: (pytorch not in path.parents, path)):
        try:
            return ctypes.cast(ctypes.CDLL(str(path)).GOMP_parallel, ctypes.c_void_p).value
        except (OSError, AttributeError):
            continue
    return None


def _in_memory(name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
    """In `dtype`, row after row; raises what `check_memory` does."""
    check_memory(name, x)
    return x if x.dtype == dtype and x.is_contiguous() else x.to(dtype).contiguous()


def _arguments(
    tensors: Sequence[Tensor | None], rows: Tensor, keys: Tensor, scale: float, num_groups: int
) -> tuple[_Arguments, list[Tensor]]:
    """The inputs as the library wants them, and the tensors that must outlive the call."""
    names = ("q", "k", "v", "k_sum", "k_initial", "v_initial", "ratios", "slopes")
    q = tensors[0]
    assert q is not None
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    kept = {name: _in_memory(name, x, dtype) for name, x in zip(names, tensors) if x is not None}
    kept["rows"] = _in_memory("rows", rows, torch.int32)
    ratios = kept.get("ratios")
    arguments = _Arguments(
        num_rows=rows.shape[1],
        num_context=keys.shape[1],
        num_skipped=rows.shape[1] - q.shape[0],
        num_heads=q.shape[1],
        num_groups=num_groups,
        head_dim=q.shape[2],
        num_ratios=0 if ratios is None else len(ratios),
        num_threads=torch.get_num_threads(),
        scale=scale,
        parallel=_openmp_parallel(),
        **{name: x.data_ptr() for name, x in kept.items()},
    )
    return arguments, list(kept.values())


def _call(name: str, arguments: _Arguments, dtype: torch.dtype) -> int:
    library, error = _build()
    assert library is not None, error
    suffix = "float64" if dtype == torch.float64 else "float32"
    result: int = getattr(library, f"dti_{name}_{suffix}")(ctypes.byref(arguments))
    return result


def _refuse(status: int, rows: Tensor, keys: Tensor) -> NoReturn:
    """Raise what a status that is not 0 stands for."""
    if status == _NOT_FINITE:
        raise NotFinite
    if status == _NO_LAYOUT:
        check_spans(rows, keys)
        raise ValueError("the layout's rows changed while windowed_attn read them")
    raise MemoryError(f"windowed_attn: no memory for a pass of {rows.shape[1]} rows")


def forward(
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
    is_cleared: bool = False,
) -> tuple[Tensor, Tensor]:
    """As `cpu.forward`, which see for what is raised."""
    inputs = (q, k, v, k_sum, k_initial, v_initial, ratios, slopes)
    arguments, kept = _arguments(inputs, rows, keys, scale, k.shape[1])
    arguments.is_cleared = is_cleared
    out = torch.empty_like(kept[0])
    lse = out.new_empty(q.shape[1], q.shape[0])
    arguments.out, arguments.lse = out.data_ptr(), lse.data_ptr()
    if status := _call("forward", arguments, out.dtype):
        _refuse(status, rows, keys)
    return out.to(q.dtype), lse


def backward(
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
    slopes_grad: bool,
    is_cleared: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `cpu.backward`, which see for what is raised."""
    inputs = (q, k, v, k_sum, k_initial, v_initial, ratios, slopes)
    arguments, kept = _arguments(inputs, rows, keys, scale, k.shape[1])
    arguments.is_cleared = is_cleared
    dtype = kept[0].dtype
    d_out, outputs = _in_memory("grad_out", grad_out, dtype), _in_memory("out", out, dtype)
    lse = _in_memory("lse", lse, dtype)
    arguments.grad_out, arguments.out, arguments.lse = d_out.data_ptr(), outputs.data_ptr(), lse.data_ptr()
    grads = {}
    for name, x in zip(("dq", "dk", "dv", "dk_sum", "dk_initial", "dv_initial"), inputs):
        if x is not None:
            grads[name] = torch.empty(x.shape, dtype=dtype)
            setattr(arguments, name, grads[name].data_ptr())
    if slopes is not None and slopes_grad:
        grads["dslopes"] = torch.zeros(slopes.shape, dtype=torch.float64)
        arguments.dslopes = grads["dslopes"].data_ptr()
    num_gradients = _call("num_gradients", arguments, dtype)
    if num_gradients < 0:
        _refuse(-num_gradients, rows, keys)
    key_gradients = torch.empty(num_gradients, dtype=dtype)
    arguments.key_gradients = key_gradients.data_ptr()
    if status := _call("backward", arguments, dtype):
        _refuse(status, rows, keys)

    def like(name: str, x: Tensor | None) -> Tensor:
        return grads[name].to(x.dtype) if x is not None and name in grads else q.new_empty(0)

    return (
        like("dq", q),
        like("dk", k),
        like("dv", v),
        like("dk_sum", k_sum),
        like("dk_initial", k_initial),
        like("dv_initial", v_initial),
        like("dslopes", slopes),
    )
