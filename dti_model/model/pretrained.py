"""Pretrained causal LMs as click models: where they come from, their tokenizer with [SUM], the precision of their weights.

A reference is a folder, a GGUF file, or an id on the Hugging Face hub (`config/references.py`). Its tokenizer gets `[SUM]` as a new token
at the end unless it has one. An embedding without a row for it gets the mean of all rows, so that every load gives the same one. A padded
vocabulary has a padding row already, which is taken as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from tokenizers import AddedToken
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from dti_model.config import ModelConfig, PretrainedModelError, Reference, locate
from dti_model.data import SUM
from dti_model.error_lines import reason_of
from dti_model.model.safe_loading import (
    config_from,
    gguf_model_from,
    model_from,
    naming_errors,
    tokenizer_from,
)

__all__ = ["PretrainedModelError", "load_causal_lm", "load_plain", "load_tokenizer"]

HUB_TIMEOUT_S = 10
MOST_LAYERS = 10_000  # as in bounds.py

# By transformers' model type. `apply_dti` knows the decoder layers of these.
SUPPORTED_TYPES = {
    "llama": "Llama 2 and 3, SmolLM2, TinyLlama",
    "mistral": "Mistral",
    "qwen2": "Qwen2 and Qwen2.5",
    "qwen3": "Qwen3",
}


def load_tokenizer(reference: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a pretrained model, with `[SUM]` as its last token unless it has one.

    Args:
        reference: folder, hub id or GGUF file.

    Raises:
        PretrainedModelError: there is no such model, or it has no fast tokenizer.
    """
    place = _found(reference)
    options = {} if place.gguf_file is None else {"gguf_file": place.gguf_file}
    with naming_errors(f"the tokenizer of {reference} cannot be loaded"):
        tokenizer: PreTrainedTokenizerBase = _from_cache_first(
            place, lambda source: tokenizer_from(source, **options)
        )
        has_sum = tokenizer.is_fast and len(tokenizer.encode(SUM, add_special_tokens=False)) == 1
    if not tokenizer.is_fast:
        raise PretrainedModelError(
            f"{reference} has no fast tokenizer (tokenizer.json), which is needed here"
        )
    if not has_sum:
        tokenizer.add_tokens([AddedToken(SUM, special=True, normalized=False)], special_tokens=True)
    return tokenizer


def load_causal_lm(
    settings: ModelConfig, tokenizer: PreTrainedTokenizerBase, device: str | None = None
) -> PreTrainedModel:
    """The pretrained model of `settings`, with an embedding row for every token, before `apply_dti`.

    Args:
        settings: its reference, weight dtype, quantisation and kernels.
        tokenizer: of `load_tokenizer`, or the same one read back from a run.
        device: where quantised weights go; others are loaded on the CPU. Default: cuda where there is one.

    Raises:
        PretrainedModelError: no such model, another architecture, or a missing library or device.
    """
    reference = settings.pretrained
    assert reference is not None
    dtype = getattr(torch, settings.dtype)
    more: dict[str, Any] = {}
    if settings.quantize:
        more = {
            "quantization_config": _quantization(settings, dtype),
            "device_map": {"": device or ("cuda" if torch.cuda.is_available() else "cpu")},
        }
    model = _from_reference(reference, dtype, more)
    _fit_embeddings(model, len(tokenizer))
    if settings.liger:
        _use_liger(model)
    return model


def load_plain(reference: str) -> PreTrainedModel:
    """An untouched pretrained model with plain float32 weights on the CPU, GGUF's unpacked.

    Raises:
        PretrainedModelError: no such model, or another architecture.
    """
    return _from_reference(reference, torch.float32, {})


def _found(reference: str) -> Reference:
    """The place of a model. The hub is asked once, with a timeout, for a model that may be downloaded and is not in the cache."""
    place = locate(reference)
    if place.may_download and not place.is_cached:
        from huggingface_hub import HfApi

        try:
            # Asks first, where a download would wait and try again for a minute.
            info = HfApi().model_info(place.source, timeout=HUB_TIMEOUT_S)
        except Exception as error:  # its own errors, and those of the HTTP library beneath
            raise PretrainedModelError(
                f"{reference} is not in the hub's cache on this machine, and the hub does not give it: {reason_of(error)}"
            ) from error
        names = [file.rfilename for file in info.siblings or []]
        if names and not any(name.endswith((".safetensors", ".safetensors.index.json")) for name in names):
            raise PretrainedModelError(
                f"{reference} has no safetensors on the hub, and pickled weights, which are programs, are never loaded: choose "
                "another model"
            )
    return place


def _from_cache_first(place: Reference, load: Callable[[str], Any]) -> Any:
    """A model of the hub out of its cache, which stays what it is; what the cache lacks is downloaded if it may be.

    Out of the cache's folder: with an id, transformers asks the hub for an adapter even where it is told to read local files only.
    """
    if place.on_hub and place.is_cached:
        try:
            return load(str(place.folder))
        except OSError:
            if not place.may_download:
                raise
    return load(place.source)


def _from_reference(reference: str, dtype: torch.dtype, more: dict[str, Any]) -> PreTrainedModel:
    place = _found(reference)
    with naming_errors(
        f"{reference} cannot be loaded as a folder, a GGUF file or a model of the Hugging Face hub"
    ):
        if place.gguf_file is not None:
            if more:
                raise PretrainedModelError(
                    "model.quantize works on folders and hub ids, not on a GGUF file, whose weights are unpacked"
                )
            unpacked = gguf_model_from(place.source, place.gguf_file, dtype)
            _check_type(reference, unpacked.config.model_type)
            return unpacked
        # The architecture first: the configuration is a few KiB, the weights may be many GiB.
        config = _from_cache_first(place, config_from)
        _check_type(reference, config.model_type)
        if isinstance(config.num_hidden_layers, int) and config.num_hidden_layers > MOST_LAYERS:
            raise PretrainedModelError(
                f"{reference} has {config.num_hidden_layers:,} layers in its configuration, and models have at most {MOST_LAYERS:,}: "
                "it is damaged"
            )
        model: PreTrainedModel = _from_cache_first(
            place, lambda source: model_from(source, dtype=dtype, **more)
        )
        return model


def _check_type(reference: str, model_type: str) -> None:
    if model_type not in SUPPORTED_TYPES:
        works = "; ".join(f"{name} ({models})" for name, models in SUPPORTED_TYPES.items())
        raise PretrainedModelError(
            f"{reference} is a model of type {model_type!r}. DTI attention works on these types: {works}"
        )


def _fit_embeddings(model: PreTrainedModel, num_tokens: int) -> None:
    num_rows = _embeddings(model)[0].shape[0]
    if num_tokens <= num_rows:
        return
    model.resize_token_embeddings(num_tokens, mean_resizing=False)
    for weight in _embeddings(model):
        weight[num_rows:] = weight[:num_rows].mean(0, dtype=torch.float32).to(weight.dtype)


def _embeddings(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights of the embedding and of the head, `(V, E)` each."""
    both: Any = (model.get_input_embeddings(), model.get_output_embeddings())
    return both[0].weight.data, both[1].weight.data


def _quantization(settings: ModelConfig, dtype: torch.dtype) -> BitsAndBytesConfig:
    if find_spec("bitsandbytes") is None:
        raise PretrainedModelError(
            f"model.quantize={settings.quantize} needs bitsandbytes: pip install bitsandbytes, or leave it at 0"
        )
    if settings.quantize == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def _use_liger(model: PreTrainedModel) -> None:
    """RMSNorm and SwiGLU by Liger's kernels, in place. The loss needs none: only [SUM] rows reach the head."""
    if find_spec("liger_kernel") is None:
        raise PretrainedModelError(
            "model.liger needs liger-kernel: pip install liger-kernel, or leave it out"
        )
    if not torch.cuda.is_available():
        raise PretrainedModelError("model.liger needs a GPU, and PyTorch sees none: leave it out")
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    off = dict.fromkeys(("rope", "cross_entropy", "fused_linear_cross_entropy"), False)
    _apply_liger_kernel_to_instance(model=model, rms_norm=True, swiglu=True, **off)
