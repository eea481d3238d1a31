"""A model whose weights are cast to bfloat16 once, for many passes without gradients.

Autocast casts a weight in every pass: it keeps what it has cast within one region of one thread only, and of trained weights only. A weight
that is cast already is the same number, so the layers of the model here compute what autocast computes, bit for bit.

The head is the exception: it computes in float32. Autocast rounds logits to bfloat16, which would be most of the difference to float32,
and a head of [SUM] rows is a small part of the work.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dti_model.model.head import Float32Head, keep_head_in_float32
from dti_model.precision import Resolved

Model = TypeVar("Model", bound=nn.Module)
_IS_CAST = "dti_is_cast"


def cast_once(model: Model, precision: Resolved) -> Model:
    """The model to score with in a precision, under `computing`.

    For bf16 it is another one, whose linear layers hold bfloat16 weights. It shares all the rest with the given one: norms, embedding,
    head, slopes, and weights that are no float32 (quantised ones, or of `model.dtype` bfloat16). A sharded model stays as it is: FSDP2
    gathers its weights in bfloat16.

    Cost: one pass over the weights, and half of their memory.

    Raises:
        ValueError: float32 is asked of a model whose weights have been cast.
    """
    is_cast = hasattr(model, _IS_CAST)
    if is_cast and precision == "fp32":
        raise ValueError("this model's weights were cast to bfloat16: load it again to compute in float32")
    tensors = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    if is_cast or precision == "fp32" or any(isinstance(tensor, DTensor) for tensor in tensors.values()):
        return model
    cast: Any = copy.deepcopy(model, dict(tensors))  # the tensors themselves are shared
    head = cast.get_output_embeddings()
    for layer in set(cast.modules()) - set(head.modules()):
        if isinstance(layer, nn.Linear) and layer.weight.dtype == torch.float32:
            for name, parameter in list(layer.named_parameters(recurse=False)):
                rounded = parameter.detach().to(torch.bfloat16)
                setattr(layer, name, nn.Parameter(rounded, requires_grad=False))
    keep_head_in_float32(cast)
    wrapped = not isinstance(head, Float32Head)  # by peft
    if wrapped and all(parameter.dtype == torch.float32 for parameter in head.parameters()):
        head.forward = _in_float32(head.forward)
    setattr(cast, _IS_CAST, True)
    result: Model = cast
    return result


def _in_float32(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def without_autocast(rows: Tensor) -> Tensor:
        with torch.autocast(rows.device.type, enabled=False):
            return forward(rows.float())

    return without_autocast
