"""The older spelling of a setting, which command lines, YAML files, grids and run folders may have, and what a run folder leaves out.

optim.bf16: true                                  optim.precision: bf16
optim.bf16: false                                 optim.precision: fp32
no optim.graphs in the config.yaml of a run       optim.graphs: false, since the run began before there were any
no model.template in that of a pretrained model   model.template: "{item}{label}", as all prompts were then
no calibrate in the config.yaml of a run          calibrate: false, likewise
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import yaml

from dti_model.config.bounds import GLUED, GROUPS, as_yaml

OLDER, NEWER = "optim.bf16", "optim.precision"


def newer_value(value: Any) -> str:
    """What `optim.precision` is where `optim.bf16` is `value`, perhaps as text.

    Raises:
        ValueError: it is neither true nor false.
    """
    said = value
    if isinstance(value, str):
        with suppress(ValueError, yaml.YAMLError):
            said = yaml.safe_load(value)
    if not isinstance(said, bool):
        raise ValueError(f"{OLDER} must be true or false, got {as_yaml(value)}")
    return "bf16" if said else "fp32"


def newer_spelling(settings: Mapping[str, Any], group: str = "") -> dict[str, Any]:
    """Settings in their newer spelling.

    Args:
        settings: by name, nested or dotted. Lists of values, as a grid has them, stay as they are: cells have their folders' names from them.
        group: what their names begin with, such as "optim.".

    Raises:
        ValueError: both spellings are there, or the older one has a value that it never had.
    """
    if {OLDER, NEWER} <= set(_names(settings, group)):
        raise ValueError(both_given(OLDER, NEWER))
    newer: dict[str, Any] = {}
    for name, value in settings.items():
        whole = group + name
        if whole in GROUPS and isinstance(value, Mapping):
            newer[name] = newer_spelling(value, f"{whole}.")
        elif whole == OLDER and not isinstance(value, list):
            newer[NEWER.removeprefix(group)] = newer_value(value)
        else:
            newer[name] = value
    return newer


def as_it_began(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in a run's config.yaml, with those that its version did not have as it computed without them."""
    began = {"calibrate": False, **settings}
    optim, model = settings.get("optim"), settings.get("model")
    if isinstance(optim, Mapping):
        began["optim"] = {"graphs": False, **optim}
    if isinstance(model, Mapping) and model.get("pretrained") is not None:
        began["model"] = {"template": GLUED, **model}
    return began


def both_given(older: str, newer: str) -> str:
    """The sentence about two spellings of one setting."""
    return f"{older} is an older spelling of {newer}, and both are given: keep {newer}"


def _names(settings: Mapping[str, Any], group: str) -> Iterator[str]:
    for name, value in settings.items():
        whole = group + name
        if not isinstance(value, list):
            yield whole
        if whole in GROUPS and isinstance(value, Mapping):
            yield from _names(value, f"{whole}.")
