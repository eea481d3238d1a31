"""The head of a click model: logits of the tokens that somebody wants, and in float32.

Scoring wants two tokens of a vocabulary of tens of thousands. Inside `only_tokens` a head multiplies the rows of these tokens alone. It does
so in its own `forward`, so wrappers, hooks and sharding around it are what they are in any pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel


class _Wanted:
    """Tokens whose logits are wanted, as indices, and whether a head has computed these alone."""

    def __init__(self, tokens: Tensor | list[int]) -> None:
        self.tokens, self.were_alone = tokens, False


_WANTED: ContextVar[_Wanted | None] = ContextVar("wanted tokens", default=None)


@contextmanager
def only_tokens(tokens: Sequence[int] | Tensor) -> Iterator[_Wanted]:
    """A context for a pass without gradients that needs these logits alone; which a head that is wrapped or quantised computes among all."""
    wanted = _Wanted(tokens if isinstance(tokens, Tensor) else list(tokens))
    before = _WANTED.set(wanted)
    try:
        yield wanted
    finally:
        _WANTED.reset(before)


class TokenHead(nn.Linear):
    """A head that knows `only_tokens`, whose logits are in float32 whatever autocast says: there are few of them."""

    def forward(self, rows: Tensor) -> Tensor:
        """`(..., E)` to `(..., V)`, or to `(..., tokens)`."""
        wanted = None if torch.is_grad_enabled() or torch.compiler.is_compiling() else _WANTED.get()
        if wanted is None:
            return self.all_logits(rows)
        wanted.were_alone = True
        dtype = torch.promote_types(rows.dtype, torch.float32)
        with torch.autocast(rows.device.type, enabled=False):
            bias = None if self.bias is None else self.bias[wanted.tokens].to(dtype)
            return F.linear(rows.to(dtype), self.weight[wanted.tokens].to(dtype), bias)

    def all_logits(self, rows: Tensor) -> Tensor:
        """Of the whole vocabulary."""
        return super().forward(rows)


class Float32Head(TokenHead):
    """A head that computes in float32 under autocast too, if its weights are float32."""

    def all_logits(self, rows: Tensor) -> Tensor:
        """Of the whole vocabulary."""
        if self.weight.dtype != torch.float32:  # of `model.dtype`, or FSDP2 has gathered it in bfloat16
            return super().all_logits(rows)
        with torch.autocast(rows.device.type, enabled=False):
            return super().all_logits(rows.float())


def let_head_know_tokens(model: PreTrainedModel) -> None:
    """Let a model's head know `only_tokens`, in place; heads that are wrapped or quantised stay as they are."""
    head = model.get_output_embeddings()
    if type(head) is nn.Linear:
        head.__class__ = TokenHead


def keep_head_in_float32(model: PreTrainedModel) -> None:
    """Let a model compute its logits in float32 under autocast, in place; heads that are wrapped or quantised stay as they are.

    A bfloat16 logit of 8 is off by up to .016. The head of [SUM] rows is a few percent of a training step's products on a CPU; GPUs multiply
    float32 too slowly for it.
    """
    head = model.get_output_embeddings()
    if type(head) in (nn.Linear, TokenHead):
        head.__class__ = Float32Head
