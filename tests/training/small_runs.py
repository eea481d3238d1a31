"""Runs of about a second, and runs that are killed at a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dti_model.config import ModelConfig, OptimConfig, TrainConfig
from dti_model.training import StreamTrainer, train


def small_model(layers: int = 1, **settings: Any) -> ModelConfig:
    """A Llama from scratch of width 16."""
    return ModelConfig(layers=layers, width=16, heads=2, kv_heads=1, mlp_width=24, **settings)


def small_run(data: Path, out: Path, **settings: Any) -> TrainConfig:
    """One layer, one epoch, prompts of three targets; `settings` replace these."""
    small: dict[str, Any] = {
        "k": 3,
        "window": 3,
        "progress": False,
        "report_to": (),
        "model": small_model(),
        "optim": OptimConfig(epochs=1, token_budget=600),
    }
    return TrainConfig(data=data, out=out, **{**small, **settings})


class Interrupted(Exception):
    """Stands for a killed process."""


def train_until(step: int, config: TrainConfig) -> None:
    """Train, and end as a killed process does after `step` optimizer steps."""
    training_step = StreamTrainer.training_step

    def killed(self: StreamTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.state.global_step == step:
            raise Interrupted
        return training_step(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StreamTrainer, "training_step", killed)
        with pytest.raises(Interrupted):
            train(config)
