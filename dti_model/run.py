"""A run folder: what a training run leaves behind, and how it is read back.

config.yaml          every setting
model/               weights (safetensors) and configuration of the best epoch, and the tokenizer
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
from dti_model.metrics import click_metrics
from dti_model.prompts import PromptBuilder, PromptFormat
from dti_model.scoring import score_targets

MODEL_FOLDER, CHECKPOINTS_FOLDER, METRICS_FILE = "model", "checkpoints", "metrics.json"


@dataclass(eq=False)
class Run:
    """A model with what it needs to read prompts of a data set."""

    config: TrainConfig
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    data: PreparedData
    builder: PromptBuilder

    @staticmethod
    def start(config: TrainConfig) -> Run:
        """A new model over the run's data; weights follow the seed."""
        data = PreparedData.open(config.data)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(data.tokenizer_dir)
        torch.manual_seed(config.seed)
        model = apply_dti(
            LlamaForCausalLM(llama_config(config.model, tokenizer)), config.dti, config.model.dropout
        )
        # The head is the embedding; without this, Trainer warns that a checkpoint lacks it.
        model._keys_to_ignore_on_save = ["lm_head.weight"]
        return Run._over(config, model, tokenizer, data)

    @staticmethod
    def load(folder: Path, data_folder: Path | None = None, device: str | None = None) -> Run:
        """A trained run, over the data it was trained on or another prepared folder.

        Raises:
            FileNotFoundError: `folder` is no run folder, or its training has not ended.
        """
        config = TrainConfig.load(folder)
        path = folder / MODEL_FOLDER
        if not (path / "config.json").is_file():
            raise FileNotFoundError(
                f"{path} holds no model: the run has not ended. Give `dti train` the same settings again to go on"
            )
        tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
        model = apply_dti(AutoModelForCausalLM.from_pretrained(path), config.dti, config.model.dropout)
        model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))  # type: ignore[arg-type]
        return Run._over(config, model, tokenizer, PreparedData.open(data_folder or config.data))

    @staticmethod
    def _over(
        config: TrainConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: PreparedData
    ) -> Run:
        prompt_format = PromptFormat.of(tokenizer, config.window, config.max_item_tokens)
        return Run(config, model, tokenizer, data, PromptBuilder(data, tokenizer, prompt_format))

    def score(self, split: str, k: int | None = 1, progress: bool = False) -> npt.NDArray[np.float64]:
        """Click probabilities of a split's targets, in the order of `data.targets(split)`."""
        return score_targets(
            self.model,
            self.config.dti,
            self.builder,
            self.data.targets(split),
            token_budget=self.config.optim.token_budget,
            k=k,
            progress=f"scoring {split}" if progress else None,
        )

    def metrics(self, split: str, probabilities: npt.NDArray[np.float64]) -> dict[str, float]:
        """Click metrics of a split's scores."""
        rows = self.data.targets(split)
        return click_metrics(self.data.label[rows], probabilities, self.data.users_of(rows))

    def write_predictions(self, path: Path, split: str, probabilities: npt.NDArray[np.float64]) -> None:
        """One Parquet row per target."""
        rows = self.data.targets(split)
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
