"""A trained run as a plain model folder: what serving needs and nothing of this project's own.

model.safetensors, config.json, tokenizer    for AutoModelForCausalLM and AutoTokenizer; no sliding window in tokens, as in training
dti.json                                      what [SUM] rows get, the tokens around item texts, their template, the calibration, and whether
                                              plain transformers compute the same probabilities (`plain_transformers`), of which prompt
README.md                                     the same for people: a model card. May be edited: it is not in checksums.json
checksums.json                                of every other file; `Scorer.from_export` checks them
"""

from __future__ import annotations

import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from dti_model.config import TrainConfig, check_new_folder
from dti_model.data import DataError, PreparedData
from dti_model.files import CHECKSUMS_FILE, locked_beside, whole_folder, write_checksums
from dti_model.model.fingerprints import MODEL_FOLDER, PROVENANCE_FILE
from dti_model.model.lora import merge
from dti_model.model.model_card import (
    CARD_FILE,
    DESCRIPTION_FILE,
    Description,
    without_token_window,
    write_card,
)
from dti_model.model.pretrained import load_causal_lm
from dti_model.model.safe_loading import adapter_from, config_from, fast_tokenizer_from
from dti_model.model.trained import loading, open_trained, with_base
from dti_model.prompts import PromptFormat

_OF_THE_RUN = (DESCRIPTION_FILE, CARD_FILE, CHECKSUMS_FILE, PROVENANCE_FILE)  # the export has its own


class LibraryOnlyError(ValueError):
    """Plain transformers would compute other probabilities than the run, and the caller has not said that this is known."""


def export_run(
    run: Path, out: Path, library_only: bool = False, base_model: str | None = None
) -> Description:
    """Merge a run's adapter into its base model, or copy its model, into a folder that appears only when complete.

    Weights have the run's `model.dtype`. The base of a quantised run is loaded unquantised: its scores then differ from the run's
    by what quantisation cost.

    Args:
        run: folder made by `dti train`.
        out: folder to make; must not exist, or be empty.
        base_model: where the pretrained model of a LoRA run is now; default: where it was, or moved together with the run.
        library_only: the export may be one that only `Scorer.from_export` computes right.

    Returns:
        What dti.json holds: `plain_transformers` says whether plain transformers compute it right.

    Raises:
        FileNotFoundError: `run` is no run folder, or its training has not ended.
        FileExistsError: `out` is not empty, also where something comes into it meanwhile, it is the current folder, or a name that
            means something in the folder of a run, a search or prepared data.
        LibraryOnlyError: plain transformers would compute other probabilities, and `library_only` is False.
        LockedError: another process makes `out`.
        PretrainedModelError: the base model cannot be loaded.
        OtherOriginError: it is another one, or config.yaml is another run's.
        DamagedFileError: a file of the run is not what was written.
        WriteError: the disk is full; nothing is left of the export.
    """
    check_new_folder(out)
    with locked_beside(out, "dti export"):
        return _exported(run, out, library_only, base_model)


def _exported(run: Path, out: Path, library_only: bool, base_model: str | None) -> Description:
    config, made_of = open_trained(run)
    config = with_base(config, run, base_model, made_of)
    source = run / MODEL_FOLDER
    with loading(run):
        tokenizer = fast_tokenizer_from(source)
        model_config = config_from(source) if not config.model.uses_lora else None
    base = None
    if config.model.uses_lora:
        base = load_causal_lm(replace(config.model, quantize=0, liger=False), tokenizer)
    description = _describe(config, source, tokenizer, base.config if base is not None else model_config)
    if not description.plain_transformers and not library_only:
        raise LibraryOnlyError(
            f"plain transformers would load this export and silently give wrong probabilities, because "
            f"{' and '.join(description.differences)}. Give --library-only for one that only Scorer.from_export reads right, or "
            "train with --dti.mode dti-minus"
        )
    with whole_folder(out, lambda: check_new_folder(out), replace=False) as made:
        if base is None:
            for path in source.iterdir():
                if path.name not in _OF_THE_RUN and path.is_file():
                    shutil.copyfile(
                        path, made / path.name
                    )  # without its mode: the umask may be another by now
        else:
            merge(adapter_from(base, source)).save_pretrained(made)
            tokenizer.save_pretrained(made)
        without_token_window(made)
        description.write(made)
        write_checksums(made)
        write_card(made, description, config.model)
    return description


def _describe(
    config: TrainConfig, source: Path, tokenizer: PreTrainedTokenizerBase, model_config: Any
) -> Description:
    """The run's description. The template of item texts is the run's; version 0.1.0 kept it with the data only."""
    prompt = PromptFormat.of(
        tokenizer,
        config.window,
        config.max_item_tokens,
        config.model.instruction,
        config.model.prompt_template,
    )
    item_text, fingerprint, calibration = None, None, None
    rules: tuple[Any, Any] = (None, None)
    if (source / DESCRIPTION_FILE).is_file():
        told = Description.read(source)
        item_text, fingerprint, calibration = told.item_text, told.data, told.calibration
        rules = told.context_rule, told.profile_rule
    else:
        with suppress(DataError):  # without data, items are given as finished texts
            data = PreparedData.open(config.data)
            item_text, fingerprint = data.text_rule, data.fingerprint
            rules = data.context_rule, data.profile_rule
    description = Description.of(
        config.dti, prompt, tokenizer, model_config, item_text, fingerprint, *rules, calibration
    )
    return replace(description, token_window=None)  # the export has none
