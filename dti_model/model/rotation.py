"""Rotary positions.

x = (a, b)  ->  (a cos - b sin, b cos + a sin)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import rotate_half


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rows turned by their positions.

    Args:
        x: `(rows, heads, D)`.
        cos: `(rows, D)` in x's dtype, whose halves are equal; so is sin.
        sin: likewise.

    In 16 bits it takes half the time of Transformers' formula, forward and backward: no half is negated, put together or
    padded with zeros. In float32, and for a compiler, which fuses it, it is that formula.
    """
    cos, sin = cos[:, None], sin[:, None]
    if x.dtype.itemsize > 2 or torch.compiler.is_compiling():
        rotated: Tensor = x * cos + rotate_half(x) * sin
    else:
        rotated = _Rotation.apply(x, cos, sin)
    return rotated


class _Rotation(torch.autograd.Function):
    """Its gradient is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        half = x.shape[-1] // 2
        out = torch.empty_like(x)
        lower, upper = slice(half), slice(half, None)
        for to, other, sign in ((lower, upper, -1.0), (upper, lower, 1.0)):
            torch.mul(x[..., to], cos[..., to], out=out[..., to])
            out[..., to].addcmul_(x[..., other], sin[..., to], value=sign)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        cos, sin = ctx.saved_tensors
        return _Rotation.apply(grads[0], cos, -sin), None, None
