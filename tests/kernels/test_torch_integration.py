"""The operator inside PyTorch: opcheck, torch.compile without recompiles, checkpointing, autocast, double backward."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from dti_kernels import (
    HiddenStateReset,
    StreamLayout,
    default_alibi_slopes,
    windowed_attn,
    windowed_attn_reference,
)
from dti_kernels.contract import checked_inputs
from tests.cases import named
from tests.numerics import FLOAT64_RELATIVE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["prefix", "dti_minus", "no_targets", "gqa_4"])
def test_opcheck(name: str, dtype: torch.dtype) -> None:
    """Schema, fake tensors and dispatch of both operators."""
    x = named(name).inputs(dtype)
    x = dataclasses.replace(x, leaves={name: leaf.detach() for name, leaf in x.leaves.items()})
    arguments = tuple(checked_inputs(x.leaves, x.layout, x.reset_settings, 0.25))
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.dti.windowed_attn_fwd.default, arguments, test_utils=checks)
    out, lse = torch.ops.dti.windowed_attn_fwd(*arguments)
    for slopes_grad in (True, False):
        backward = (*arguments, x.grad_out, out, lse, slopes_grad)
        torch.library.opcheck(torch.ops.dti.windowed_attn_bwd.default, backward, test_utils=checks)


class Layer(torch.nn.Module):
    """A layer around the operator, with everything that [SUM] rows have."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.project = torch.nn.Linear(16, 7 * 16, bias=False)
        self.slopes = torch.nn.Parameter(default_alibi_slopes(2))

    def forward(self, x: Tensor, layout: StreamLayout) -> Tensor:
        q, k, v, k_sum, k_initial, v_initial = (
            self.project(x).view(len(x), 7, 16).split([2, 1, 1, 1, 1, 1], 1)
        )
        num_context = layout.num_context
        reset = HiddenStateReset(k_initial[:num_context], v_initial[:num_context], 0.1, 0.8)
        out = windowed_attn(q, k, v, layout, k_sum=k_sum, alibi_slopes=self.slopes, reset=reset)
        return out.flatten(1)


def hidden(layout: StreamLayout, seed: int = 0) -> Tensor:
    x = torch.randn(layout.num_rows, 16, generator=torch.Generator().manual_seed(seed))
    return x.to(layout.device).requires_grad_()


def gradients(layer: torch.nn.Module, run, layout: StreamLayout) -> list[Tensor]:
    x = hidden(layout)
    out = run(x, layout)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile_without_graph_breaks_or_recompiles(backend: str) -> None:
    """Three batches of different lengths and prompts, forward and backward: one graph, the same numbers."""
    torch._dynamo.reset()
    layer = Layer()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=backend)
    layouts = [named(name).layout() for name in ("prefix", "several_blocks", "many_short_prompts")]
    layouts = [
        dataclasses.replace(layout, window=2, mean_span=mean_span)
        for layout, mean_span in zip(layouts, (256, 512, 1024))
    ]
    expected = [gradients(layer, layer, layout) for layout in layouts]
    actual = [gradients(layer, compiled, layouts[0])]
    with torch._dynamo.config.patch(error_on_recompile=True):
        actual += [gradients(layer, compiled, layout) for layout in layouts[1:]]
    for eager, graph in zip(expected, actual):
        for a, b in zip(eager, graph):
            torch.testing.assert_close(b, a)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant: bool) -> None:
    """Recomputing the forward in the backward changes nothing, bitwise."""
    layer, layout = Layer(), named("prefix").layout()

    def run(x: Tensor, layout: StreamLayout) -> Tensor:
        return checkpoint(layer, x, layout, use_reentrant=use_reentrant)

    expected = gradients(layer, layer, layout)
    if use_reentrant:  # takes no torch.autograd.grad
        x = hidden(layout)
        run(x, layout).square().sum().backward()
        actual = [expected[0], x.grad, *(p.grad for p in layer.parameters())]
    else:
        actual = gradients(layer, run, layout)
    for a, b in zip(expected, actual):
        assert torch.equal(a, b)


def test_autocast() -> None:
    """Inputs of mixed precision are cast to autocast's; gradients come back in the leaves' own dtypes."""
    x = named("prefix").inputs(torch.float32)
    mixed = dict(x.leaves)
    mixed["v"] = mixed["v"].detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = dataclasses.replace(x, leaves=mixed).call(windowed_attn)
    assert out.dtype == torch.bfloat16
    grads = torch.autograd.grad(out.float().sum(), list(mixed.values()))
    assert [grad.dtype for grad in grads] == [leaf.dtype for leaf in mixed.values()]
    half = named("prefix").inputs(torch.bfloat16)
    half.leaves["alibi_slopes"] = x.leaves["alibi_slopes"]
    assert torch.equal(out, half.call(windowed_attn))


def test_double_backward_names_the_reference() -> None:
    x = named("prefix").inputs(torch.float64)
    (grad,) = torch.autograd.grad(x.call(windowed_attn).square().sum(), x.leaves["q"], create_graph=True)
    with pytest.raises(NotImplementedError, match="windowed_attn_reference"):
        grad.sum().backward()
    (grad,) = torch.autograd.grad(
        x.call(windowed_attn_reference).square().sum(), x.leaves["q"], create_graph=True
    )
    grad.sum().backward()


def test_second_derivative_is_not_asked_for_by_accident() -> None:
    """create_graph alone, without differentiating again, gives the plain gradient."""
    x = named("prefix").inputs(torch.float64)
    graph = torch.autograd.grad(x.call(windowed_attn).sum(), x.leaves["k"], create_graph=True)[0]
    plain = torch.autograd.grad(x.call(windowed_attn).sum(), x.leaves["k"])[0]
    assert (graph - plain).abs().max() <= FLOAT64_RELATIVE


@pytest.mark.parametrize("grad", [True, False])
def test_forward_mode_is_refused(grad: bool) -> None:
    """The operators know no tangents and would drop them: without gradients, autograd's functions are left out."""
    x = named("prefix").inputs(torch.float64)
    q = x.leaves["q"].detach()
    with forward_ad.dual_level(), torch.set_grad_enabled(grad):
        dual = dataclasses.replace(x, leaves=x.leaves | {"q": forward_ad.make_dual(q, torch.ones_like(q))})
        with pytest.raises(NotImplementedError, match="jvp"):
            dual.call(windowed_attn)


def test_without_gradients_the_output_is_the_same() -> None:
    x = named("prefix").inputs(torch.float32)
    expected = x.call(windowed_attn)
    assert expected.requires_grad
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            out = x.call(windowed_attn)
            assert not out.requires_grad
            assert torch.equal(out, expected)


@pytest.mark.parametrize("scale", [-1.0, float("inf"), float("nan")])
def test_bad_scale_is_refused(scale: float) -> None:
    x = dataclasses.replace(named("prefix").inputs(torch.float32), scale=scale)
    with pytest.raises(ValueError, match="scale must be finite and >= 0"):
        x.call(windowed_attn)
