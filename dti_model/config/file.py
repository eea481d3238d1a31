"""`config.yaml` of a run folder: every setting, readable by people, sealed by its last line.

    # Settings of a run of `dti train`, ...
    data: /data/ml-100k
    ...
    # sha256 9f86d0...                      of every byte before this line

A file that does not fit its seal is refused by name: with a changed value the folder would misstate how its run was trained. Files of
version 0.1.0 have neither first nor last line; they are read if they hold the settings of a run and nothing else. The seal or those
settings tell a run folder from the folder of another program that keeps a config.yaml.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml

from dti_model.config.bounds import as_yaml
from dti_model.config.older import as_it_began, newer_spelling
from dti_model.config.strict_yaml import parse_settings, read_text
from dti_model.files import whole_file

CONFIG_FILE = "config.yaml"
_FIRST_LINE = "# Settings of a run of `dti train`, sealed by the last line: change none, give `dti train` others and another --out\n"
_SEAL = re.compile(r"# sha256 ([0-9a-f]{64})\n?\Z")
# In every config.yaml of version 0.1.0.
_OLD_SETTINGS = {"data", "out", "k", "window", "seed", "dti", "model", "optim"}

Settings = TypeVar("Settings")


class ConfigFileError(ValueError):
    """A config.yaml has been changed or holds no settings of a run; the message names it and the way out."""


def write_config(settings: Any, path: Path) -> None:
    """Write a dataclass of settings, its paths as they are.

    Raises:
        WriteError: the disk is full; an older file is untouched.
    """
    plain = json.loads(json.dumps(asdict(settings), default=str))  # no tuples, no paths
    text = _FIRST_LINE + yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
    with whole_file(path) as temporary:
        temporary.write_text(f"{text}# sha256 {_sha256(text)}\n", encoding="utf-8")


def read_config(path: Path, kind: type[Settings], sealed: bool = False) -> Settings:
    """Read what `write_config` or version 0.1.0 wrote.

    Args:
        path: the file.
        kind: the dataclass.
        sealed: the folder is none of version 0.1.0, so that the file must have a seal.

    Raises:
        ConfigFileError: a setting is unknown, out of bounds or of another type, or the file does not fit its seal.
    """
    try:
        text = read_text(path)
        seal = _SEAL.search(text)
        if seal is None and (sealed or text.startswith(_FIRST_LINE)):
            raise ValueError(f"{path} is cut short or was written anew: its last line is not its seal")
        if seal is not None and _sha256(text[: seal.start()]) != seal[1]:
            raise ValueError(f"{path} was changed after the run had written it")
        raw = newer_spelling(parse_settings(text, path))
        if seal is None and not raw.keys() >= _OLD_SETTINGS:
            raise ValueError(f"{path} does not hold the settings of a run")
        return _built(kind, as_it_began(raw), "")
    except (ValueError, TypeError) as error:
        message = str(error) if str(path) in str(error) else f"{path}: {error}"
        raise ConfigFileError(
            f"{message}. Put the file back as it was, or train into another --out"
        ) from error


def is_sealed(path: Path) -> bool:
    """Whether a config.yaml has a seal, which version 0.1.0 did not write; whether it fits is for `read_config`."""
    return _SEAL.search(read_text(path)) is not None


def is_run_config(path: Path) -> bool:
    """Whether a config.yaml is one of ours, perhaps a damaged one."""
    try:
        text = read_text(path)
        if text.startswith(_FIRST_LINE) or _SEAL.search(text) is not None:
            return True
        return parse_settings(text, path).keys() >= _OLD_SETTINGS
    except (ValueError, OSError):
        return False


def _built(kind: type[Settings], raw: Mapping[str, Any], group: str) -> Settings:
    hints = get_type_hints(kind)
    names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(raw.keys() - names)
    if unknown:
        raise ValueError(f"{group}{unknown[0]} is no setting")
    values: dict[str, Any] = {}
    for name, value in raw.items():
        if is_dataclass(hints[name]):
            if not isinstance(value, dict):
                raise ValueError(f"{group}{name} must be a mapping of settings, got {as_yaml(value)}")
            value = _built(hints[name], value, f"{group}{name}.")
        elif isinstance(value, list):
            value = tuple(value)
        elif hints[name] in (Path, Path | None) and isinstance(value, str):
            value = Path(value)
        values[name] = value
    return kind(**values)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
