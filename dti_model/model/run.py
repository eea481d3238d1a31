"""A run: how it starts, and how its folder is written and read back.

config.yaml          every setting, sealed by its last line (config/file.py)
model/               weights (safetensors) and configuration of the best epoch, and the tokenizer; of a LoRA run the adapter,
                     which names its base model; dti.json (what prompts are made of, the calibration), provenance.json (fingerprints)
                     and checksums.json
checkpoints/         Trainer's, to resume from
metrics.json         {"test": {...}, "val": {...}, "baselines": {"test": {...}, "val": {...}}, "calibration": {...}, "training": {...}}
predictions-*.parquet  one row per target: user, item, timestamp, label, probability, and raw_probability before calibration
report.png           loss, validation AUC and calibration
checksums.json       size and sha256 of config.yaml and of the three above
.lock                while it is trained
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from peft import PeftModel
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dti_model.config import ModelConfig, TrainConfig, locate
from dti_model.data import PreparedData
from dti_model.devices import device_named
from dti_model.files import whole_folder, write_checksums
from dti_model.model.attention import apply_dti
from dti_model.model.calibration import Calibration
from dti_model.model.fingerprints import MODEL_FOLDER, OtherOriginError, Provenance
from dti_model.model.head import keep_head_in_float32
from dti_model.model.lora import add_lora, save_adapter
from dti_model.model.model_card import CARD_FILE, DESCRIPTION_FILE, Description, write_card
from dti_model.model.pretrained import load_causal_lm, load_tokenizer
from dti_model.model.run_folder import check_model_is_ours
from dti_model.model.safe_loading import adapter_from, fast_tokenizer_from
from dti_model.model.trained import data_of, load_whole, loading, open_trained, with_base
from dti_model.model.warm_start import check_fits, init_fingerprint, load_init, train_targets
from dti_model.precision import Resolved, resolve
from dti_model.prompts import PromptBuilder, PromptFormat


@dataclass(eq=False)
class Run:
    """A model with what it needs to read prompts of a data set.

    Attributes:
        config: the settings.
        model: the result of `apply_dti`, perhaps inside peft's wrapper.
        tokenizer: with the [SUM] token.
        data: the prepared data.
        builder: of prompts.
        precision: that the model computes in.
        trained_in: the precision that it was trained in; None: not known.
        calibration: of its scores; None: none was fitted, or it is not wanted.
        init: fingerprint of the weights of the run that it goes on from; None: it does from none.
    """

    config: TrainConfig
    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    data: PreparedData
    builder: PromptBuilder
    precision: Resolved = "fp32"
    trained_in: Resolved | None = None
    init: str | None = None
    calibration: Calibration | None = None

    def calibrated(self, probabilities: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Scores of the model after the calibration, where there is one."""
        return probabilities if self.calibration is None else self.calibration(probabilities)

    @cached_property
    def provenance(self) -> Provenance:
        """Fingerprints of data, tokenizer and pretrained model."""
        return Provenance.of(self.data, self.tokenizer, self.config, self.trained_in, self.init)

    @cached_property
    def train_targets(self) -> npt.NDArray[np.int64]:
        """Rows of the targets that it is trained on, in their global order."""
        return train_targets(self.config, self.data)

    @staticmethod
    def start(config: TrainConfig, precision: Resolved | None = None) -> Run:
        """A new model over the run's data; weights follow the seed, or are those of the run that it goes on from.

        `precision`: that it will be trained in; None: what the settings mean on this machine.
        """
        data = PreparedData.open(config.data)
        if config.init is not None:
            check_fits(config)
        tokenizer = tokenizer_of(config.model.pretrained, data, config.init)
        if config.model.pretrained is None:
            torch.manual_seed(config.seed)
            sizes = llama_config(config.model, tokenizer)
            _check_memory(sizes)
            plain: PreTrainedModel = LlamaForCausalLM(sizes)
        else:
            plain = load_causal_lm(config.model, tokenizer)
        model = apply_dti(plain, config.dti, config.model.dropout_rate)
        if model.config.tie_word_embeddings:
            # The head is the embedding; without this, Trainer warns that a checkpoint lacks it.
            model._keys_to_ignore_on_save = ["lm_head.weight"]
        run = Run._over(config, model, tokenizer, data)
        run.precision = precision or resolve(config.optim.precision, device_named(None))
        run.trained_in = run.precision
        if run.precision == "bf16" and device_named(None) == "cpu":
            keep_head_in_float32(model)
        if config.model.uses_lora:
            torch.manual_seed(config.seed)
            run.model = add_lora(model, config.model.lora, run.builder.format.sum_token)
        if config.init is not None:
            load_init(run.model, config.init)
            run.init = init_fingerprint(config)
        return run

    @staticmethod
    def load(
        folder: Path,
        data_folder: Path | None = None,
        device: str | None = None,
        other_data: bool = False,
        base: str | None = None,
        calibration: bool = True,
    ) -> Run:
        """A trained run, over the data it was trained on.

        Args:
            folder: the run folder.
            data_folder: where the data is now; None: where it was, or at the same place relative to the run folder.
            device: torch device; None: cuda where there is one.
            other_data: accept data that the run was not trained on: its test targets may have been trained on.
            base: where the pretrained model of a LoRA run is now; None: as with the data.
            calibration: with the one that was fitted to the run, if any.

        Raises:
            FileNotFoundError: `folder` is no run folder, its training has not ended, or its data is not where it was.
            OtherOriginError: the data, the pretrained model or the settings are others.
            DamagedFileError: a file of the model is not what was written.
            PretrainedModelError: the pretrained model cannot be loaded.
            ValueError: there is no such device.
        """
        device = device_named(device)
        config, made_of = open_trained(folder)
        data = PreparedData.open(data_folder or data_of(config, folder))
        if made_of is not None and data.fingerprint != made_of.data and not other_data:
            raise OtherOriginError(
                f"{data.path} is not the prepared data that {folder} was trained on: targets to score may be among those trained "
                "on. Give the data of the run with --data, or say --other-data if it is meant"
            )
        config = with_base(replace(config, data=data.path), folder, base, made_of)
        path = folder / MODEL_FOLDER
        with loading(folder):
            tokenizer = fast_tokenizer_from(path)
            if config.model.uses_lora:
                plain = load_causal_lm(config.model, tokenizer, device)
                model: Any = adapter_from(apply_dti(plain, config.dti), path)
            else:
                model = load_whole(path, config.dti)
            if not config.model.quantize:
                model.to(device)
        run = Run._over(config, model.eval(), tokenizer, data)
        if calibration and (path / DESCRIPTION_FILE).is_file():  # version 0.1.0 wrote none
            run.calibration = Description.read(path).calibration
        run.trained_in = None if made_of is None else made_of.precision
        run.init = None if made_of is None else made_of.init
        if run.trained_in is None and config.optim.precision != "auto":  # written before precisions were kept
            run.trained_in = config.optim.precision
        return run

    @staticmethod
    def _over(
        config: TrainConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: PreparedData
    ) -> Run:
        prompt_format = PromptFormat.of(
            tokenizer,
            config.window,
            config.max_item_tokens,
            config.model.instruction,
            config.model.prompt_template,
        )
        return Run(config, model, tokenizer, data, PromptBuilder(data, tokenizer, prompt_format))

    def save_model(self, folder: Path, weights: dict[str, Any] | None = None) -> None:
        """Make a model folder: weights or adapter, and the tokenizer, in safetensors and JSON, with provenance and checksums.

        Args:
            folder: appears when complete, in the place of an older one.
            weights: gathered ones of a sharded model.

        Raises:
            WriteError: the disk is full; an older folder is untouched.
            RunExistsError: something else is there; it is untouched.
        """
        check_model_is_ours(folder)  # before its link is followed
        with whole_folder(folder, lambda: check_model_is_ours(folder)) as temporary:
            if isinstance(self.model, PeftModel):
                assert self.config.model.pretrained is not None
                save_adapter(self.model, temporary, locate(self.config.model.pretrained).name, weights)
            else:
                self.model.save_pretrained(temporary, state_dict=weights)
            self.tokenizer.save_pretrained(temporary)
            self.provenance.save(temporary)
            description = Description.of(
                self.config.dti,
                self.builder.format,
                self.tokenizer,
                self.model.config,
                self.data.text_rule,
                self.data.fingerprint,
                self.data.context_rule,
                self.data.profile_rule,
                self.calibration,
            )
            description.write(temporary)
            # The card is for people, who may edit it: it comes after the checksums, and in the place of peft's.
            (temporary / CARD_FILE).unlink(missing_ok=True)
            write_checksums(temporary)
            write_card(temporary, description, self.config.model, of_run=self.model.config)


def tokenizer_of(
    pretrained: str | None, data: PreparedData, init: Path | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer that a run starts with: that of the run that it goes on from, of its pretrained model, or of its data."""
    if init is not None:
        with loading(init):
            return fast_tokenizer_from(init / MODEL_FOLDER)
    if pretrained is not None:
        return load_tokenizer(pretrained)
    tokenizer: PreTrainedTokenizerBase = fast_tokenizer_from(data.tokenizer_dir)
    data.check_tokenizer()  # by its path: the folder may have been made again since it was opened
    return tokenizer


def _check_memory(sizes: LlamaConfig) -> None:
    """Refuse a model whose weights alone this machine cannot hold: it would be ended by the system somewhere on the way."""
    width, heads = sizes.hidden_size, sizes.num_attention_heads + (sizes.num_key_value_heads or 0)
    layer = (
        2 * width * (width // sizes.num_attention_heads) * heads
        + 3 * width * sizes.intermediate_size
        + 2 * width
    )
    number = sizes.vocab_size * width + sizes.num_hidden_layers * layer + width
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if 4 * number > memory:
        raise ValueError(
            f"a model of these sizes has {number:,} parameters, {4 * number / 2**30:,.0f} GiB of weights, and this machine has "
            f"{memory / 2**30:,.0f} GiB of memory: choose a smaller model.width, model.mlp_width or model.layers"
        )


def llama_config(model: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> LlamaConfig:
    """A small Llama over the tokenizer's vocabulary."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=model.width,
        intermediate_size=model.mlp_width,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        max_position_embeddings=2**20,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=None,
        pad_token_id=None,
    )
