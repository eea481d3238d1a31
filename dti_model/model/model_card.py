"""The description of a model folder: dti.json for programs, README.md for people.

Every model folder loads into plain transformers without an error. Transformers compute its probabilities if the settings allow it: they
have neither the position fix (ALiBi in the place of a position) nor the reset (other keys). Without both, the model is a plain causal LM
of this prompt:

    prefix, item text, label, item text, label, ..., item text of the target, [SUM]          at most `window` interactions before it
    p = softmax(logits of the last position over the tokens of the two labels)[positive], then calibrated (calibration.py)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from dti_model.config import DTIConfig, ModelConfig, locate
from dti_model.data import Template, TextEncoder
from dti_model.files import DamagedFileError, read_file, write_json
from dti_model.model.calibration import Calibration
from dti_model.prompts import PromptFormat

DESCRIPTION_FILE, CARD_FILE = "dti.json", "README.md"
# Rotary frequencies that follow the longest prompt of a pass, so that a packed pass differs from a prompt alone.
_VARYING_ROPES = ("dynamic", "longrope")
_PLAIN_PROMPT = {
    "layout": "prefix, the user's profile, then for each of the last `window` interactions, oldest first: `before`, item text cut to "
    "`max_item_tokens` tokens, context, `cue`, label token, `separator`; then of the target `before`, item text cut likewise, context, "
    "`cue`; then sum_token. No other special tokens, positions from 0.",
    "context and profile": "of every part that is not empty '; part' behind the item, and 'part;' behind the prefix, encoded like item texts",
    "item text": "by the tokenizer without its added tokens; then the tokens of `spelled_tokens` are replaced by theirs",
    "read": "softmax over the logits of the two label tokens at the last position (sum_token); the second is the probability of a click",
    "calibration": "p is then sigmoid(log(p / (1 - p)) / temperature + bias), where `calibration` is not null",
}


@dataclass(frozen=True)
class Description:
    """The content of dti.json.

    Attributes:
        dti: what [SUM] rows get.
        prompt: the tokens around item texts.
        item_text: how fields of an item become its text: `text`, the template, and `max_chars`, by default the data layer's; None
            where it is not known, and items are finished texts.
        context_rule, profile_rule: how fields of an interaction's context and of a user become texts (see `PreparedData`); None: there
            are none.
        data: fingerprint of the prepared data that the model was trained on; None where it is not known.
        differences: why plain transformers compute other probabilities; empty: they compute the same.
        token_window: sliding window in tokens that transformers would apply, and that must be switched off when a run's `model/`
            is loaded there; None: there is none, as in every export.
        calibration: of the scores; None: there is none.
        spelled: tokens that no item text gets, and what stands in their place (see `TextEncoder`).
    """

    dti: DTIConfig
    prompt: PromptFormat
    item_text: Mapping[str, Any] | None
    data: str | None
    differences: tuple[str, ...]
    token_window: int | None = None
    spelled: Mapping[int, list[int]] = field(default_factory=dict)
    context_rule: Mapping[str, Any] | None = None
    profile_rule: Mapping[str, Any] | None = None
    calibration: Calibration | None = None

    @staticmethod
    def of(
        dti: DTIConfig,
        prompt: PromptFormat,
        tokenizer: PreTrainedTokenizerBase,
        model_config: Any,
        item_text: Mapping[str, Any] | None,
        data: str | None,
        context_rule: Mapping[str, Any] | None,
        profile_rule: Mapping[str, Any] | None,
        calibration: Calibration | None = None,
    ) -> Description:
        """Of a model with this configuration of transformers."""
        differences = plain_differences(dti, prompt.window, model_config)
        spelled, window = TextEncoder(tokenizer).spelled, token_window(model_config)
        rules = context_rule, profile_rule
        return Description(dti, prompt, item_text, data, differences, window, spelled, *rules, calibration)

    @property
    def plain_transformers(self) -> bool:
        """Plain transformers compute this model's probabilities."""
        return not self.differences

    def write(self, folder: Path) -> None:
        """`dti.json` of a model folder."""
        value = {
            "plain_transformers": self.plain_transformers,
            "plain_transformers_differences": list(self.differences),
            "plain_transformers_prompt": _PLAIN_PROMPT if self.plain_transformers else None,
            "plain_transformers_without_token_window": self.token_window,
            "spelled_tokens": self.spelled,
            "dti": asdict(self.dti),
            "prompt": asdict(self.prompt),
            "item_text": self.item_text,
            "context": self.context_rule,
            "profile": self.profile_rule,
            "data": self.data,
            "calibration": None if self.calibration is None else asdict(self.calibration),
        }
        write_json(folder / DESCRIPTION_FILE, value)

    @staticmethod
    def read(folder: Path) -> Description:
        """Of a folder that `dti export` made, by this version or an older one.

        Raises:
            FileNotFoundError: the folder has no dti.json.
            DamagedFileError: its content is not what was written.
        """
        path = folder / DESCRIPTION_FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist: {folder} is not a folder made by `dti export`. A run folder is read with Scorer.from_run"
            )
        try:
            value = json.loads(read_file(path))
            dti, prompt = value["dti"], value["prompt"]
            tokens = ("prefix", "labels", "before", "cue", "separator")
            prompt |= {name: tuple(prompt[name]) for name in tokens if name in prompt}
            return Description(
                DTIConfig(**{**dti, "reset_layers": tuple(dti["reset_layers"])}),
                PromptFormat(**prompt),
                value.get("item_text"),
                value.get("data"),
                tuple(value.get("plain_transformers_differences", ())),
                context_rule=value.get("context"),
                profile_rule=value.get("profile"),
                calibration=_calibration_in(value),
            )
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise DamagedFileError(f"{path} is damaged ({error}). Export the model again") from None


def _calibration_in(value: Mapping[str, Any]) -> Calibration | None:
    kept = value.get("calibration")  # none in older folders
    return None if kept is None else Calibration.from_dict(kept)


def plain_differences(dti: DTIConfig, window: int, model_config: Any) -> tuple[str, ...]:
    """Why plain transformers compute other probabilities than this library, given the prompt of the module docstring; empty: they do not.

    Args:
        dti: what [SUM] rows get. By its settings, not its mode: a reset whose ratios are all 0, or that is in the first layer only
            (whose states are the initial ones), changes nothing.
        window: n, interactions.
        model_config: of the transformers model. Its sliding window in tokens is no difference: an export has none.
    """
    differences = []
    if dti.position_fix:
        differences.append("[SUM] has no position but ALiBi (the position fix)")
    far = dti.alpha_max > 0 and window > 0
    layers = [
        i
        for i in range(model_config.num_hidden_layers)
        if dti.resets_layer(i, model_config.num_hidden_layers)
    ]
    if (far or dti.alpha_own > 0) and any(layers):
        differences.append("[SUM] reads states blended toward the initial ones (the hidden-state reset)")
    rope = (getattr(model_config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope in _VARYING_ROPES:
        differences.append(f"its rotary frequencies ({rope}) follow the longest prompt of a pass")
    return tuple(differences)


def token_window(model_config: Any) -> int | None:
    """The sliding window in tokens that transformers would apply to some layer; None where there is none."""
    window: int | None = getattr(model_config, "sliding_window", None)
    layers = getattr(model_config, "layer_types", None)
    return window if layers is None or "sliding_attention" in layers else None


def without_token_window(model_folder: Path) -> None:
    """Take a sliding window in tokens out of a folder's config.json: the library ignores it, its window is in interactions."""
    path = model_folder / "config.json"
    config = json.loads(read_file(path))
    changed = {**config}
    for name, off in (("sliding_window", None), ("use_sliding_window", False)):
        if name in config:
            changed[name] = off
    if config.get("layer_types"):
        changed["layer_types"] = ["full_attention"] * len(config["layer_types"])
    if changed != config:
        write_json(path, changed)


def write_card(
    folder: Path, description: Description, settings: ModelConfig, of_run: Any | None = None
) -> None:
    """`README.md` of a model folder, in the form of Hugging Face's model cards.

    Args:
        folder: of the model.
        description: of the model.
        settings: of the model: what it was made from.
        of_run: transformers' configuration of the model, where the folder is a run's `model/`; None: an export.
    """
    text = _head(settings, of_run is not None) + _verdict(description)
    text += _library(description) if of_run is None else _RUN
    if description.plain_transformers:
        calibration = description.calibration or Calibration()
        text += _PLAIN.format(
            load=_load_lines(settings, of_run),
            spelled=dict(description.spelled),
            temperature=calibration.temperature,
            bias=calibration.bias,
            **asdict(description.prompt),
        )
    (folder / CARD_FILE).write_text(text, encoding="utf-8")


def _head(settings: ModelConfig, of_run: bool) -> str:
    base = None if settings.pretrained is None else locate(settings.pretrained)
    library = "peft" if of_run and settings.uses_lora else "transformers"
    # Metadata knows no folders.
    base_model = f"base_model: {base.name}\n" if base is not None and base.on_hub else ""
    kind = "trained from scratch" if base is None else f"fine-tuned from `{base.name}`"
    return (
        f"---\nlibrary_name: {library}\ntags:\n- click-prediction\n- dti\n{base_model}---\n\n"
        f"# Click model\n\nA click model on streaming prompts (DTI), {kind}.\n"
    )


def _verdict(description: Description) -> str:
    if description.plain_transformers:
        return "\n**Plain transformers compute its probabilities**, within float rounding, given the prompt below and nothing else.\n"
    return (
        "\n**Plain transformers do not compute this model.** They load it without an error and give wrong probabilities, because "
        f"{' and '.join(description.differences)}. Score it with `dti_model`.\n"
    )


_LIBRARY = """
## With dti_model

```python
from dti_model.scorer import Scorer

scorer = Scorer.from_export(".")  # this folder; no prepared data is needed
HISTORY
candidates = [CANDIDATES]
probabilities = scorer.score(history, candidatesMORE)
```

`dti.json` has the settings: what [SUM] gets, the tokens around item texts, and the template of item texts.
"""
# Of facts that are built in; columns of a log have any text.
_FACTS = {
    "hour": "20",
    "weekday": "Friday",
    "gap": "hours later",
    "item_rate": "72% of 300",
    "user_rate": "64% of 150",
    "item_ctr": "72",
    "user_ctr": "64",
    "affinity": "+12",
}


def _library(description: Description) -> str:
    """Python that scores with this library, with a context and a profile where the model has been trained with them."""
    entry, lines, more = '{"text": "Toy Story (1995); Animation"}, 1', [], ""
    meaning = "(item, 1: clicked or 0: not)"
    candidates = ['{"text": "Heat (1995); Crime"}', '{"text": "Babe (1995); Comedy"}']
    if description.context_rule is not None:
        rule = description.context_rule
        names = Template(rule["text"], missing_title=None).columns
        context = {name: _FACTS[name] if name in rule["built_in"] else "..." for name in names}
        lines.append(f"context = {context}  # of an interaction; every one has its own")
        entry, meaning = f"{entry}, context", "(item, 1: clicked or 0: not, context)"
        candidates = [f'{{"item": {item}, "context": context}}' for item in candidates]
    if description.profile_rule is not None:
        fields = Template(description.profile_rule["text"], missing_title=None).columns
        lines.append(f"profile = {dict.fromkeys(fields, '...')}  # of the user")
        more += ", profile=profile"
    lines.append(f"history = [({entry})]  # {meaning}, oldest first")
    text = _LIBRARY.replace("HISTORY", "\n".join(lines)).replace("MORE", more)
    return text.replace("CANDIDATES", ", ".join(candidates))


_RUN = """
This folder is the `model/` of a run. `Scorer.from_run(RUN)` and `dti score --run RUN` score it, where RUN is the folder above this
one. `dti export --run RUN --out FOLDER` makes a folder of its own of it.
"""


def _load_lines(settings: ModelConfig, of_run: Any | None) -> str:
    """Python that loads `model` from FOLDER with transformers, and peft for an adapter."""
    lines = ["tokenizer = AutoTokenizer.from_pretrained(FOLDER)"]
    source, more = "FOLDER", ""
    if of_run is not None and settings.uses_lora:
        base = locate(str(settings.pretrained))
        source = repr(base.source) + (f", gguf_file={base.gguf_file!r}" if base.gguf_file else "")
        more = f", dtype=torch.{settings.dtype}"
    if of_run is not None and token_window(of_run) is not None:
        lines.append(f"config = AutoConfig.from_pretrained({source})")
        lines.append("config.sliding_window = None  # in tokens: the model was trained without it")
        if getattr(of_run, "layer_types", None):
            lines.append('config.layer_types = ["full_attention"] * config.num_hidden_layers')
        more += ", config=config"
    lines.append(f"model = AutoModelForCausalLM.from_pretrained({source}{more}).eval()")
    if source != "FOLDER":
        lines.append(
            "if len(tokenizer) > model.get_input_embeddings().num_embeddings:  # a row for [SUM], which the adapter has"
        )
        lines.append("    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)")
        lines.append("model = PeftModel.from_pretrained(model, FOLDER).eval()")
        lines.insert(0, "from peft import PeftModel\n")
    return "\n".join(lines)


_PLAIN = """
## With transformers alone

```python
import json

import torch
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

FOLDER = "."  # this one
{load}
PREFIX, SUM, LABELS = {prefix}, {sum_token}, {labels}  # token ids; labels: negative, positive
BEFORE, CUE, SEPARATOR = {before}, {cue}, {separator}
TEMPERATURE, BIAS = {temperature!r}, {bias!r}  # fitted on validation; 1 and 0: as the model was trained

# No item text writes a control token or a label: added tokens are not looked for, and pieces that make one are spelled in letters.
parts = json.loads(tokenizer.backend_tokenizer.to_str())
plain = Tokenizer.from_str(json.dumps({{**parts, "added_tokens": [], "truncation": None, "padding": None}}))
SPELLED = {spelled}


def text_ids(text):
    ids = plain.encode(text, add_special_tokens=False).ids
    return [part for token in ids for part in SPELLED.get(token, [token])]


def item_ids(text, *context):  # context: the parts of the interaction's context, where the model has been trained with one
    ids = [*BEFORE, *text_ids(text)[:{max_item_tokens}]]
    return [*ids, *(token for part in context if part for token in text_ids("; " + part)), *CUE]


@torch.no_grad()
def click_probability(history, target, profile=()):  # history: (item text, label 0 or 1), oldest first; profile: parts of the user's
    ids = [*PREFIX, *(token for part in profile if part for token in text_ids(part + ";"))]
    for item, label in history[max(0, len(history) - {window}) :]:  # an item: its text, or its text and the parts of its context
        ids += [*item_ids(*([item] if isinstance(item, str) else item)), LABELS[label], *SEPARATOR]
    ids += [*item_ids(*([target] if isinstance(target, str) else target)), SUM]
    negative, positive = model(torch.tensor([ids])).logits[0, -1, list(LABELS)].double()
    return float(((positive - negative) / TEMPERATURE + BIAS).sigmoid())
```
"""
