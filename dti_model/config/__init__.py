from __future__ import annotations

from dti_model.config.file import CONFIG_FILE
from dti_model.config.settings import LoraSettings, ModelConfig, OptimConfig, TrainConfig

__all__ = ["CONFIG_FILE", "LoraSettings", "ModelConfig", "OptimConfig", "TrainConfig"]
