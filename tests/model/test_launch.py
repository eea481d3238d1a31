"""Launchers' environments: the settings rule."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from dti_model.config import ModelConfig, OptimConfig, TrainConfig
from dti_model.train import _arguments


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    monkeypatch.setattr(os, "environ", os.environ.copy())  # what a run takes out comes back
    return TrainConfig(tmp_path / "data", tmp_path / "run", model=ModelConfig(layers=1))


def test_the_precision_is_that_of_the_settings(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """`accelerate launch` exports its own answer: a run whose config.yaml said float32 was trained in bfloat16."""
    with monkeypatch.context() as patch:
        for told, bf16 in (("bf16", False), ("fp16", False), ("no", True), ("fp8", True)):
            patch.setenv("ACCELERATE_MIXED_PRECISION", told)
            patch.setenv("ACCELERATE_DYNAMO_BACKEND", "inductor")
            patch.setenv("ACCELERATE_USE_FSDP", "true")
            optim = OptimConfig(bf16=bf16)
            arguments = _arguments(dataclasses.replace(config, optim=optim), optim)
            expected = "bf16" if bf16 else "no"
            assert arguments.mixed_precision == expected
            AcceleratorState._reset_state(reset_partial_state=True)
            accelerator = Accelerator(cpu=True)  # what the environment alone would make
            assert accelerator.mixed_precision == expected
            assert accelerator.state.dynamo_plugin.backend.value == "NO"
            AcceleratorState._reset_state(reset_partial_state=True)
            assert "ACCELERATE_USE_FSDP" not in os.environ


@pytest.mark.parametrize("name", ["DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"])
def test_another_way_to_train_is_refused(
    config: TrainConfig, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(ValueError, match=rf"the environment asks for .* \(ACCELERATE_USE_{name}\)"):
        _arguments(config, config.optim)
