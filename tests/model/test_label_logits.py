"""Logits of a few tokens: without gradients only their rows of the head are multiplied, unless somebody would miss the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.shapes import shape
from benchmarks.synthetic import random_model
from dti_kernels import StreamLayout
from dti_model.config import DTIConfig, LoraSettings
from dti_model.model import add_lora, apply_dti, cast_once, token_logits
from dti_model.precision import computing

TOKENS, VOCABULARY, CONFIG = (5, 3, 96), 97, DTIConfig()
LAYOUT = StreamLayout.build([[3, 2, 4, 2, 5]], [[1] * 5], [3], window=2)
IDS = torch.randint(2, 50, (LAYOUT.num_rows,), generator=torch.Generator().manual_seed(0))


def model_of(tied: bool = False) -> Any:
    return apply_dti(random_model(shape(2, 32, 2, 1, 64, VOCABULARY, tied=tied)), CONFIG).eval()


def logits(model: Any, tokens: Any = TOKENS) -> torch.Tensor:
    return token_logits(model, IDS, LAYOUT, CONFIG, tokens)


class Calls:
    """How often a head was called."""

    def __init__(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        head = model.get_output_embeddings()
        forward = head.forward

        def counted(rows: torch.Tensor) -> torch.Tensor:
            self.count += 1
            return forward(rows)  # type: ignore[no-any-return]

        monkeypatch.setattr(head, "forward", counted)


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
    calls = Calls(model, monkeypatch)
    for tokens in (TOKENS, torch.tensor(TOKENS)):
        torch.testing.assert_close(logits(model, tokens), whole[:, list(TOKENS)])
    assert calls.count == 0


def test_training_multiplies_the_whole_head(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    calls = Calls(model, monkeypatch)
    logits(model).sum().backward()
    assert calls.count == 1
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
def test_adapters_count_and_a_row_that_is_trained_in_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last token is [SUM]'s, whose row of a tied head is an adapter's: there the head is asked itself."""
    for tied in (False, True):
        model = add_lora(model_of(tied), LoraSettings(rank=2), VOCABULARY - 1).eval()
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "tokens_delta" in name:
                parameter.add_(torch.randn_like(parameter))
        whole = logits(model, ())
        calls = Calls(model.get_base_model(), monkeypatch)
        torch.testing.assert_close(logits(model), whole[:, list(TOKENS)])
        assert calls.count == tied


@pytest.mark.parametrize("who", ["model", "head"])
@torch.no_grad()
def test_who_listens_hears(who: str) -> None:
    model = model_of()
    expected = logits(model)
    heard: list[torch.Size] = []
    listened: nn.Module = model if who == "model" else model.lm_head
    hook = listened.register_forward_hook(
        lambda _, x, y: heard.append((y.logits if who == "model" else y).shape)
    )
    torch.testing.assert_close(logits(model), expected)
    hook.remove()
    assert heard == [(1, 3, VOCABULARY)]
