"""Checks of the operators' inputs: kind, shape, dtype and device of every tensor, and the error of all others. Reads no values.

`windowed_attn` and the reference check their callers' arguments here; the registered operators, which anybody may call, check again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

from dti_kernels.counts import real, shown
from dti_kernels.inputs import Inputs
from dti_kernels.layout import StreamLayout, check_arrays
from dti_kernels.reset import HiddenStateReset

# Inputs that callers know by another name.
PUBLIC_NAMES = {"k_initial": "reset.k_initial", "v_initial": "reset.v_initial", "slopes": "alibi_slopes"}
_PUBLIC_FIELDS = tuple(PUBLIC_NAMES.get(name, name) for name in Inputs._fields)
_AUTOCAST_FROM = (torch.float16, torch.bfloat16, torch.float32)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that scores, softmax and sums are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_tensors(named: Mapping[str, object]) -> None:
    """Raise TypeError unless all are dense tensors with strides: the operators are registered for no others."""
    for name, x in named.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(x).__name__}")
        if x.layout is not torch.strided or x.is_nested:
            kind = "a nested tensor" if x.is_nested else f"one of {x.layout}"
            raise TypeError(f"{name} must be a strided tensor, got {kind}")


def checked_inputs(
    tensors: Mapping[str, Tensor | None],
    layout: StreamLayout,
    reset: HiddenStateReset | None,
    scale: float | None,
    autocast: bool = False,
) -> Inputs:
    """The operators' inputs from the arguments of `windowed_attn`.

    Args:
        tensors: `q`, `k`, `v`, `k_sum` and `alibi_slopes`; the last two may be None or missing.
        layout: as there, like `reset` and `scale`.
        autocast: whether an enabled autocast casts the inputs; float64 and slopes stay as they are.

    Raises:
        TypeError, ValueError: as `windowed_attn`.
    """
    if not isinstance(layout, StreamLayout):
        raise TypeError(f"layout must be a StreamLayout, got {type(layout).__name__}")
    if not (reset is None or isinstance(reset, HiddenStateReset)):
        raise TypeError(f"reset must be a HiddenStateReset, got {type(reset).__name__}")
    given: dict[str, Any] = {
        name: x for name, x in tensors.items() if x is not None or name in ("q", "k", "v")
    }
    if reset is not None:
        given |= {"reset.k_initial": reset.k_initial, "reset.v_initial": reset.v_initial}
    check_tensors(given)
    q = given["q"]
    if autocast and not q.is_meta and torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        for name, x in given.items():
            if name != "alibi_slopes" and x.dtype in _AUTOCAST_FROM:
                given[name] = x.to(dtype)
    if reset is not None:
        dtype = accumulation_dtype(q.dtype)
        given["ratios"] = reset.ratios(layout.reset_window, dtype, layout.device, farthest=layout.num_context)
    given["rows"], given["keys"], given["mean_span"] = layout.rows, layout.keys, layout.mean_span
    given["scale"] = 1.0
    x = Inputs._make(map(given.get, _PUBLIC_FIELDS))
    check_inputs(x)
    number = x.q.shape[2] ** -0.5 if scale is None else real("scale", scale)
    if not 0.0 <= number < math.inf:
        raise ValueError(f"scale must be finite and >= 0, got {shown(scale)}")
    given["scale"] = number
    return Inputs._make(map(given.get, _PUBLIC_FIELDS))


def check_inputs(x: Inputs) -> None:
    """Raise TypeError or ValueError unless the operators' inputs fit each other."""
    q, k, v, k_sum, k_initial, v_initial, ratios, slopes, rows, keys, _, _ = x
    check_arrays(rows, keys)
    if (k_initial is None) != (v_initial is None) or (k_initial is None) != (ratios is None):
        raise ValueError("reset.k_initial, reset.v_initial and ratios must be given together")
    shape, of_keys = q.shape, k.shape
    dtype, device, num_rows, num_context = q.dtype, rows.device, rows.shape[1], keys.shape[1]
    if len(shape) != 3 or len(of_keys) != 3:
        name, got = ("q", shape) if len(shape) != 3 else ("k", of_keys)
        raise ValueError(f"{name} must be (rows, heads, head_dim), got shape {tuple(got)}")
    num_queries, num_heads, head_dim = shape
    num_groups = of_keys[1]
    if dtype not in DTYPES:
        raise TypeError(f"q must be of float16, bfloat16, float32 or float64, got {dtype}")
    if head_dim < 1:
        raise ValueError(f"q must have a head_dim of at least 1, got shape {tuple(shape)}")
    if num_heads < 1 or num_groups < 1 or num_heads % num_groups:
        raise ValueError(
            f"q's heads must be a multiple of k's heads, each at least 1, got {num_heads} and {num_groups}"
        )
    # q may hold the [SUM] rows only.
    of_queries = num_queries if num_queries == num_rows - num_context else num_rows
    for_keys, for_context = (num_rows, num_groups, head_dim), (num_context, num_groups, head_dim)
    for name, tensor, expected in (
        ("q", q, (of_queries, num_heads, head_dim)),
        ("k", k, for_keys),
        ("v", v, for_keys),
        ("k_sum", k_sum, for_keys),
        ("reset.k_initial", k_initial, for_context),
        ("reset.v_initial", v_initial, for_context),
    ):
        if tensor is not None and not (
            tensor.shape == expected and tensor.dtype == dtype and tensor.device == device
        ):
            _refuse(
                name, tensor, dtype, device, expected, f" for this layout (T = {num_rows}, C = {num_context})"
            )
    if slopes is not None and not (
        slopes.shape == (num_heads,) and slopes.dtype in DTYPES and slopes.device == device
    ):
        _refuse_table("alibi_slopes", slopes, f"({num_heads},)", device)
    if ratios is not None and not (
        ratios.ndim == 1
        and ratios.shape[0] > 0
        and ratios.dtype in DTYPES
        and ratios.device == device
        and ratios.is_contiguous()
    ):
        _refuse_table("ratios", ratios, "(n,), n at least 1, contiguous", device)


def check_saved(x: Inputs, grad_out: Tensor, out: Tensor, lse: Tensor) -> None:
    """Raise TypeError or ValueError unless the backward's other arguments fit the queries."""
    shape, dtype, device = x.q.shape, x.q.dtype, x.q.device
    for name, tensor, expected, kind in (
        ("grad_out", grad_out, shape, dtype),
        ("out", out, shape, dtype),
        ("lse", lse, (shape[1], shape[0]), accumulation_dtype(dtype)),
    ):
        if not (tensor.shape == expected and tensor.dtype == kind and tensor.device == device):
            _refuse(name, tensor, kind, device, tuple(expected), "")


def check_memory(x: Inputs) -> None:
    """Raise ValueError where the storage of a CPU tensor was freed or made smaller: nothing else notices before it is read."""
    for name, tensor in x._asdict().items():
        if isinstance(tensor, Tensor):
            check_storage(PUBLIC_NAMES.get(name, name), tensor)


def check_storage(name: str, x: Tensor) -> None:
    """The same of one tensor."""
    numbers = x.numel()
    if numbers and not x.is_contiguous():
        numbers = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride()))
    needed, there = (x.storage_offset() + numbers) * x.element_size(), x.untyped_storage().nbytes()
    if numbers and there < needed:
        raise ValueError(
            f"{name} must have {needed:,} bytes of memory for its shape, its storage has {there:,}"
        )


def _refuse(
    name: str, x: Tensor, dtype: torch.dtype, device: torch.device, expected: tuple[int, ...], where: str
) -> NoReturn:
    if x.dtype != dtype:
        raise TypeError(f"{name} must have q's floating point dtype ({dtype}), got {x.dtype}")
    _check_device(name, x, device)
    if x.ndim != len(expected):
        raise ValueError(f"{name} must be (rows, heads, head_dim), got shape {tuple(x.shape)}")
    raise ValueError(f"{name} must have shape {expected}{where}, got {tuple(x.shape)}")


def _refuse_table(name: str, x: Tensor, shape: str, device: torch.device) -> NoReturn:
    _check_device(name, x, device)
    raise ValueError(
        f"{name} must be floating point of shape {shape}, got {x.dtype} of shape {tuple(x.shape)}"
    )


def _check_device(name: str, x: Tensor, device: torch.device) -> None:
    if x.device != device:
        raise ValueError(f"{name} is on {x.device}, the layout on {device}: use layout.to(...)")
