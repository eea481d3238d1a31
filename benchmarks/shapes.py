"""Shapes of published models, as settings of `LlamaConfig`, and the heads of the two that attention is measured with."""

from __future__ import annotations

from typing import Any

Shape = dict[str, Any]


def shape(
    layers: int, width: int, heads: int, kv_heads: int, mlp_width: int, vocabulary: int, tied: bool = False
) -> Shape:
    """Settings of a Llama whose heads together are as wide as the model."""
    return {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": mlp_width,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
    }


SHAPES = {
    "llama-3.1-8b": shape(32, 4096, 32, 8, 14336, 128256),
    "llama-3.2-1b": shape(16, 2048, 32, 8, 8192, 128256, tied=True),
    "qwen2.5-0.5b": shape(24, 896, 14, 2, 4864, 151936, tied=True),
    "smollm2-135m": shape(30, 576, 9, 3, 1536, 49152, tied=True),
}
# Small enough for training steps on one card, or for a rehearsal.
MODELS = {
    "llama8b-slice": SHAPES["llama-3.1-8b"] | {"num_hidden_layers": 2},
    "smollm": SHAPES["smollm2-135m"],
    "tiny": shape(2, 32, 2, 1, 64, 64),
}


def heads_of(shape: Shape) -> tuple[int, int, int]:
    """Query heads, key heads and head_dim."""
    num_heads = shape["num_attention_heads"]
    return num_heads, shape["num_key_value_heads"], shape["hidden_size"] // num_heads


HEADS = {"llama8b": heads_of(SHAPES["llama-3.1-8b"]), "smollm": heads_of(SHAPES["smollm2-135m"])}
