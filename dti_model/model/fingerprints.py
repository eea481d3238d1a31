"""Fingerprints of what a run is made of: prepared data, tokenizer, pretrained model, settings.

A run folder's model, its checkpoints and its metrics carry them, and whoever reads a run compares them. Data that was prepared again,
perhaps with another split, would silently put trained targets into the test set. With another tokenizer or base model the weights would
compute another function.

    data        `PreparedData.fingerprint`: the files that `dti prepare` wrote
    tokenizer   everything that decides the ids of a text, and the ids of its special tokens
    settings    what in config.yaml decides the result: not where things are, nor bars and log lines
    base model  its configuration, and of every file of weights the name, the size and 65 blocks of 4 KiB spread evenly: another model
                differs in nearly all of them, and no one waits for many GiB to be hashed. One changed weight may go unseen
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dti_model.config import GLUED, PretrainedModelError, Reference, TrainConfig, locate
from dti_model.data import plain_backend
from dti_model.files import (
    CHECKSUMS_FILE,
    read_checksums,
    read_file,
    read_sealed,
    sha256_of_json,
    write_sealed,
)
from dti_model.model.safe_loading import may_hold_weights
from dti_model.precision import Resolved

PROVENANCE_FILE, MODEL_FOLDER = "provenance.json", "model"
_BLOCKS, _BLOCK_BYTES = 64, 4096
_WEIGHTS = (".safetensors", ".bin", ".gguf")
# A copy of a model may differ in these.
_PASSING = ("transformers_version", "_name_or_path")
# Of the settings, what decides neither weights nor metrics; of `optim`, save_steps. `calibrate` comes after training: the scores that it
# starts from are the same, and older runs, which did without, keep their fingerprints.
_WITHOUT_A_SAY = ("data", "out", "progress", "logging_steps", "report_to", "compare_steps", "calibrate")
_DEFAULTS = asdict(TrainConfig(Path(), Path()))
del _DEFAULTS["optim"]["precision"]  # see _optim_as_ever


class OtherOriginError(ValueError):
    """Data, tokenizer or pretrained model are not those of the run; the message says which, and the way out."""


@dataclass(frozen=True)
class Provenance:
    """Fingerprints of what a run is made of, in hexadecimal digits.

    Attributes:
        data: of the prepared data.
        tokenizer: of the tokenizer.
        base_model: of the pretrained model; None: trained from scratch.
        settings: of the run's settings; None: not known.
        precision: that the run computed in, whatever `optim.precision` means on another machine; None: not known.
        init: of the weights of the run that it goes on from; None: it does from none.
    """

    data: str
    tokenizer: str
    base_model: str | None = None
    settings: str | None = None
    precision: Resolved | None = None
    init: str | None = None

    @staticmethod
    def of(
        data: Any,
        tokenizer: Any,
        config: TrainConfig,
        precision: Resolved | None = None,
        init: str | None = None,
    ) -> Provenance:
        """Of prepared data, a fast tokenizer, the settings of a run, what it computed in, and the weights that it began with."""
        pretrained = config.model.pretrained
        base = None if pretrained is None else base_model_fingerprint(locate(pretrained))
        return Provenance(
            data.fingerprint,
            tokenizer_fingerprint(tokenizer),
            base,
            settings_fingerprint(config),
            precision,
            init,
        )

    def save(self, folder: Path) -> None:
        """Write `provenance.json` into a folder."""
        write_sealed(folder / PROVENANCE_FILE, asdict(self))

    @staticmethod
    def load(folder: Path, way_out: str) -> Provenance | None:
        """Read it back; None: the folder is of version 0.1.0.

        Raises:
            DamagedFileError: it is not what was written.
        """
        path = folder / PROVENANCE_FILE
        return Provenance.from_dict(read_sealed(path, way_out)) if path.is_file() else None

    @staticmethod
    def from_dict(fields: Mapping[str, Any]) -> Provenance:
        """From what `asdict` gave."""
        return Provenance(
            fields["data"],
            fields["tokenizer"],
            fields["base_model"],
            fields.get("settings"),
            fields.get("precision"),
            fields.get("init"),
        )

    def has_settings_of(self, config: TrainConfig) -> bool:
        """Whether the run had these settings, as far as is known."""
        return self.settings in (None, settings_fingerprint(config))

    def differs(self, other: Provenance) -> str | None:
        """In words, what two runs do not share; None: nothing."""
        if self.data != other.data:
            return "the prepared data"
        if self.base_model != other.base_model:
            return "the pretrained model"
        if self.init != other.init:
            return "the run that it goes on from"
        if None not in (self.settings, other.settings) and self.settings != other.settings:
            return "the settings"
        return "the tokenizer" if self.tokenizer != other.tokenizer else None


def settings_fingerprint(config: TrainConfig) -> str:
    """64 hexadecimal digits over the settings that decide weights and metrics; places, bars, log lines and checkpoints have no say.

    A setting at its default is left out: one that a later version adds changes no fingerprint.
    """
    plain: dict[str, Any] = asdict(config)
    for name in _WITHOUT_A_SAY:
        del plain[name]
    plain["optim"] = _optim_as_ever(plain["optim"])
    plain["init"] = (
        True if config.init is not None else None
    )  # which run it is, its weights' fingerprint says
    # Prompts had this template before there was a choice.
    template = None if config.model.prompt_template == GLUED else config.model.prompt_template
    plain["model"] = {
        **plain["model"],
        "pretrained": config.model.pretrained is not None,
        "template": template,
    }
    return sha256_of_json(_unlike(plain, _DEFAULTS))


def _optim_as_ever(optim: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the optimisation as they were fingerprinted before `precision` was one: it was a boolean, and float32 the default.

    So fingerprints of older runs hold, and those of newer ones do not depend on which precision is the default.
    """
    kept = {name: value for name, value in optim.items() if name not in ("save_steps", "precision", "graphs")}
    precision = optim["precision"]
    said: dict[str, Any] = {"bf16": {"bf16": True}, "fp32": {}}.get(precision, {"precision": precision})
    return kept | said


def _unlike(value: dict[str, Any], default: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that differ from the defaults; 1 and 1.0 are one number."""
    result: dict[str, Any] = {}
    for name, item in value.items():
        if isinstance(item, dict):
            result[name] = _unlike(item, default.get(name, {}))
        elif name not in default or item != default[name]:
            result[name] = int(item) if isinstance(item, float) and item.is_integer() else item
    return result


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """64 hexadecimal digits over what decides the ids of a text and the ids of special tokens.

    Padding, truncation and post-processing have no say in prompts, and saving and reading a tokenizer may change how they are written.

    Args:
        tokenizer: a fast transformers tokenizer or a `tokenizers.Tokenizer`.

    Raises:
        TypeError: another object.
    """
    parts = json.loads(plain_backend(tokenizer).to_str())
    special = getattr(tokenizer, "bos_token_id", None)
    return sha256_of_json({"backend": parts, "bos": special})


def base_model_fingerprint(place: Reference) -> str:
    """64 hexadecimal digits over a pretrained model (see the module docstring).

    Cost: 260 KiB are read of every file of weights, a few milliseconds.

    Raises:
        PretrainedModelError: a model of the hub has not been downloaded.
        OSError: a file cannot be read.
    """
    if place.gguf_file is not None:
        return sha256_of_json({"weights": {"gguf": _sample(Path(place.source) / place.gguf_file)}})
    folder = place.folder
    try:
        config = json.loads(read_file(folder / "config.json"))
    except (ValueError, RecursionError) as error:
        raise PretrainedModelError(f"{folder / 'config.json'} is no JSON ({error})") from error
    if not isinstance(config, dict):
        raise PretrainedModelError(
            f"{folder / 'config.json'} must hold an object, the configuration of a model"
        )
    weights = sorted(
        path
        for path in folder.iterdir()
        if path.suffix in _WEIGHTS and may_hold_weights(path.name) and path.is_file()
    )
    return sha256_of_json(
        {
            "config": {name: value for name, value in config.items() if name not in _PASSING},
            "weights": {path.name: _sample(path) for path in weights},
        }
    )


def weights_fingerprint(folder: Path) -> str:
    """64 hexadecimal digits over the weights in a model folder of a run, by its checksums; no weight is read for it.

    Raises:
        DamagedFileError: there are no checksums.
    """
    found = read_checksums(folder / CHECKSUMS_FILE, f"Train the run of {folder} again")
    return sha256_of_json({name: facts for name, facts in found.items() if name.endswith(".safetensors")})


def _sample(path: Path) -> list[Any]:
    """Size, and the sha256 of blocks spread evenly."""
    size, digest = path.stat().st_size, hashlib.sha256()
    with path.open("rb") as file:
        for block in range(_BLOCKS + 1):
            file.seek(max(0, size - _BLOCK_BYTES) * block // _BLOCKS)
            digest.update(file.read(_BLOCK_BYTES))
    return [size, digest.hexdigest()]
