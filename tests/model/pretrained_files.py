"""Tiny pretrained models in the folders that transformers writes: random weights, a byte-level BPE without [SUM]."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)
from transformers.utils import logging

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
FAMILIES: dict[str, tuple[type, dict[str, Any]]] = {
    "llama2": (LlamaConfig, {}),
    "llama3": (LlamaConfig, {"rope_parameters": LLAMA3_ROPE}),
    "smollm2": (LlamaConfig, {"tie_word_embeddings": True}),
    "mistral": (MistralConfig, {"sliding_window": None}),
    "qwen2": (Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, {"head_dim": 8}),
}
TEXT = ["Does the user like it? yes or no", "Toy Story (1995); Animation, Comedy yes", "Casino no"] * 20


def small_tokenizer(text: list[str] = TEXT) -> PreTrainedTokenizerFast:
    """A tokenizer of about 300 tokens with ` yes` and ` no`, as GPT-2's and SmolLM2's are made."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.train_from_iterator(
        text,
        BpeTrainer(
            vocab_size=320,
            special_tokens=["<s>"],
            initial_alphabet=ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def pretrained_folder(folder: Path, family: str = "smollm2", **more: Any) -> Path:
    """A random model of a family, saved with its tokenizer; three layers of 32."""
    tokenizer = small_tokenizer()
    config_class, special = FAMILIES[family]
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": None,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config_class(**{**settings, **special, **more}))
    logging.disable_progress_bar()  # what a test reads of stderr is the command's own
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
