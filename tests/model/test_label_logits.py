"""Logits of a few tokens: without gradients only their rows of the head are multiplied, unless somebody would miss the others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.shapes import shape
from benchmarks.synthetic import random_model
from dti_kernels import StreamLayout
from dti_model.config import DTIConfig, LoraSettings
from dti_model.model import add_lora, apply_dti, cast_once, token_logits
from dti_model.model.head import only_tokens
from dti_model.precision import computing
from tests.threads import in_threads

TOKENS, VOCABULARY, CONFIG = (5, 3, 96), 97, DTIConfig()
LAYOUT = StreamLayout.build([[3, 2, 4, 2, 5]], [[1] * 5], [3], window=2)
IDS = torch.randint(2, 50, (LAYOUT.num_rows,), generator=torch.Generator().manual_seed(0))


def model_of(tied: bool = False) -> Any:
    return apply_dti(random_model(shape(2, 32, 2, 1, 64, VOCABULARY, tied=tied)), CONFIG).eval()


def logits(model: Any, tokens: Any = TOKENS) -> torch.Tensor:
    return token_logits(model, IDS, LAYOUT, CONFIG, tokens)


@contextmanager
def widths_of(head: nn.Module) -> Iterator[list[int]]:
    """How many logits of a row a head computes, call by call; who listens to it hears that."""
    found: list[int] = []
    hook = head.register_forward_hook(lambda _, x, y: found.append(y.shape[-1]))
    yield found
    hook.remove()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_logits_of_tokens_are_those_among_all(
    tied: bool, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(tied)
    if bias:
        model.lm_head.bias = nn.Parameter(torch.randn(VOCABULARY))
    whole = logits(model, ())
    assert whole.shape == (3, VOCABULARY)
    with widths_of(model.lm_head) as widths:
        for tokens in (TOKENS, torch.tensor(TOKENS)):
            torch.testing.assert_close(logits(model, tokens), whole[:, list(TOKENS)])
    assert widths == [3, 3]


def test_training_multiplies_the_whole_head() -> None:
    model = model_of()
    with widths_of(model.lm_head) as widths:
        logits(model).sum().backward()
    assert widths == [VOCABULARY]
    assert model.lm_head.weight.grad is not None


@torch.no_grad()
def test_in_bfloat16_they_are_in_float32() -> None:
    """From rows of bfloat16, so nearer to float32's than logits that autocast rounds."""
    model = model_of()
    exact = logits(model)
    with computing("bf16", "cpu"):
        found = logits(cast_once(model, "bf16"))
        whole = logits(cast_once(model, "bf16"), ())[:, list(TOKENS)]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, whole)
    assert (found - exact).abs().max() < 0.02 * exact.abs().max()


@torch.no_grad()
def test_adapters_count_and_a_row_that_is_trained_in_the_head() -> None:
    """The last token is [SUM]'s, whose row of a tied head is an adapter's: there the head is asked itself."""
    for tied in (False, True):
        model = add_lora(model_of(tied), LoraSettings(rank=2), VOCABULARY - 1).eval()
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "tokens_delta" in name:
                parameter.add_(torch.randn_like(parameter))
        whole = logits(model, ())
        with widths_of(model.get_base_model().get_output_embeddings()) as widths:
            torch.testing.assert_close(logits(model), whole[:, list(TOKENS)])
        assert widths == [VOCABULARY if tied else 3]


@torch.no_grad()
def test_a_head_of_another_class_computes_all() -> None:
    """It may scale its weights, or unpack them."""

    class Scaled(nn.Linear):
        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(rows)

    model = model_of()
    expected = logits(model)
    model.lm_head.__class__ = Scaled
    torch.testing.assert_close(logits(model), 2 * expected)


@torch.no_grad()
def test_whoever_has_replaced_the_forward_of_the_model_is_asked() -> None:
    """accelerate computes in bfloat16 there."""
    model, forward = model_of(), type(model_of()).forward
    expected = logits(model)
    seen: list[bool] = []

    def in_bfloat16(*args: Any, **kwargs: Any) -> Any:
        seen.append(True)
        with torch.autocast("cpu", torch.bfloat16):
            return forward(model, *args, **kwargs)

    model.forward = in_bfloat16
    found = logits(model)
    assert seen == [True]
    assert not torch.equal(found, expected)


@torch.no_grad()
def test_what_is_wanted_ends_with_the_pass_and_is_of_one_thread() -> None:
    model = model_of()
    assert logits(model).shape == (3, 3)
    assert logits(model, ()).shape == (3, VOCABULARY)
    with pytest.raises(ZeroDivisionError), only_tokens(TOKENS):
        raise ZeroDivisionError
    shapes: list[torch.Size] = []

    def work(_: int) -> None:
        with torch.no_grad():
            shapes.append(logits(model, ()).shape)

    with only_tokens(TOKENS):
        in_threads(work, 2)
    assert shapes == 2 * [(3, VOCABULARY)]
