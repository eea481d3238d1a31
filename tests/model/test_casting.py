"""The head in float32: of a model that trains in bfloat16 on a CPU, and of one that is cast to score."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dti_model.model.casting import cast_once
from dti_model.model.head import keep_head_in_float32


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def model(request: pytest.FixtureRequest) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=request.param))


def logits(model: LlamaForCausalLM, rows: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        result: torch.Tensor = model.get_output_embeddings()(rows)
    return result


def test_logits_and_their_gradients_are_float32(model: LlamaForCausalLM) -> None:
    rows = torch.randn(3, 16, requires_grad=True)
    weight = model.get_output_embeddings().weight
    names = list(model.state_dict())
    assert logits(model, rows).dtype == torch.bfloat16
    keep_head_in_float32(model)
    kept = logits(model, rows)
    assert torch.equal(kept, rows @ weight.t())
    grads = torch.autograd.grad(kept.square().sum(), [rows, weight])
    expected = torch.autograd.grad((rows @ weight.t()).square().sum(), [rows, weight])
    assert all(torch.equal(*pair) for pair in zip(grads, expected, strict=True))
    assert list(model.state_dict()) == names


def test_a_head_that_is_gathered_in_bfloat16_stays_so(model: LlamaForCausalLM) -> None:
    """As FSDP2 does it: its products had two dtypes."""
    keep_head_in_float32(model)
    model.get_output_embeddings().to(torch.bfloat16)
    assert logits(model, torch.randn(3, 16)).dtype == torch.bfloat16


@pytest.mark.parametrize("trains", [True, False])
def test_a_copy_has_a_head_of_its_own(model: LlamaForCausalLM, trains: bool) -> None:
    """Copied or pickled: the head was a function over the original's weights."""
    if trains:
        keep_head_in_float32(model)
    else:
        model = cast_once(model, "bf16")
    rows = torch.randn(3, 16)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other, rows), logits(model, rows))
        assert logits(other, rows).dtype == torch.float32
        other.get_output_embeddings().weight.data.zero_()
        assert not logits(other, rows).any()
        assert logits(model, rows).any()
