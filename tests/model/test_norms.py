"""Norms of a bfloat16 pass on a CPU equal Hugging Face's, computed in float64: rows, the sum with the residual stream, and all gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from dti_model.model import norms
from dti_model.model.norms import added_and_normed, normed

ROWS, WIDTH = 37, 24
# Rounding to bfloat16 takes 2^-8 of a number at most; float32 adds little to it.
ROUNDED = 2**-8 + 1e-5


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five blocks, of which the last is short."""
    monkeypatch.setattr(norms, "_BLOCK", 8 * WIDTH)


@pytest.fixture(params=[LlamaRMSNorm, Qwen3RMSNorm])
def norm(request: pytest.FixtureRequest) -> nn.Module:
    """A norm with weights."""
    module: nn.Module = request.param(WIDTH, eps=1e-5)
    module.weight.data = torch.randn(WIDTH, generator=torch.manual_seed(0))
    return module


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.manual_seed(sum(shape)))


def exact(h: Tensor, norm: nn.Module) -> Tensor:
    """`weight h / sqrt(mean(h^2) + eps)` in float64."""
    assert isinstance(norm.weight, Tensor)
    assert isinstance(norm.variance_epsilon, float)
    return norm.weight.double() * h * (h.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()


def is_in_blocks(rows: Tensor) -> bool:
    return "NormBackward" in type(rows.grad_fn).__name__


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_norm(norm: nn.Module, trained: bool) -> None:
    norm.weight.requires_grad_(trained)
    x = drawn(1, ROWS, WIDTH).requires_grad_()
    grad = drawn(1, ROWS, WIDTH).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        rows = normed(norm, x)
    assert is_in_blocks(rows)
    assert rows.dtype == torch.bfloat16
    wanted = exact(h := x.detach().double().requires_grad_(), norm)
    assert ((rows - wanted).abs() <= ROUNDED * wanted.abs()).all()
    of = [x, *([norm.weight] if trained else [])]
    grads = torch.autograd.grad(rows, of, grad)
    expected = torch.autograd.grad(wanted, [h, *of[1:]], grad.double())
    for actual, like in zip(grads, expected, strict=True):
        torch.testing.assert_close(actual, like.float(), rtol=1e-5, atol=1e-5)


def test_added_and_normed(norm: nn.Module) -> None:
    x = drawn(1, ROWS, WIDTH).requires_grad_()
    added = drawn(1, ROWS, WIDTH, 1)[..., 0].bfloat16().requires_grad_()
    of_h, of_rows = drawn(2, ROWS, WIDTH)[:1], drawn(3, ROWS, WIDTH)[:1].bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        h, rows = added_and_normed(x, added, norm)
    assert is_in_blocks(rows)
    assert torch.equal(h, x + added)
    precise = (x + added).detach().double().requires_grad_()
    wanted = exact(precise, norm)
    assert ((rows - wanted).abs() <= ROUNDED * wanted.abs()).all()
    dx, dadded, dweight = torch.autograd.grad([h, rows], [x, added, norm.weight], [of_h, of_rows])
    through, like = torch.autograd.grad(wanted, [precise, norm.weight], of_rows.double())
    torch.testing.assert_close(dx, (through + of_h).float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dweight, like, rtol=1e-5, atol=1e-5)
    assert torch.equal(dadded, dx.bfloat16())


@pytest.mark.parametrize("used", [0, 1], ids=["stream only", "rows only"])
def test_one_of_the_two_results_may_be_unused(norm: nn.Module, used: int) -> None:
    x = drawn(1, ROWS, WIDTH).requires_grad_()
    added = torch.zeros(1, ROWS, WIDTH, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        (added_and_normed(x, added, norm)[used].float()).sum().backward()
        alone = x.detach().clone().requires_grad_()
        (normed(norm, alone).float() if used else alone).sum().backward()
    torch.testing.assert_close(x.grad, alone.grad)


def test_everywhere_else_the_models_own_norm_computes(norm: nn.Module) -> None:
    """In float32, and under an autocast to another dtype: bit for bit."""
    x, added = drawn(1, ROWS, WIDTH).requires_grad_(), drawn(1, ROWS, WIDTH)
    rows = normed(norm, x)
    h, other = added_and_normed(x, added, norm)
    assert torch.equal(rows, norm(x))
    assert torch.equal(h, x + added)
    assert torch.equal(other, norm(x + added))
    with torch.autocast("cpu", torch.float16):
        assert torch.equal(normed(norm, x), norm(x).half())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(normed(norm, x.double()), norm(x.double()))
        unknown = nn.LayerNorm(WIDTH)
        assert torch.equal(normed(unknown, x), unknown(x).bfloat16())


def test_a_norm_that_somebody_listens_to_is_called(norm: nn.Module) -> None:
    heard: list[object] = []
    norm.register_forward_hook(lambda module, inputs, output: heard.append(output))
    with torch.autocast("cpu", torch.bfloat16):
        rows = normed(norm, drawn(1, ROWS, WIDTH))
    assert len(heard) == 1
    assert rows.dtype == torch.bfloat16
