"""RMS norms of a bfloat16 pass on a CPU, in as few passes over memory as PyTorch's operators allow.

    h = x + added                                                    float32, the residual stream; without `added`, h = x
    rows = weight h / sqrt(mean(h^2) + eps)                          rounded to bfloat16 once, as projections take them

Every intermediate of Hugging Face's norms and of their gradients is a tensor as large as the hidden states, which a CPU writes to memory and
reads again. Here some rows at a time go through all steps, and what lies between stays in the caches. The gradient of the weight is summed
block after block. Anywhere else, in float32 and on GPUs, the model's own norms compute.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

# Of one formula: float32 inside, weight times the normed rows.
_NORMS = (LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm)
_BLOCK = 2**18  # numbers at a time: a megabyte in float32


def normed(norm: nn.Module, x: Tensor) -> Tensor:
    """`norm(x)` as the projections take it: under autocast in its dtype, cast once and not once a projection."""
    if _in_blocks(norm, x):
        rows: Tensor = _Norm.apply(x, norm.weight, norm.variance_epsilon)
        return rows
    rows = norm(x)
    kind = rows.device.type
    if rows.dtype != torch.float32 or not torch.is_autocast_enabled(kind):
        return rows
    return rows.to(torch.get_autocast_dtype(kind))


def added_and_normed(x: Tensor, added: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """`x + added`, and `normed` of it."""
    if _in_blocks(norm, x) and added.dtype == torch.bfloat16:
        both: tuple[Tensor, Tensor] = _AddedNorm.apply(x, added, norm.weight, norm.variance_epsilon)
        return both
    x = x + added
    return x, normed(norm, x)


def _in_blocks(norm: nn.Module, x: Tensor) -> bool:
    """Whether a norm of a known formula, to which nobody listens, reads the residual stream of a bfloat16 pass on a CPU."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and type(norm) in _NORMS
        and norm.weight.dtype == torch.float32
        and not (norm._forward_hooks or norm._forward_pre_hooks or norm._backward_hooks)
        and torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
        and not torch.compiler.is_compiling()
    )


def _blocks(rows: Tensor) -> Iterator[slice]:
    step = max(1, _BLOCK // rows.shape[-1])
    return (slice(first, first + step) for first in range(0, len(rows), step))


def _norm_forward(h: Tensor, weight: Tensor, eps: float, scale: Tensor, rows: Tensor) -> None:
    """A block of `h (B, E)`: fills `scale (B, 1)`, one over the root of its mean square, and `rows (B, E)`."""
    square = torch.linalg.vector_norm(h, dim=-1, keepdim=True).square_()
    torch.rsqrt(square.div_(h.shape[-1]).add_(eps), out=scale)
    rows.copy_(torch.mul(h, scale).mul_(weight))


def _norm_backward(
    grad: Tensor, h: Tensor, scale: Tensor, weight: Tensor, dh: Tensor, dweight: Tensor
) -> None:
    """A block: fills `dh`, adds to `dweight`.

    With n = scale h:  dweight = sum over rows of grad n;  dh = scale (grad weight - n mean(grad weight n)).
    """
    grad = grad.float()
    n = torch.mul(h, scale)
    products = grad * n
    dweight += products.sum(0)
    mean = torch.mv(products, weight).div_(h.shape[-1]).unsqueeze(-1)
    torch.mul(grad.mul_(weight).addcmul_(n, mean, value=-1), scale, out=dh)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        h = x.reshape(-1, x.shape[-1])
        rows, scale = torch.empty(h.shape, dtype=torch.bfloat16), h.new_empty(len(h), 1)
        for block in _blocks(h):
            _norm_forward(h[block], weight, eps, scale[block], rows[block])
        ctx.save_for_backward(h, weight, scale)
        return rows.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        h, weight, scale = ctx.saved_tensors
        of_rows, dh, dweight = grad.reshape(h.shape), torch.empty_like(h), torch.zeros_like(weight)
        for block in _blocks(h):
            _norm_backward(of_rows[block], h[block], scale[block], weight, dh[block], dweight)
        return dh.view(grad.shape), dweight, None


class _AddedNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, added: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        shape = x.shape
        x, added = x.reshape(-1, shape[-1]), added.reshape(-1, shape[-1])
        h, rows, scale = torch.empty_like(x), torch.empty_like(added), x.new_empty(len(x), 1)
        for block in _blocks(x):
            torch.add(x[block], added[block], out=h[block])
            _norm_forward(h[block], weight, eps, scale[block], rows[block])
        ctx.save_for_backward(h, weight, scale)
        return h.view(shape), rows.view(shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_h: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        h, weight, scale = ctx.saved_tensors
        of_h, of_rows = grad_h.reshape(h.shape), grad.reshape(h.shape)
        dx, dadded, dweight = torch.empty_like(h), torch.empty_like(of_rows), torch.zeros_like(weight)
        for block in _blocks(h):
            _norm_backward(of_rows[block], h[block], scale[block], weight, dx[block], dweight)
            dadded[block] = dx[block].add_(of_h[block])
        return dx.view(grad.shape), dadded.view(grad.shape), dweight, None
