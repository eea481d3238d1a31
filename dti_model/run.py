"""A run folder: what a training run leaves behind, and how it is read back.

config.yaml          every setting
model/               weights (safetensors) and configuration of the best epoch, and the tokenizer; of a LoRA run the adapter,
                     which names its base model
checkpoints/         Trainer's, to resume from
metrics.json         {"test": {...}, "val": {...}, "baselines": {"test": {...}, "val": {...}}, "training": {...}}
predictions-*.parquet  one row per target: user, item, timestamp, label, probability
report.png           loss, validation AUC and calibration
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from dti_model.attention import apply_dti
from dti_model.config import ModelConfig, TrainConfig
from dti_model.data import PreparedData
from dti_model.data.split import SPLIT_CODES
from dti_model.lora import add_lora, load_adapter, save_adapter
from dti_model.metrics import click_metrics
from dti_model.model_card import Description, plain_differences, token_window, write_card
from dti_model.pretrained import load_causal_lm, load_tokenizer
from dti_model.prompts import PromptBuilder, PromptFormat
from dti_model.scoring import score_targets

MODEL_FOLDER, CHECKPOINTS_FOLDER, METRICS_FILE = "model", "checkpoints", "metrics.json"


@dataclass(eq=False)
class Run:
    """A model with what it needs to read prompts of a data set."""

    config: TrainConfig
    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    data: PreparedData
    builder: PromptBuilder

    @staticmethod
    def start(config: TrainConfig) -> Run:
        """A new model over the run's data; weights follow the seed."""
        data = PreparedData.open(config.data)
        if config.model.pretrained is None:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(data.tokenizer_dir)
            torch.manual_seed(config.seed)
            plain: PreTrainedModel = LlamaForCausalLM(llama_config(config.model, tokenizer))
        else:
            tokenizer = load_tokenizer(config.model.pretrained)
            plain = load_causal_lm(config.model, tokenizer)
        model = apply_dti(plain, config.dti, config.model.dropout_rate)
        if model.config.tie_word_embeddings:
            # The head is the embedding; without this, Trainer warns that a checkpoint lacks it.
            model._keys_to_ignore_on_save = ["lm_head.weight"]
        run = Run._over(config, model, tokenizer, data)
        if config.model.uses_lora:
            torch.manual_seed(config.seed)
            run.model = add_lora(model, config.model.lora, run.builder.format.sum_token)
        return run

    @staticmethod
    def load(
        folder: Path, data_folder: Path | None = None, device: str | None = None, other_data: bool = False
    ) -> Run:
        """A trained run, over the data it was trained on or another prepared folder.

        Raises:
            FileNotFoundError: `folder` is no run folder, or its training has not ended.
        """
        config = TrainConfig.load(folder)
        path = folder / MODEL_FOLDER
        if not any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
            raise FileNotFoundError(
                f"{path} holds no model: the run has not ended. Give `dti train` the same settings again to go on"
            )
        tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if config.model.uses_lora:
            base = apply_dti(load_causal_lm(config.model, tokenizer, device), config.dti)
            model: Any = load_adapter(base, path)
        else:
            model = apply_dti(AutoModelForCausalLM.from_pretrained(path), config.dti)
            if config.dti.train_slopes:
                load_slopes(model, path)
        if not config.model.quantize:
            model.to(device)
        return Run._over(config, model.eval(), tokenizer, PreparedData.open(data_folder or config.data))

    @staticmethod
    def _over(
        config: TrainConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: PreparedData
    ) -> Run:
        prompt_format = PromptFormat.of(
            tokenizer, config.window, config.max_item_tokens, config.model.instruction
        )
        return Run(config, model, tokenizer, data, PromptBuilder(data, tokenizer, prompt_format))

    def save_model(self, folder: Path, weights: dict[str, Any] | None = None) -> None:
        """Weights or adapter, and the tokenizer, in safetensors and JSON; `weights`: gathered ones of a sharded model."""
        if isinstance(self.model, PeftModel):
            assert self.config.model.pretrained is not None
            save_adapter(self.model, folder, self.config.model.pretrained, weights)
        else:
            self.model.save_pretrained(folder, state_dict=weights)
        self.tokenizer.save_pretrained(folder)
        self._describe(folder)

    def _describe(self, folder: Path) -> None:
        """dti.json and a model card: plain transformers load the folder, and may give other probabilities."""
        prompt, config = self.builder.format, self.model.config
        differences = plain_differences(self.config.dti, prompt.window, config)
        item_text, fingerprint = self.data.text_rule, self.data.fingerprint
        description = Description(
            self.config.dti, prompt, item_text, fingerprint, differences, token_window(config)
        )
        description.write(folder)
        write_card(folder, description, self.config.model, of_run=config)

    def targets(self, split: str) -> npt.NDArray[np.int64]:
        """The rows of a split that this run is measured on: all targets, or `max_eval_targets` of them."""
        return eval_targets(self.data, split, self.config)

    def score(self, split: str, k: int | None = 1, progress: bool = False) -> npt.NDArray[np.float64]:
        """Click probabilities, in the order of `targets(split)`."""
        return score_targets(
            self.model,
            self.config.dti,
            self.builder,
            self.targets(split),
            token_budget=self.config.optim.token_budget,
            k=k,
            progress=f"scoring {split}" if progress else None,
        )

    def metrics(self, split: str, probabilities: npt.NDArray[np.float64]) -> dict[str, float]:
        """Click metrics of a split's scores."""
        rows = self.targets(split)
        return click_metrics(self.data.label[rows], probabilities, self.data.users_of(rows))

    def write_predictions(self, path: Path, split: str, probabilities: npt.NDArray[np.float64]) -> None:
        """One Parquet row per target."""
        rows = self.targets(split)
        users = np.asarray(self.data.user_ids, object)[self.data.users_of(rows)]
        items = np.asarray(self.data.item_ids, object)[self.data.item[rows]]
        pl.DataFrame(
            {
                "user": users.astype(str),
                "item": items.astype(str),
                "timestamp": self.data.timestamp[rows],
                "label": self.data.label[rows],
                "probability": probabilities,
            }
        ).write_parquet(path)


def eval_targets(data: PreparedData, split: str, config: TrainConfig) -> npt.NDArray[np.int64]:
    """Targets of a split in the order of `data.targets`; with `max_eval_targets` a random subset that follows the seed."""
    rows, limit = data.targets(split), config.max_eval_targets
    if not limit or len(rows) <= limit:
        return rows
    rng = np.random.default_rng([config.seed, SPLIT_CODES[split]])
    return rows[np.sort(rng.choice(len(rows), limit, replace=False))]


def load_slopes(model: PreTrainedModel, folder: Path) -> None:
    """Trained slopes, which a plain transformers model has no place for and leaves out."""
    for file in sorted(folder.glob("*.safetensors")):
        slopes = {name: x for name, x in load_file(file).items() if name.endswith(".alibi_slopes")}
        model.load_state_dict(slopes, strict=False)


def llama_config(model: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> LlamaConfig:
    """A small Llama over the tokenizer's vocabulary."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=model.width,
        intermediate_size=model.mlp_width,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        max_position_embeddings=2**20,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=None,
        pad_token_id=None,
    )


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write through a temporary name: a killed run leaves the old file or the new one."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    temporary.replace(path)
