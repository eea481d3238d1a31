"""LoRA through peft: low-rank updates of the projections, and the embedding row of [SUM], which the pretrained model has never seen.

W x  ->  W x + alpha / rank * B A dropout(x),    B = 0 at the start
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from dti_model.config import LoraSettings


def add_lora(model: PreTrainedModel, settings: LoraSettings, sum_token: int) -> PeftModel:
    """Freeze a model and add trainable updates; before or after `apply_dti`.

    Args:
        model: a causal LM whose embedding has a row for [SUM].
        settings: rank, alpha, dropout and which projections.
        sum_token: id of [SUM]; only this row of the embedding (and of a tied head) is trained.

    Returns:
        The model inside peft's wrapper. Updates are random numbers of torch's global generator.
    """
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # peft takes fractions too
        lora_dropout=settings.dropout,
        target_modules=list(settings.projections),
        trainable_token_indices=[sum_token],  # peft gives a tied head the same row
    )
    adapted = get_peft_model(model, config)
    assert isinstance(adapted, PeftModel)
    # With a name, every checkpoint would look the base model up (perhaps on the hub), see that its vocabulary has grown, and
    # store the whole embedding. `save_adapter` writes the name. (In the place of None peft would put the name again.)
    adapted.peft_config["default"].base_model_name_or_path = ""
    return adapted


def save_adapter(model: PeftModel, folder: Path, base: str, weights: dict[str, Tensor] | None = None) -> None:
    """Write updates, [SUM] row and the name of the base model: `adapter_model.safetensors`, `adapter_config.json`.

    `weights`: the gathered state of a sharded model.
    """
    config = model.peft_config["default"]
    config.base_model_name_or_path = base
    try:
        model.save_pretrained(str(folder), save_embedding_layers=False, state_dict=weights)
    finally:
        config.base_model_name_or_path = ""


def merge(model: PeftModel) -> PreTrainedModel:
    """The base model with updates and [SUM] row added into its weights; in place."""
    merged: PreTrainedModel = model.merge_and_unload()
    merged.tie_weights()
    return merged


def keep_token_indices(model: nn.Module) -> None:
    """Let trained embedding rows find their place by an index that stays on the device; in place, and nothing that is computed changes.

    peft makes it anew in every pass and copies it from the host, which cannot be captured in a CUDA graph.
    """
    for layer in model.modules():
        if type(layer) is TrainableTokensLayer:
            layer.__class__ = _KeptIndicesLayer
            vars(layer)["dti_indices"] = {}


class _KeptIndicesLayer(TrainableTokensLayer):
    """A class of a module, so that a model can be pickled."""

    def get_merged_weights(self, active_adapters: list[str]) -> Tensor:
        """As that of its base."""
        layer: Any = self
        weight: Tensor = layer.base_layer.weight
        for name in active_adapters:
            key = name, weight.device
            if key not in layer.dti_indices:
                layer.dti_indices[key] = torch.tensor(layer.token_indices[name], device=weight.device)
            delta = layer.trainable_tokens_delta[name].to(weight)
            weight = weight.index_copy(dim=0, index=layer.dti_indices[key], source=delta)
        return weight
