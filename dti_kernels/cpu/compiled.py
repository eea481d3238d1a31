"""The compiled CPU implementation: calls `native/attention.cpp`, which `build.py` compiles and keeps."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from dti_kernels.contract import PUBLIC_NAMES, accumulation_dtype, check_storage
from dti_kernels.cpu import build
from dti_kernels.cpu.isolation import NotFinite
from dti_kernels.inputs import Gradients, Inputs
from dti_kernels.layout import check_spans

_INTEGERS = (
    *("num_rows", "num_context", "num_skipped", "num_heads", "num_groups", "head_dim"),
    *("num_ratios", "num_threads"),
)
_INPUTS = Inputs._fields[: Inputs._fields.index("rows") + 1]
_POINTERS = (*_INPUTS, "out", "lse", "grad_out", *Gradients._fields, "key_gradients", "parallel")
# `Status` of attention.cpp: the rows are of no layout, a number is not finite.
_NO_LAYOUT, _NOT_FINITE = 2, 3


class _Arguments(ctypes.Structure):
    """`Arguments` of native/segments.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in _INTEGERS),
        ("scale", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in _POINTERS),
        ("is_cleared", ctypes.c_int64),
    ]


@functools.cache
def library() -> tuple[ctypes.CDLL | None, str]:
    """The loaded library, or None and why not."""
    try:
        return build.library(_check), ""
    except build.BuildError as error:
        return None, str(error)


def multiplies_bfloat16() -> bool:
    """Whether the library multiplies bfloat16 as it is: the compiler knew instructions of this processor for it (AVX512-BF16, Arm's bfdot).

    Probabilities and score gradients are then rounded to bfloat16, as on GPUs. Elsewhere bfloat16 is computed in float32.
    """
    loaded, _ = library()
    return hasattr(loaded, "dti_forward_bfloat16")


def _computed_in(dtype: torch.dtype) -> torch.dtype:
    """The dtype that the library reads inputs of `dtype` in, and writes outputs."""
    return dtype if dtype == torch.bfloat16 and multiplies_bfloat16() else accumulation_dtype(dtype)


def _check(library: ctypes.CDLL) -> None:
    for name in ("size_of_arguments", "num_gradients_float32", "num_gradients_float64"):
        getattr(library, f"dti_{name}").restype = ctypes.c_int64
    if library.dti_size_of_arguments() != ctypes.sizeof(_Arguments):
        raise AttributeError("it was built for other arguments")


@functools.cache
def _openmp_parallel() -> int | None:
    """Address of GOMP_parallel in the OpenMP runtime that PyTorch runs on: its threads, and no second pool that fights for cores.

    Other packages (scikit-learn) bring copies of their own: the copy beside PyTorch comes first.
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
    """In `dtype`, row after row; raises what `check_storage` does."""
    check_storage(PUBLIC_NAMES.get(name, name), x)
    return x if x.dtype == dtype and x.is_contiguous() else x.to(dtype).contiguous()


def _arguments(x: Inputs, is_cleared: bool = False) -> tuple[_Arguments, dict[str, Tensor]]:
    """The inputs as the library wants them, and the tensors that must outlive the call."""
    dtype = _computed_in(x.q.dtype)
    dtypes = {"rows": torch.int32, **dict.fromkeys(("ratios", "slopes"), accumulation_dtype(dtype))}
    given = {name: getattr(x, name) for name in _INPUTS}
    kept = {
        name: _in_memory(name, tensor, dtypes.get(name, dtype))
        for name, tensor in given.items()
        if tensor is not None
    }
    arguments = _Arguments(
        num_rows=x.rows.shape[1],
        num_context=x.num_context,
        num_skipped=x.num_skipped,
        num_heads=x.q.shape[1],
        num_groups=x.k.shape[1],
        head_dim=x.q.shape[2],
        num_ratios=0 if x.ratios is None else len(x.ratios),
        num_threads=torch.get_num_threads(),
        scale=x.scale,
        parallel=_openmp_parallel(),
        is_cleared=is_cleared,
        **{name: tensor.data_ptr() for name, tensor in kept.items()},
    )
    return arguments, kept


def _call(name: str, arguments: _Arguments, dtype: torch.dtype) -> int:
    loaded, error = library()
    assert loaded is not None, error
    result: int = getattr(loaded, f"dti_{name}_{str(dtype).removeprefix('torch.')}")(ctypes.byref(arguments))
    return result


def _refuse(status: int, x: Inputs) -> NoReturn:
    """Raise the error of a status that is not 0."""
    if status == _NOT_FINITE:
        raise NotFinite
    if status == _NO_LAYOUT:
        check_spans(x.rows, x.keys)
        raise ValueError("the layout's rows changed while windowed_attn read them")
    raise MemoryError(f"windowed_attn: no memory for a pass of {x.rows.shape[1]} rows")


def forward(x: Inputs, is_cleared: bool = False) -> tuple[Tensor, Tensor]:
    """`out` and the log-sum-exp, with the arguments and errors of `blocks.forward`."""
    arguments, kept = _arguments(x, is_cleared)
    out = torch.empty_like(kept["q"])
    lse = out.new_empty(x.q.shape[1], x.q.shape[0], dtype=accumulation_dtype(out.dtype))
    arguments.out, arguments.lse = out.data_ptr(), lse.data_ptr()
    if status := _call("forward", arguments, out.dtype):
        _refuse(status, x)
    return out.to(x.q.dtype), lse


def backward(
    x: Inputs, grad_out: Tensor, out: Tensor, lse: Tensor, slopes_grad: bool, is_cleared: bool = False
) -> Gradients:
    """The gradients, with the arguments and errors of `blocks.backward`."""
    arguments, kept = _arguments(x, is_cleared)
    dtype = kept["q"].dtype
    sums = accumulation_dtype(dtype)
    for name, saved, of_saved in (("grad_out", grad_out, dtype), ("out", out, dtype), ("lse", lse, sums)):
        kept[name] = _in_memory(name, saved, of_saved)
        setattr(arguments, name, kept[name].data_ptr())
    of, grads = x.differentiable(slopes_grad), []
    for name, like in zip(Gradients._fields, of):
        if like is None:
            grads.append(x.q.new_empty(0))
            continue
        # The C++ adds to the gradient of slopes, and writes the others.
        make, kind = (torch.zeros, torch.float64) if name == "dslopes" else (torch.empty, dtype)
        grads.append(make(like.shape, dtype=kind))
        setattr(arguments, name, grads[-1].data_ptr())
    num_gradients = _call("num_gradients", arguments, sums)
    if num_gradients < 0:
        _refuse(-num_gradients, x)
    key_gradients = torch.empty(num_gradients, dtype=sums)
    arguments.key_gradients = key_gradients.data_ptr()
    if status := _call("backward", arguments, dtype):
        _refuse(status, x)
    return Gradients(*(grad if like is None else grad.to(like.dtype) for grad, like in zip(grads, of)))
