"""Launchers' environments: the settings rule, and what says which processes there are is looked at first."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState

from dti_model.config import ModelConfig, OptimConfig, TrainConfig
from dti_model.devices import device_of_rank
from dti_model.launch import num_processes
from dti_model.precision import Precision
from dti_model.ranks import join_ranks
from dti_model.training import training_arguments


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    monkeypatch.setattr(os, "environ", os.environ.copy())  # what a run takes out comes back
    return TrainConfig(tmp_path / "data", tmp_path / "run", model=ModelConfig(layers=1))


def test_the_precision_is_that_of_the_settings(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """`accelerate launch` exports its own answer: a run whose config.yaml said float32 was trained in bfloat16."""
    with monkeypatch.context() as patch:
        for told, precision in (("bf16", "fp32"), ("fp16", "fp32"), ("no", "bf16"), ("fp8", "bf16")):
            patch.setenv("ACCELERATE_MIXED_PRECISION", told)
            patch.setenv("ACCELERATE_DYNAMO_BACKEND", "inductor")
            patch.setenv("ACCELERATE_USE_FSDP", "true")
            arguments = training_arguments(
                dataclasses.replace(config, optim=OptimConfig(precision=precision))
            )
            expected = "bf16" if precision == "bf16" else "no"
            assert arguments.mixed_precision == expected
            AcceleratorState._reset_state(reset_partial_state=True)
            accelerator = Accelerator(cpu=True)  # what the environment alone would make
            assert accelerator.mixed_precision == expected
            assert accelerator.state.dynamo_plugin.backend.value == "NO"
            AcceleratorState._reset_state(reset_partial_state=True)
            assert "ACCELERATE_USE_FSDP" not in os.environ


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_shards_are_gathered_in_the_precision(config: TrainConfig, precision: Precision) -> None:
    """accelerate's policy had every layer's inputs cast, which copied the `Stream` of a pass: a reset read initial states of None."""
    arguments = training_arguments(
        dataclasses.replace(config, optim=OptimConfig(fsdp=True, precision=precision))
    )
    plugin = FullyShardedDataParallelPlugin(**arguments.fsdp_plugin_args)
    if precision == "bf16":
        plugin.set_mixed_precision("bf16")  # as accelerate does
        policy = plugin.mixed_precision_policy
        assert (policy.param_dtype, policy.reduce_dtype) == (torch.bfloat16, torch.float32)
        assert not policy.cast_forward_inputs
    else:
        assert plugin.mixed_precision_policy is None


@pytest.mark.parametrize("name", ["DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"])
def test_another_way_to_train_is_refused(
    config: TrainConfig, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(ValueError, match=rf"the environment asks for .* \(ACCELERATE_USE_{name}\)"):
        training_arguments(config)


PAIR = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"WORLD_SIZE": "abc"},
            "WORLD_SIZE in the environment must be an integer >= 1, got 'abc': start with",
        ),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE in the environment must be an integer >= 1, got ''"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE in the environment must be an integer >= 1, got '0'"),
        ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE in the environment must be an integer >= 1, got '999"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK in the environment must be an integer >= 0, got 'x'"),
        (
            {"WORLD_SIZE": "2"},
            "WORLD_SIZE=2 and no RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT: start with torchrun, or unset WORLD_SIZE",
        ),
        ({**PAIR, "LOCAL_RANK": None}, "WORLD_SIZE=2 and no LOCAL_RANK: start with torchrun"),
        ({**PAIR, "MASTER_PORT": "x"}, "MASTER_PORT in the environment must be an integer >= 0, got 'x'"),
        ({**PAIR, "RANK": "2"}, "RANK=2 in the environment must be below WORLD_SIZE=2"),
        ({**PAIR, "RANK": "-1"}, "WORLD_SIZE=2 and no RANK"),
    ],
)
def test_processes_that_no_launcher_started(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str | None], message: str
) -> None:
    """`invalid literal for int()`, without a name; and without LOCAL_RANK each process took itself for the only one."""
    for name in (*PAIR, "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        if value is not None:
            monkeypatch.setenv(name, value)
    for call in (lambda: device_of_rank("cpu"), join_ranks, lambda: training_arguments(config)):
        with pytest.raises(ValueError, match=re.escape(message)):
            call()


def test_what_launchers_say_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*PAIR, "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert num_processes() == 1
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "-1")
    assert num_processes() == 1
    for name, value in PAIR.items():
        monkeypatch.setenv(name, value)
    assert num_processes() == 2
