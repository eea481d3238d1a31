"""Rotary positions: Transformers' formula, in fewer passes where numbers have 16 bits."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from dti_model.model.rotation import rotate


def inputs(dtype: torch.dtype, heads: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, heads, 16, generator=generator).to(dtype)
    angles = torch.randn(50, 8, generator=generator).repeat(1, 2)
    return x.requires_grad_(), angles.cos().to(dtype), angles.sin().to(dtype)


def theirs(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Transformers has `(batch, heads, rows, D)`."""
    rotated, _ = apply_rotary_pos_emb(x.transpose(0, 1)[None], x.transpose(0, 1)[None], cos[None], sin[None])
    return rotated[0].transpose(0, 1)


def test_float32_is_theirs_bit_for_bit() -> None:
    x, cos, sin = inputs(torch.float32)
    assert torch.equal(rotate(x, cos, sin), theirs(x, cos, sin))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_within_a_rounding(dtype: torch.dtype) -> None:
    """Of what float64 makes of the same numbers, forward and backward; theirs rounds three times."""
    x, cos, sin = inputs(dtype)
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    exact = x.detach().double().requires_grad_()
    wanted = theirs(exact, cos.double(), sin.double())
    wanted.backward(grad.double())
    rotated = rotate(x, cos, sin)
    rotated.backward(grad)
    assert exact.grad is not None
    assert x.grad is not None
    step = torch.finfo(dtype).eps
    for actual, expected, of in ((rotated, wanted, exact), (x.grad, exact.grad, grad.double())):
        largest = of.detach().abs().unflatten(-1, (2, -1)).sum(-2).repeat(1, 1, 2)
        assert ((actual.detach().double() - expected.detach()).abs() <= 1.1 * step * largest).all()


def test_gradients_of_gradients() -> None:
    x, cos, sin = inputs(torch.bfloat16, heads=1)
    grad = torch.ones_like(x, requires_grad=True)
    (first,) = torch.autograd.grad(rotate(x, cos, sin), x, grad, create_graph=True)
    (second,) = torch.autograd.grad(first.float().sum(), grad)
    torch.testing.assert_close(second, rotate(torch.ones_like(x), cos, sin))


def test_compiles_as_one_graph() -> None:
    x, cos, sin = inputs(torch.bfloat16)
    compiled = torch.compile(rotate, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, cos, sin), rotate(x, cos, sin), rtol=0, atol=0.05)
