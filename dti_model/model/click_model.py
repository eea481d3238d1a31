"""A click model as scoring needs it: of a run, over its prepared data, or of an export, with data or without."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dti_model.config import DTIConfig
from dti_model.data import DataError, PreparedData, plain_backend
from dti_model.devices import device_named
from dti_model.files import check_checksums
from dti_model.model.calibration import Calibration
from dti_model.model.model_card import Description
from dti_model.model.run import Run
from dti_model.model.safe_loading import fast_tokenizer_from
from dti_model.model.trained import load_whole
from dti_model.prompts import PromptBuilder, PromptFormat


@dataclass(frozen=True, eq=False)
class ClickModel:
    """A model that reads packed prompts, and what its prompts are made of.

    Attributes:
        model: the result of `apply_dti`, in evaluation mode.
        tokenizer: with the [SUM] token.
        dti: what [SUM] rows get.
        prompt: the tokens around item texts.
        item_text: how fields of an item become its text (see `Description`).
        context_rule: how fields of an interaction's context become its text; None: there are none.
        profile_rule: how fields of a user become the text of a profile; None: there are none.
        builder: items and users of prepared data; None: there are none.
        calibration: of the scores; None: there is none, or it is not wanted.
    """

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    dti: DTIConfig
    prompt: PromptFormat
    item_text: Mapping[str, Any] | None
    context_rule: Mapping[str, Any] | None
    profile_rule: Mapping[str, Any] | None
    builder: PromptBuilder | None
    calibration: Calibration | None = None

    @property
    def data(self) -> PreparedData | None:
        """The prepared data, where there is any."""
        return None if self.builder is None else self.builder.data

    @staticmethod
    def of_run(run: Run) -> ClickModel:
        """Of a run that is loaded already; its model is put into evaluation mode."""
        data = run.data
        rules = data.text_rule, data.context_rule, data.profile_rule
        return ClickModel(
            run.model.eval(),
            run.tokenizer,
            run.config.dti,
            run.builder.format,
            *rules,
            run.builder,
            run.calibration,
        )

    @staticmethod
    def of_export(
        folder: Path, data: Path | None, device: str | None, other_data: bool, calibration: bool = True
    ) -> ClickModel:
        """Read a folder that `dti export` made; arguments and errors as in `Scorer.from_export`."""
        device = device_named(device)
        description = Description.read(folder)
        # Exports of version 0.1.0 have neither checksums nor the data's fingerprint.
        is_new = description.data is not None
        check_checksums(folder, "Export the model again with `dti export`", required=is_new, is_model=True)
        tokenizer = fast_tokenizer_from(folder)
        model: Any = load_whole(folder, description.dti)
        model.to(device)
        builder = None
        rules = description.item_text, description.context_rule, description.profile_rule
        if data is not None:
            prepared = PreparedData.open(data)
            if description.data not in (None, prepared.fingerprint) and not other_data:
                raise DataError(
                    f"{data} is not the prepared data that {folder} was trained on: its items and users may have other ids. Give "
                    "that data, or other_data=True where this is meant"
                )
            builder = PromptBuilder(prepared, tokenizer, description.prompt)
            rules = prepared.text_rule, prepared.context_rule, prepared.profile_rule
        return ClickModel(
            model.eval(),
            tokenizer,
            description.dti,
            description.prompt,
            *rules,
            builder,
            description.calibration if calibration else None,
        )

    def fingerprints(self) -> dict[str, str | None]:
        """sha256 of everything that decides a score: weights as they lie in memory, tokenizer, prepared data.

        Cost: one pass over the weights, 1.5 GB/s.
        """
        weights = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            if isinstance(tensor, torch.Tensor):
                weights.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
                weights.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().data)
        tokens = hashlib.sha256(plain_backend(self.tokenizer).to_str().encode())
        data = None if self.data is None else self.data.fingerprint
        return {"weights": weights.hexdigest(), "tokenizer": tokens.hexdigest(), "prepared data": data}
