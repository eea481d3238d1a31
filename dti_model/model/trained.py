"""Opening a trained run: its settings, its model folder once that is checked, its data and pretrained model where they are now.

config.yaml holds absolute paths, so that a run works in every working directory. If nothing is at such a path any more, the same place
relative to the run folder is tried: folders of runs and data that were moved together still find each other.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from dti_model.config import (
    CONFIG_FILE,
    HUB,
    DTIConfig,
    PretrainedModelError,
    TrainConfig,
    is_sealed,
    locate,
)
from dti_model.files import DamagedFileError, check_checksums
from dti_model.model.attention import apply_dti
from dti_model.model.fingerprints import (
    MODEL_FOLDER,
    PROVENANCE_FILE,
    OtherOriginError,
    Provenance,
    base_model_fingerprint,
)
from dti_model.model.safe_loading import model_from


def open_trained(folder: Path) -> tuple[TrainConfig, Provenance | None]:
    """Check that `model/` of a run folder is what was written, and was trained with the settings of config.yaml.

    Returns:
        The settings and the fingerprints; None: version 0.1.0 wrote none.

    Raises:
        FileNotFoundError: `folder` is no run folder, or its training has not ended.
        DamagedFileError: a file is not what was written, or missing.
        OtherOriginError: the model was trained with other settings.
    """
    config = TrainConfig.load(folder)
    path = folder / MODEL_FOLDER
    if not any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise FileNotFoundError(
            f"{path} holds no model: the run has not ended. Give `dti train` the same settings again to go on"
        )
    # Version 0.1.0 wrote neither seals nor fingerprints.
    is_new = (path / PROVENANCE_FILE).is_file() or is_sealed(folder / CONFIG_FILE)
    check_checksums(path, _way_out(folder), required=is_new, is_model=True)
    made_of = Provenance.load(path, _way_out(folder))
    if is_new and made_of is None:
        raise DamagedFileError(f"{path / PROVENANCE_FILE} is missing. {_way_out(folder)}")
    if made_of is not None and not made_of.has_settings_of(config):
        raise OtherOriginError(
            f"{folder / CONFIG_FILE} does not hold the settings that {path} was trained with: one of them is another run's. "
            f"{_way_out(folder)}"
        )
    return config, made_of


def _way_out(folder: Path) -> str:
    return f"Put it back, or delete {folder} and train again"


def with_base(config: TrainConfig, folder: Path, base: str | None, made_of: Provenance | None) -> TrainConfig:
    """The settings of a run, with the pretrained model of a LoRA run where it is now: at `base`, where it was, or moved along.

    Raises:
        PretrainedModelError: there is no such model.
        OtherOriginError: it is another model.
        ValueError: `base` is given and the run needs none.
    """
    model = config.model
    if not model.uses_lora:
        if base is not None:
            raise ValueError(f"{folder} holds a whole model and needs no base model: leave --base out")
        return config
    assert model.pretrained is not None
    reference = base or model.pretrained
    if base is None and not reference.startswith(HUB) and not Path(reference).exists():
        near = _moved(Path(reference), config, folder)
        reference = str(near) if near.exists() else reference
    try:
        found = base_model_fingerprint(locate(reference))
    except PretrainedModelError as error:
        raise PretrainedModelError(
            f"the pretrained model of {folder} is not at {base or model.pretrained}: say with --base where it is ({error})"
        ) from error
    if made_of is not None and made_of.base_model != found:
        raise OtherOriginError(
            f"{reference} is not the pretrained model that {folder} was trained from: its adapter fits that one only. Say with "
            "--base where it is"
        )
    return replace(config, model=replace(model, pretrained=reference))


def data_of(config: TrainConfig, folder: Path) -> Path:
    """The place of a run's data now.

    Raises:
        FileNotFoundError: neither where it was, nor moved together with the run folder.
    """
    near = _moved(config.data, config, folder)
    for path in (config.data, near):
        if path.is_dir():
            return path
    raise FileNotFoundError(
        f"the data that {folder} was trained on is neither at {config.data} nor at {near}: say with --data where it is"
    )


def _moved(path: Path, config: TrainConfig, folder: Path) -> Path:
    """A path of config.yaml, if everything has been moved with the run folder."""
    return Path(os.path.normpath(folder.absolute() / os.path.relpath(path, config.out)))


@contextmanager
def loading(folder: Path) -> Iterator[None]:
    """Name `model/` of a run folder in the error of a library: one without checksums (of version 0.1.0) may be damaged.

    Raises:
        DamagedFileError: naming the folder.
    """
    try:
        yield
    except (PretrainedModelError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DamagedFileError(
            f"{folder / MODEL_FOLDER} cannot be read ({reason:.300}). {_way_out(folder)}"
        ) from error


def load_whole(folder: Path, dti: DTIConfig) -> PreTrainedModel:
    """A whole model of a folder, with its trained slopes, which plain transformers have no place for."""
    model = apply_dti(model_from(folder), dti)
    if dti.train_slopes:
        for file in sorted(folder.glob("*.safetensors")):
            slopes = {name: x for name, x in load_file(file).items() if name.endswith(".alibi_slopes")}
            model.load_state_dict(slopes, strict=False)
    return model
