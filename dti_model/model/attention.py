"""Drop-in DTI attention for Hugging Face models of Llama's shape: Llama 2 and 3, SmolLM2, Mistral, Qwen2, Qwen3.

`apply_dti(model, config)` swaps every decoder layer for one that runs on a packed batch of streaming prompts, context rows first
and [SUM] rows last, and keeps all parameter names, so that checkpoints and LoRA adapters load as before. The model is then called

    model(input_ids=ids[None], position_ids=positions[None], stream=Stream(layout), use_cache=False)

and its logits are those of the [SUM] rows, `(1, S, V)`: the last layer computes only keys and values of the context rows.

Per layer:  q, k, v = projections of the normed rows;  context rows rotate q and k;
            [SUM] rows (with the position fix) take un-rotated q and k and ALiBi, and (with the reset) read keys and values blended
            toward those of the token embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import AttentionInterface
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from dti_kernels import (
    HiddenStateReset,
    StreamLayout,
    default_alibi_slopes,
    padded_layout,
    windowed_attn,
)
from dti_model.config import DTIConfig, check_reset_layers
from dti_model.model.head import let_head_know_tokens, only_tokens
from dti_model.model.parts import EAGER, Parts
from dti_model.model.past import LayerKeys, Past

ATTENTION_NAME = "dti"
# Decoder layers of this shape (norm, attention, residual, norm, MLP, residual) with Llama's projections, perhaps q/k norms.
# A sliding window in tokens that a model may have gives way to the layout's, in interactions.
SUPPORTED_LAYERS: tuple[type[nn.Module], ...] = (
    LlamaDecoderLayer,
    MistralDecoderLayer,
    Qwen2DecoderLayer,
    Qwen3DecoderLayer,
)


@dataclass(eq=False)
class Stream:
    """Arguments of one forward pass that reach every layer beside the hidden states.

    Attributes:
        layout: rows and spans of the batch.
        initial_states: `(1, C, E)` token embeddings of the context rows, filled in by the first layer.
        context_outputs: keep the last layer's context rows; False: only [SUM] rows leave the model.
        past: rows that an earlier pass has computed; None: the model is given all rows.
        recorded: a list that every layer adds the keys of all rows to; None: they are not kept.
        parts: what computes the layers around their attention.
    """

    layout: StreamLayout
    initial_states: Tensor | None = None
    context_outputs: bool = False
    past: Past | None = None
    recorded: list[LayerKeys] | None = None
    parts: Parts = EAGER


def padded(num_rows: int) -> int:
    """Up to a sixty-fourth more rows, of which few numbers exist.

    PyTorch multiplies bfloat16 on CPUs with oneDNN, which generates code for every shape that it has not seen lately, .6 ms or more a product,
    and every packed batch has another number of rows.
    """
    step = max(16, 1 << max(num_rows // 64, 1).bit_length() - 1)
    return -(-num_rows // step) * step


class StreamAttention(nn.Module):
    """Self-attention over a packed batch, on the projections (and q/k norms) of the attention it replaces."""

    def __init__(self, attention: Any, config: DTIConfig, resets: bool) -> None:
        super().__init__()
        self.head_dim: int = attention.head_dim
        self.layer_idx: int = attention.layer_idx
        self.scaling: float = attention.scaling
        self.config, self.resets = config, resets
        for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"):
            if hasattr(attention, name):
                setattr(self, name, getattr(attention, name))
        if config.position_fix:
            q_proj = attention.q_proj  # plain, quantised (its weight is packed) or wrapped by peft
            slopes = default_alibi_slopes(q_proj.out_features // self.head_dim) * config.slope_scale
            slopes = slopes.to(q_proj.weight.device)
            if config.train_slopes:
                self.alibi_slopes = nn.Parameter(slopes)
            else:
                self.register_buffer("alibi_slopes", slopes, persistent=False)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        stream: Stream,
        initial_states: Tensor | None,
        sums_only: bool,
    ) -> Tensor:
        """`(1, T, E)` normed hidden states to `(1, T, E)`, or `(1, S, E)` where only [SUM] rows are wanted.

        `initial_states (1, C, E)` are the normed token embeddings, where this layer resets. With a past, T and C count the
        given rows.
        """
        layout, past = stream.layout, stream.past
        num_context, fix = layout.num_context, self.config.position_fix
        rows = hidden_states[0]
        given_context = len(rows) - layout.num_sum
        q = self._heads("q", rows[given_context:] if sums_only else rows)
        keys = LayerKeys(*(self._heads(name, rows) for name in ("k", "v")))
        if initial_states is not None:
            initial = (self._heads(name, initial_states[0]) for name in ("k", "v"))
            keys = LayerKeys(*keys[:2], *initial)
        if past is not None:
            keys = past.merge(self.layer_idx, keys, layout)
            q = q if sums_only else past.spread(q, layout.num_rows)
        if stream.recorded is not None:
            stream.recorded.append(keys)
        k, v, k_initial, v_initial = keys
        cos, sin = (x[0].to(q.dtype) for x in position_embeddings)
        k_sum = k
        if not (fix and sums_only):
            k = stream.parts.rotate(k, cos, sin)
            q = stream.parts.rotate(q, *(x[num_context:] if sums_only else x for x in (cos, sin)))
        reset = None
        if k_initial is not None and v_initial is not None:
            if not fix:
                k_initial = stream.parts.rotate(k_initial, cos[:num_context], sin[:num_context])
            reset = self._reset(k_initial, v_initial)
        slopes = self.alibi_slopes if fix else None
        out = windowed_attn(
            q,
            k,
            v,
            layout,
            k_sum=k_sum if fix else None,
            alibi_slopes=slopes,
            reset=reset,
            scale=self.scaling,
        )
        if past is not None and not sums_only:
            out = out[past.given]
        o_proj: nn.Module = self.get_submodule("o_proj")
        projected: Tensor = o_proj(out.flatten(1))
        return projected[None]

    def _reset(self, k_initial: Tensor, v_initial: Tensor) -> HiddenStateReset:
        dti = self.config
        ratios = dti.alpha_min, dti.alpha_max, dti.steepness, dti.alpha_own
        return HiddenStateReset(k_initial, v_initial, *ratios)

    def _heads(self, name: str, rows: Tensor) -> Tensor:
        """`(rows, E)` to `(rows, heads, D)` queries, keys or values."""
        heads: Tensor = getattr(self, f"{name}_proj")(rows).unflatten(-1, (-1, self.head_dim))
        norm: nn.Module | None = getattr(self, f"{name}_norm", None)
        if norm is not None:
            heads = norm(heads)
        return heads


class StreamDecoderLayer(GradientCheckpointingLayer):
    """A decoder layer over a packed batch, made of the modules of the layer it replaces."""

    def __init__(self, layer: Any, config: DTIConfig, num_layers: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        index = layer.self_attn.layer_idx
        self.is_first, self.is_last = index == 0, index == num_layers - 1
        self.self_attn = StreamAttention(layer.self_attn, config, config.resets_layer(index, num_layers))
        self.mlp = layer.mlp
        self.input_layernorm = layer.input_layernorm
        self.post_attention_layernorm = layer.post_attention_layernorm

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        stream: Stream | None = None,
        **_: Any,
    ) -> Tensor:
        """`(1, T, E)` to `(1, T, E)`; the last layer to `(1, S, E)` unless the stream keeps context rows."""
        if stream is None or position_embeddings is None:
            raise ValueError(
                "a model with DTI attention reads packed streaming prompts: call it with stream=Stream(layout), "
                "and build the layout with StreamLayout.build or dti_model.prompts"
            )
        num_context, parts = hidden_states.shape[1] - stream.layout.num_sum, stream.parts
        if self.is_first:
            hidden_states = self.dropout(hidden_states)
            stream.initial_states = hidden_states[:, :num_context]
        sums_only = self.is_last and not stream.context_outputs
        initial = None
        if self.self_attn.resets and stream.initial_states is not None:
            initial = parts.normed(self.input_layernorm, stream.initial_states)
        rows = parts.normed(self.input_layernorm, hidden_states)
        attended = self.self_attn(rows, position_embeddings, stream, initial, sums_only)
        residual = hidden_states[:, num_context:] if sums_only else hidden_states
        hidden_states, rows = parts.added_and_normed(
            residual, self.dropout(attended), self.post_attention_layernorm
        )
        mixed: Tensor = self.dropout(parts.mixed(self.mlp, rows))
        return hidden_states + mixed


def apply_dti(model: PreTrainedModel, config: DTIConfig, dropout: float = 0.0) -> PreTrainedModel:
    """Make a Hugging Face causal LM read packed streaming prompts; in place.

    Args:
        model: a causal LM with decoder layers of `SUPPORTED_LAYERS`, on any device, perhaps wrapped by peft.
        config: which fixes [SUM] rows get.
        dropout: on the token embeddings and on what every attention and MLP adds, while training.

    Returns:
        The same model. Parameter names do not change.

    Raises:
        TypeError: the model's decoder layers are not of a supported class.
        ValueError: its rotary scaling multiplies scores, which un-rotated [SUM] keys cannot follow, or a layer that is to
            reset does not exist.
    """
    decoder = model.get_decoder()
    layers = getattr(decoder, "layers", [decoder])
    for layer in layers:
        if not isinstance(layer, SUPPORTED_LAYERS):
            names = ", ".join(supported.__name__ for supported in SUPPORTED_LAYERS)
            raise TypeError(
                f"DTI attention works on decoder layers of class {names}, not {type(layer).__name__}"
            )
    if config.position_fix and decoder.rotary_emb.attention_scaling != 1.0:
        raise ValueError(
            f"rotary scaling {decoder.rotary_emb.rope_type!r} multiplies scores by a temperature that [SUM] rows without "
            "positions do not have: use mode dti-minus or dti-reset, or a model with rope type default, linear or llama3"
        )
    check_reset_layers(config, len(layers))
    let_head_know_tokens(model)
    AttentionMaskInterface.register(ATTENTION_NAME, _no_mask)
    AttentionInterface.register(ATTENTION_NAME, _not_reached)
    model.set_attn_implementation(ATTENTION_NAME)
    decoder.layers = nn.ModuleList(
        StreamDecoderLayer(layer, config, len(layers), dropout) for layer in layers
    )
    model._no_split_modules = [StreamDecoderLayer.__name__]
    return model


def layers_of(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of the result of `apply_dti`, perhaps wrapped by peft or a distributed engine."""
    lists = (x for x in model.modules() if isinstance(x, nn.ModuleList))
    return next(x for x in lists if len(x) and isinstance(x[0], StreamDecoderLayer))


def position_ids(layout: StreamLayout, config: DTIConfig) -> Tensor:
    """`(T,)` int64 rotary positions: context tokens count from 0 in their prompt.

    With the position fix a [SUM] has none: position 0, where the rotation is the identity.
    """
    positions = layout.position_ids.long()
    if config.position_fix:
        positions[layout.num_context :].zero_()  # the assignment of a number would make a tensor of it
    return positions


def model_inputs(
    input_ids: Tensor,
    layout: StreamLayout,
    config: DTIConfig,
    past: Past | None = None,
    recorded: list[LayerKeys] | None = None,
    parts: Parts = EAGER,
) -> dict[str, Any]:
    """Keyword arguments of the model for a packed batch; see `token_logits`."""
    return {
        "input_ids": input_ids[None],
        "position_ids": position_ids(layout, config)[None],
        "stream": Stream(layout, past=past, recorded=recorded, parts=parts),
        "use_cache": False,
    }


def token_logits(
    model: nn.Module,
    input_ids: Tensor,
    layout: StreamLayout,
    config: DTIConfig,
    tokens: Sequence[int] | Tensor = (),
    past: Past | None = None,
    recorded: list[LayerKeys] | None = None,
    few_shapes: bool = False,
    parts: Parts = EAGER,
) -> Tensor:
    """Logits at the [SUM] rows: `(S, V)`, or `(S, len(tokens))` for some tokens of the vocabulary.

    Args:
        model: the result of `apply_dti`, perhaps wrapped by peft or a distributed engine.
        input_ids: `(T,)` int64, context tokens in layout order, then one [SUM] token per target; with a past, of the rows
            that it lacks.
        layout: of the same batch, on the model's device.
        config: the one the model was made with.
        tokens: token ids whose logits are wanted, as numbers or as int64 on the model's device; empty: all. Without gradients a plain head
            computes no others, and these in float32.
        past: context rows that need not be computed again.
        recorded: takes the keys of all context rows, layer after layer.
        few_shapes: add rows that nobody reads (`padded_layout`), so that matrix products of different batches have the same shapes
            (`padded`): for bfloat16 on CPUs. Without effect where there is a past.
        parts: what computes the layers around their attention.
    """
    num_context, num_sum = layout.num_context, layout.num_sum
    if few_shapes and past is None:
        input_ids, layout = _of_few_shapes(input_ids, layout)
    inputs = model_inputs(input_ids, layout, config, past, recorded, parts)
    if not len(tokens):
        logits: Tensor = model(**inputs).logits[0, :num_sum]
    else:
        with only_tokens(tokens) as wanted:
            logits = model(**inputs).logits[0, :num_sum]
        logits = logits if wanted.were_alone else logits[:, wanted.tokens]
    if recorded is not None:
        recorded[:] = [keys.rows(slice(num_context)) for keys in recorded]
    return logits


def _of_few_shapes(input_ids: Tensor, layout: StreamLayout) -> tuple[Tensor, StreamLayout]:
    """Of all rows and of [SUM] rows there are few numbers; of context rows, whose initial states layers that reset multiply, some more."""
    num_sum = padded(layout.num_sum)
    return with_padding(input_ids, layout, padded(layout.num_context + 1 + num_sum) - num_sum, num_sum)


def with_padding(
    input_ids: Tensor, layout: StreamLayout, num_context: int, num_sum: int
) -> tuple[Tensor, StreamLayout]:
    """A batch on the CPU with rows of token 0 that nobody reads, and its layout: see `padded_layout`."""
    context, sums = input_ids.split([layout.num_context, layout.num_sum])
    context, sums = F.pad(context, (0, num_context - len(context))), F.pad(sums, (0, num_sum - len(sums)))
    return torch.cat([context, sums]), padded_layout(layout, num_context, num_sum)


def is_compiled(module: nn.Module) -> bool:
    """Whether a module is what `torch.compile` or its own `compile` made of it. (Asking PyTorch would import its compiler.)"""
    return module._compiled_call_impl is not None or "_orig_mod" in module._modules


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """The layout is the mask."""


def _not_reached(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("an attention layer was not replaced by apply_dti")
