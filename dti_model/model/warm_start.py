"""Training that goes on from a finished run, `init`: its weights, and the targets that it has not trained on.

chain of the new data    [first folder, extension 1, ..., the new data]      fingerprints, see data/extension.py
data of the run          chain[i]   ->   training targets with `since` > i are new to it
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn

from dti_model.config import TrainConfig, as_yaml, locate
from dti_model.data import PreparedData
from dti_model.files import DamagedFileError
from dti_model.model.fingerprints import (
    MODEL_FOLDER,
    OtherOriginError,
    Provenance,
    base_model_fingerprint,
    weights_fingerprint,
)
from dti_model.model.trained import loading, open_trained

# Of a model whose head is its embedding.
_TIED = {"lm_head.weight"}


def train_targets(config: TrainConfig, data: PreparedData) -> npt.NDArray[np.int64]:
    """Rows of the training targets of a run, in their global order: all, or those that are new to the run it goes on from.

    Raises:
        OtherOriginError: the data extend none that the run was trained on, or nothing is new.
        FileNotFoundError, DamagedFileError: as `open_trained`.
    """
    if config.init is None or config.init_targets == "all":
        return data.targets("train")
    _, made_of = _opened(config.init)
    if made_of.data not in data.chain:
        raise OtherOriginError(
            f"{data.path} does not extend the data that {config.init} was trained on, so what is new is not known: make it with "
            "`dti prepare custom --extend`, or train on all its training targets with --init-targets all"
        )
    rows = data.targets("train", after=data.chain.index(made_of.data))
    if not rows.size:
        raise OtherOriginError(
            f"{data.path} has no training target that {config.init} was not trained on: extend it with `dti prepare custom --extend`, "
            "or train on all its training targets with --init-targets all"
        )
    return rows


def check_fits(config: TrainConfig) -> None:
    """Check that a run's settings are those of the network of the run that it goes on from, and that this one is whole.

    Raises:
        OtherOriginError: a setting, or the pretrained model, is another one.
        FileNotFoundError, DamagedFileError: as `open_trained`.
    """
    assert config.init is not None
    earlier, made_of = _opened(config.init)
    now = _network(config)
    for name, before in _network(earlier).items():
        if before != now[name]:
            raise OtherOriginError(
                f"{config.init} was trained with other settings of the network ({name} was {as_yaml(before)} and is now "
                f"{as_yaml(now[name])}): leave that out, or train without --init"
            )
    pretrained = config.model.pretrained
    if pretrained is not None and base_model_fingerprint(locate(pretrained)) != made_of.base_model:
        raise OtherOriginError(
            f"model.pretrained, {pretrained}, is not the model that {config.init} was trained from: name that one"
        )


def _network(config: TrainConfig) -> dict[str, Any]:
    """The settings that say what weights mean, by their dotted names: not dropout, nor how frozen weights are kept.

    Which pretrained model it is, fingerprints say.
    """
    plain = asdict(config)
    model, lora = plain["model"], plain["model"].pop("lora")
    for name in ("dropout", "dtype", "quantize", "liger"):
        del model[name]
    del lora["dropout"]
    model |= {"pretrained": config.model.pretrained is not None, "template": config.model.prompt_template}
    groups = {"model.": model, "model.lora.": lora, "dti.": plain["dti"]}
    return {group + name: value for group, values in groups.items() for name, value in values.items()}


def init_fingerprint(config: TrainConfig) -> str | None:
    """Of the weights of the run that a run goes on from; None: it does from none."""
    return None if config.init is None else weights_fingerprint(config.init / MODEL_FOLDER)


def load_init(model: nn.Module, folder: Path) -> None:
    """Put the weights, or the adapter, of a run into a model that was made with its settings; in place.

    Raises:
        DamagedFileError: they are not those of such a model.
    """
    with loading(folder):
        files = sorted((folder / MODEL_FOLDER).glob("*.safetensors"))
        weights: dict[str, Any] = {}
        for file in files:
            weights |= load_file(file)
        if isinstance(model, PeftModel):
            found: Any = set_peft_model_state_dict(model, weights)
            trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
            missing = trained.intersection(found.missing_keys)
        else:
            found = model.load_state_dict(weights, strict=False)
            missing = set(found.missing_keys) - _TIED
        wrong = [*missing, *found.unexpected_keys]
        if wrong or not weights:
            raise DamagedFileError(f"weights are missing or of another model: {min(wrong, default='all')}")


def _opened(folder: Path) -> tuple[TrainConfig, Provenance]:
    config, made_of = open_trained(folder)
    if made_of is None:
        raise OtherOriginError(
            f"{folder} was trained by version 0.1.0, which did not write down what on: train it again to go on from it"
        )
    return config, made_of
