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


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody listens to the calls of a module or of a part of it."""
    return any(
        x._forward_hooks or x._forward_pre_hooks or x._backward_hooks or x._backward_pre_hooks
        for x in module.modules()
    )


def _in_blocks(norm: nn.Module, x: Tensor) -> bool:
    """Whether a norm of a known formula, to which nobody listens, reads the residual stream of a bfloat16 pass on a CPU."""
    return (
        not torch.compiler.is_compiling()
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and type(norm) in _NORMS
        and norm.weight.dtype == torch.float32
        and not has_hooks(norm)
        and torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
    )


def _num_rows(rows: Tensor) -> int:
    """Of a block."""
    return max(1, _BLOCK // rows.shape[-1])


def _norm_forward(h: Tensor, weight: Tensor, eps: float, scale: Tensor, rows: Tensor) -> None:
    """A block of `h (B, E)`: fills `scale (B, 1)`, one over the root of its mean square, and `rows (B, E)`."""
    square = torch.linalg.vector_norm(h, dim=-1, keepdim=True).square_()
    torch.rsqrt(square.div_(h.shape[-1]).add_(eps), out=scale)
    rows.copy_(torch.mul(h, scale).mul_(weight))


class _NormBackward:
    """The gradient of blocks, with what they share.

    With scaled = scale grad:  dweight = sum over rows of scaled h;  dh = scaled weight - h scale^2 mean(scaled h weight).
    """

    def __init__(self, h: Tensor, weight: Tensor) -> None:
        self.weight, self.dweight = weight, torch.zeros_like(weight)
        self._share = weight / len(weight)
        self._scratch = h.new_empty(2, min(_num_rows(h), len(h)), h.shape[-1])

    def block(self, grad: Tensor, h: Tensor, scale: Tensor, of_h: Tensor | None, dh: Tensor) -> None:
        """Fill `dh (B, E)`, which is added to `of_h`, and add to `dweight`."""
        scaled, products = self._scratch[:, : len(h)]
        torch.mul(grad, scale, out=scaled)
        torch.mul(scaled, h, out=products)
        self.dweight += products.sum(0)
        mean = torch.mv(products, self._share).unsqueeze(-1).mul_(scale).mul_(scale)
        if of_h is None:
            torch.mul(scaled, self.weight, out=dh)
        else:
            torch.addcmul(of_h, scaled, self.weight, out=dh)
        dh.addcmul_(h, mean, value=-1)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        h = x.reshape(-1, x.shape[-1])
        rows, scale = torch.empty(h.shape, dtype=torch.bfloat16), h.new_empty(len(h), 1)
        for block in _blocks(h, scale, rows):
            _norm_forward(block[0], weight, eps, *block[1:])
        ctx.save_for_backward(h, weight, scale)
        return rows.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        h, weight, scale = ctx.saved_tensors
        dh, gradient = torch.empty_like(h), _NormBackward(h, weight)
        for of_rows, rows, by, to in _blocks(grad.reshape(h.shape), h, scale, dh):
            gradient.block(of_rows, rows, by, None, to)
        return dh.view(grad.shape), gradient.dweight, None


class _AddedNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, added: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        shape = x.shape
        x, added = x.reshape(-1, shape[-1]), added.reshape(-1, shape[-1])
        h, rows, scale = torch.empty_like(x), torch.empty_like(added), x.new_empty(len(x), 1)
        for old, more, new, *filled in _blocks(x, added, h, scale, rows):
            torch.add(old, more, out=new)
            _norm_forward(new, weight, eps, *filled)
        ctx.save_for_backward(h, weight, scale)
        return h.view(shape), rows.view(shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_h: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        h, weight, scale = ctx.saved_tensors
        of_h, of_rows = grad_h.reshape(h.shape), grad.reshape(h.shape)
        dx, dadded, gradient = torch.empty_like(h), torch.empty_like(of_rows), _NormBackward(h, weight)
        for of_block, rows, by, more, to, in_16_bits in _blocks(of_rows, h, scale, of_h, dx, dadded):
            gradient.block(of_block, rows, by, more, to)
            in_16_bits.copy_(to)
        return dx.view(grad.shape), dadded.view(grad.shape), gradient.dweight, None


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Some rows of each at a time."""
    return zip(*(x.split(_num_rows(tensors[0])) for x in tensors))
