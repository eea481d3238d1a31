"""Options that several commands share, each declared once, and the settings of a run that `train` and `search` take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from dti_model.cli.parser import Parser
from dti_model.config import CONFIG_FILE, TrainConfig
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


# Settings that a run takes from the one that it goes on from, unless they are given: what the network is, and its prompts.
_INHERITED = ("model", "dti", "k", "window", "max_item_tokens")


class SettingsParser(Parser):
    """Of settings: with `--init RUN`, the defaults of some are that run's."""

    def parse_args(self, args: Sequence[str], **kwargs: Any) -> Namespace:  # type: ignore[override]
        parsed = super().parse_args(args, **kwargs)
        init = parsed.get("init")
        if init is None or not (Path(init) / CONFIG_FILE).is_file():  # training says what is wrong with it
            return parsed
        self.set_defaults(_settings_of_run(Path(init)))
        return super().parse_args(args, **kwargs)


def _settings_of_run(folder: Path) -> dict[str, Any]:
    """By dotted names."""

    def flat(value: Any, name: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            return {name: value}
        return {key: x for part, inner in value.items() for key, x in flat(inner, f"{name}.{part}").items()}

    plain = asdict(TrainConfig.load(folder))
    return {key: x for name in _INHERITED for key, x in flat(plain[name], name).items()}


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
