"""Type and bounds of every setting of a run, in one table, checked wherever a setting comes from.

A flag, a YAML file, a run folder's `config.yaml` and a call in Python all end in the same dataclasses, whose `__post_init__` calls
`check_settings`. A value out of bounds is one line: name of the setting, bounds, value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from dti_model.error_lines import did_you_mean
from dti_model.precision import PRECISIONS
from dti_model.shown import shown

# Of counts that nothing else bounds: they, and twice as many, still fit an int32, which layouts and kernels count in.
MOST = 10**9
# NumPy's seeds are 32 bits; PyTorch's have more.
LARGEST_SEED = 2**32 - 1
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
Metric = Literal["auc", "log_loss", "gauc"]
MORE_IS_BETTER: Mapping[Metric, bool] = {"auc": True, "log_loss": False, "gauc": True}
MODES = ("dti", "dti-minus", "dti-position", "dti-reset")
ITEM, LABEL = "{item}", "{label}"
GLUED = ITEM + LABEL  # the template of models from scratch, whose labels are words of their own anyway


@dataclass(frozen=True)
class Rule:
    """Values that a setting accepts.

    Attributes:
        must: in words, after "must be".
        accepts: whether a value is one of them.
        names: of the values that have names.
    """

    must: str
    accepts: Callable[[Any], bool]
    names: tuple[str, ...] = ()


def integer(least: int, most: int = MOST) -> Rule:
    """Integers, not booleans."""
    return Rule(
        f">= {least} and <= {most:,} (an integer)",
        lambda value: _is_integer(value) and least <= value <= most,
    )


def number(least: float, most: float, above: bool = False, below: bool = False) -> Rule:
    """Finite numbers; `above`: not `least` itself, `below`: not `most` itself."""

    def accepts(value: Any) -> bool:
        if not (_is_integer(value) or (isinstance(value, float) and math.isfinite(value))):
            return False
        return bool(
            (value > least if above else value >= least) and (value < most if below else value <= most)
        )

    if below:
        must = f"in [{least:g}, {most:g}), a number"
    else:
        must = f"{'>' if above else '>='} {least:g} and <= {most:,} (a number)"
    return Rule(must, accepts)


def choice(*values: str | int) -> Rule:
    """One of some values."""
    names = tuple(map(str, values))
    must = f"one of {', '.join(names)}" if len(names) > 2 else " or ".join(names)
    return Rule(must, lambda value: not isinstance(value, bool) and value in values, names)


def choices(values: tuple[str, ...], may_be_empty: bool) -> Rule:
    """A list of some values."""

    def accepts(value: Any) -> bool:
        is_list = isinstance(value, (tuple, list)) and (may_be_empty or len(value) > 0)
        return is_list and set(map(str, value)) <= set(values)

    return Rule(f"some of {', '.join(values)}, in a list", accepts, values)


def optional(rule: Rule) -> Rule:
    """Or nothing."""
    return Rule(f"{rule.must}, or left out", lambda value: value is None or rule.accepts(value))


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_text(value: Any) -> bool:
    if not isinstance(value, str) or len(value) > 100_000:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair: no file could hold it
        return False
    return "\0" not in value


def _is_template(value: Any) -> bool:
    if not _is_text(value) or value.count(ITEM) != 1 or value.count(LABEL) != 1:
        return False
    rest = value.replace(ITEM, "", 1).replace(LABEL, "", 1)
    return bool(value.index(ITEM) < value.index(LABEL)) and "{" not in rest and "}" not in rest


_template = Rule(
    "text that holds {item} and then {label}, once each, and no other braces, such as '{item}. Liked: {label}\\n'",
    _is_template,
)
_truth = Rule("true or false", lambda value: isinstance(value, bool))
_text = Rule("text", _is_text)
_folder = Rule("a folder's path", lambda value: isinstance(value, (str, Path)) and _is_text(str(value)))
_layers = Rule(
    "a list of layers, integers >= -10,000 and <= 10,000",
    lambda value: (
        isinstance(value, (tuple, list)) and all(_is_integer(x) and abs(x) <= 10_000 for x in value)
    ),
)
_share = number(0, 1, below=True)

# By dotted name. Upper bounds lie far above what is of use, and below what overflows or never ends.
RULES: Mapping[str, Rule] = {
    "data": _folder,
    "out": _folder,
    "init": optional(_folder),
    "init_targets": choice("new", "all"),
    "k": integer(0),
    "window": integer(0),
    "max_item_tokens": integer(1),
    "validation_k": integer(0),
    "max_eval_targets": integer(0),
    "seed": integer(0, LARGEST_SEED),
    "compare_steps": integer(0, 10**6),
    "select_by": choice(*MORE_IS_BETTER),
    "calibrate": _truth,
    "score_test": _truth,
    "logging_steps": integer(1),
    "report_to": choices(("tensorboard", "wandb"), may_be_empty=True),
    "progress": _truth,
    "dti.mode": choice(*MODES),
    "dti.alpha_min": number(0, 1),
    "dti.alpha_max": number(0, 1),
    "dti.steepness": number(0, 10**6, above=True),
    "dti.alpha_own": number(0, 1),
    "dti.reset_layers": _layers,
    "dti.slope_scale": number(0, 10**6),
    "dti.train_slopes": _truth,
    "model.layers": integer(1, 10_000),
    "model.width": integer(1, 2**20),
    "model.heads": integer(1, 2**16),
    "model.kv_heads": integer(1, 2**16),
    "model.mlp_width": integer(1, 2**24),
    "model.dropout": optional(_share),
    "model.pretrained": optional(_text),
    "model.finetune": choice("lora", "full"),
    "model.lora.rank": integer(1, 2**16),
    "model.lora.alpha": number(0, 10**6, above=True),
    "model.lora.dropout": _share,
    "model.lora.projections": choices(PROJECTIONS, may_be_empty=False),
    "model.dtype": choice("float32", "bfloat16"),
    "model.quantize": Rule("0, 4 or 8 bits", lambda value: _is_integer(value) and value in (0, 4, 8)),
    "model.liger": _truth,
    "model.instruction": _text,
    "model.template": optional(_template),
    "optim.epochs": integer(1, 10**6),
    "optim.max_steps": integer(0),
    "optim.validate_every": integer(0),
    "optim.learning_rate": number(0, 10**6, above=True),
    "optim.weight_decay": number(0, 10**6),
    "optim.warmup": Rule("in [0, 1): 0 <= warmup < 1, a number", _share.accepts),
    "optim.clip": number(0, 10**9, above=True),
    "optim.token_budget": integer(1),
    "optim.accumulation": integer(1, 10**6),
    "optim.patience": integer(0),
    "optim.precision": choice(*PRECISIONS),
    "optim.activation_checkpointing": _truth,
    "optim.fsdp": _truth,
    "optim.graphs": _truth,
    "optim.compile": _truth,
    "optim.save_steps": integer(0),
}
# Those that hold settings themselves.
GROUPS = ("dti", "model", "model.lora", "optim")


def check_settings(settings: Any, group: str = "") -> None:
    """Check every field of a dataclass against its rule.

    Args:
        settings: a dataclass of settings.
        group: what its names begin with, such as "optim.".

    Raises:
        ValueError: naming the setting, what it must be, and what it was.
    """
    for field in fields(settings):
        name, value = group + field.name, getattr(settings, field.name)
        if name in GROUPS:
            if not is_dataclass(value):
                raise ValueError(f"{name} must be a mapping of settings, got {as_yaml(value)}")
            continue
        if not RULES[name].accepts(value):
            raise ValueError(must_be(name, as_yaml(value)))


def must_be(name: str, found: str) -> str:
    """The sentence about a setting that is out of bounds."""
    rule = RULES[name]
    return f"{name} must be {rule.must}, got {found}{did_you_mean(found, rule.names)}"


def as_yaml(value: Any) -> str:
    """A value in an error: as YAML writes it, and short."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return shown(
        str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
    )
