"""Options that several commands share, each declared once, and the settings of a run that `train` and `search` take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from dti_model.cli.parser import Parser
from dti_model.config import TrainConfig
from dti_model.precision import DEFAULT, Precision

_SHARED: dict[str, dict[str, Any]] = {
    "--config": {
        "action": "config",
        "metavar": "FILE",
        "help": "YAML file of settings; options after it win",
    },
    "--out": {"type": Path, "required": True, "help": "folder to make"},
    "--run": {"type": Path, "required": True, "help": "run folder made by `dti train`"},
    "--data": {"type": Path, "help": "prepared folder; default: the one that the run was trained on"},
    "--other-data": {
        "action": "store_true",
        "help": "accept a prepared folder that the run was not trained on; its targets may be among those trained on",
    },
    "--base": {
        "type": str,
        "metavar": "MODEL",
        "help": "where the pretrained model of a LoRA run is now; default: where it was, or moved together with the run folder",
    },
    "--device": {
        "type": str,
        "help": "torch device; default: cuda where there is one. Under torchrun every process takes a device of this type",
    },
    "--precision": {
        "type": Precision,
        "default": DEFAULT,
        "help": "compute in float32 (fp32), in bfloat16 (bf16), or in bfloat16 where the processor or GPU has instructions for it and else in "
        "float32 (auto), whatever the run was trained in; probabilities differ by less than .02",
    },
    "--calibration": {
        "type": bool,
        "default": True,
        "help": "calibrate probabilities by the temperature and bias that training fitted on validation, where it did; their order is the same",
    },
    "--progress": {"type": bool, "default": True, "help": "show a progress bar"},
}


def add_shared(parser: Parser, *names: str) -> None:
    """Add options by their names."""
    for name in names:
        parser.add_argument(name, **_SHARED[name])


def add_settings(parser: Parser, *without: str) -> None:
    """Add `--config` and an option for each setting of a run but some."""
    add_shared(parser, "--config")
    parser.add_class_arguments(TrainConfig, fail_untyped=True, skip=set(without))


def settings_of(options: Namespace, *others: str) -> TrainConfig:
    """The settings of a run among options; `others`: options that are none."""
    return TrainConfig(**{name: x for name, x in vars(options).items() if name not in ("config", *others)})
