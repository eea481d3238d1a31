"""A run folder: what a training run leaves behind, and how it is read back.

config.yaml          every setting, sealed by its last line (config_file.py)
model/               weights (safetensors) and configuration of the best epoch, and the tokenizer; of a LoRA run the adapter,
                     which names its base model; provenance.json says what all was made of, checksums.json what all must hold
checkpoints/         Trainer's, to resume from
metrics.json         {"test": {...}, "val": {...}, "baselines": {"test": {...}, "val": {...}}, "training": {...}}
predictions-*.parquet  one row per target: user, item, timestamp, label, probability
report.png           loss, validation AUC and calibration
checksums.json       size and sha256 of config.yaml and of the three above
.lock                while it is trained

config.yaml holds absolute paths, so a run works in every working directory. Where nothing is at such a path any more, the same place
relative to the run folder is looked at: folders of runs and data that were moved together still find each other.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dti_model.config import (
    CONFIG_FILE,
    HUB,
    ModelConfig,
    PretrainedModelError,
    TrainConfig,
    is_sealed,
    locate,
)
from dti_model.data import SPLIT_CODES, PreparedData, TextEncoder
from dti_model.devices import device_named
from dti_model.evaluation.metrics import click_metrics
from dti_model.evaluation.scoring import score_targets
from dti_model.files import (
    DamagedFileError,
    check_checksums,
    whole_file,
    whole_folder,
    write_checksums,
    write_json,
)
from dti_model.model.attention import apply_dti
from dti_model.model.fingerprints import (
    PROVENANCE_FILE,
    OtherOriginError,
    Provenance,
    base_model_fingerprint,
)
from dti_model.model.lora import add_lora, save_adapter
from dti_model.model.model_card import CARD_FILE, Description, plain_differences, token_window, write_card
from dti_model.model.pretrained import load_causal_lm, load_tokenizer
from dti_model.model.run_folder import CHECKPOINTS_FOLDER, METRICS_FILE, MODEL_FOLDER, check_model_is_ours
from dti_model.model.safe_loading import adapter_from, fast_tokenizer_from, model_from
from dti_model.prompts import PromptBuilder, PromptFormat

__all__ = [
    "CHECKPOINTS_FOLDER",
    "METRICS_FILE",
    "MODEL_FOLDER",
    "Run",
    "eval_targets",
    "llama_config",
    "write_json",
]


@dataclass(eq=False)
class Run:
    """A model with what it needs to read prompts of a data set."""

    config: TrainConfig
    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    data: PreparedData
    builder: PromptBuilder

    @cached_property
    def provenance(self) -> Provenance:
        """Fingerprints of data, tokenizer and pretrained model."""
        return Provenance.of(self.data, self.tokenizer, self.config)

    @staticmethod
    def start(config: TrainConfig) -> Run:
        """A new model over the run's data; weights follow the seed."""
        data = PreparedData.open(config.data)
        tokenizer = tokenizer_of(config.model.pretrained, data)
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
        if config.model.uses_lora:
            torch.manual_seed(config.seed)
            run.model = add_lora(model, config.model.lora, run.builder.format.sum_token)
        return run

    @staticmethod
    def load(
        folder: Path,
        data_folder: Path | None = None,
        device: str | None = None,
        other_data: bool = False,
        base: str | None = None,
    ) -> Run:
        """A trained run, over the data it was trained on.

        Args:
            folder: the run folder.
            data_folder: where the data is now; None: where it was, or at the same place relative to the run folder.
            device: torch device; None: cuda where there is one.
            other_data: accept data that the run was not trained on: its test targets may have been trained on.
            base: where the pretrained model of a LoRA run is now; None: as with the data.

        Raises:
            FileNotFoundError: `folder` is no run folder, its training has not ended, or its data is not where it was.
            OtherOriginError: the data, the pretrained model or the settings are others.
            DamagedFileError: a file of the model is not what was written.
            PretrainedModelError: the pretrained model cannot be loaded.
            ValueError: there is no such device.
        """
        device = device_named(device)
        config = TrainConfig.load(folder)
        path = folder / MODEL_FOLDER
        if not any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
            raise FileNotFoundError(
                f"{path} holds no model: the run has not ended. Give `dti train` the same settings again to go on"
            )
        made_of = check_model(folder, config)
        data = PreparedData.open(data_folder or _data_of(config, folder))
        if made_of is not None and data.fingerprint != made_of.data and not other_data:
            raise OtherOriginError(
                f"{data.path} is not the prepared data that {folder} was trained on: targets to score may be among those trained "
                "on. Give the data of the run with --data, or say --other-data if it is meant"
            )
        config = replace(config, data=data.path, model=model_settings_of(config, folder, base))
        with loading(path, f"Put it back, or delete {folder} and train again"):
            tokenizer = fast_tokenizer_from(path)
            model = _load_model(config, path, tokenizer, device)
        return Run._over(config, model.eval(), tokenizer, data)

    @staticmethod
    def _over(
        config: TrainConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: PreparedData
    ) -> Run:
        prompt_format = PromptFormat.of(
            tokenizer, config.window, config.max_item_tokens, config.model.instruction
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
            description = self._describe(temporary)
            # The card is for people, who may edit it: it comes after the checksums, and in the place of peft's.
            (temporary / CARD_FILE).unlink(missing_ok=True)
            write_checksums(temporary)
            write_card(temporary, description, self.config.model, of_run=self.model.config)

    def _describe(self, folder: Path) -> Description:
        """dti.json: plain transformers load the folder, and may give other probabilities."""
        prompt, config = self.builder.format, self.model.config
        differences = plain_differences(self.config.dti, prompt.window, config)
        item_text, fingerprint = self.data.text_rule, self.data.fingerprint
        spelled = TextEncoder(self.tokenizer).spelled
        description = Description(
            self.config.dti, prompt, item_text, fingerprint, differences, token_window(config), spelled
        )
        description.write(folder)
        return description

    def targets(self, split: str) -> npt.NDArray[np.int64]:
        """The rows of a split that this run is measured on: all targets, or `max_eval_targets` of them."""
        return eval_targets(self.data, split, self.config)

    def score(self, split: str, k: int | None = 1, progress: bool = False) -> npt.NDArray[np.float64]:
        """Click probabilities, in the order of `targets(split)`."""
        return score_targets(
            self.model,
            self.config.dti,
            self.builder,
            self.targets(split),
            token_budget=self.config.optim.token_budget,
            k=k,
            progress=f"scoring {split}" if progress else None,
        )

    def metrics(self, split: str, probabilities: npt.NDArray[np.float64]) -> dict[str, float]:
        """Click metrics of a split's scores."""
        rows = self.targets(split)
        return click_metrics(self.data.label[rows], probabilities, self.data.users_of(rows))

    def write_predictions(self, path: Path, split: str, probabilities: npt.NDArray[np.float64]) -> None:
        """One Parquet row per target, in a file that appears when complete."""
        rows = self.targets(split)
        users = np.asarray(self.data.user_ids, object)[self.data.users_of(rows)]
        items = np.asarray(self.data.item_ids, object)[self.data.item[rows]]
        table = pa.table(
            {
                "user": pa.array(users, pa.large_string()),
                "item": pa.array(items, pa.large_string()),
                "timestamp": self.data.timestamp[rows],
                "label": self.data.label[rows],
                "probability": probabilities,
            }
        )
        with whole_file(path) as temporary:
            pq.write_table(table, temporary, compression="zstd")


def tokenizer_of(pretrained: str | None, data: PreparedData) -> PreTrainedTokenizerBase:
    """The tokenizer that a run starts with: that of its pretrained model, or, from scratch, of its data."""
    if pretrained is not None:
        return load_tokenizer(pretrained)
    tokenizer: PreTrainedTokenizerBase = fast_tokenizer_from(data.tokenizer_dir)
    data.check_tokenizer()  # by its path: the folder may have been made again since it was opened
    return tokenizer


def check_model(folder: Path, config: TrainConfig) -> Provenance | None:
    """Check that `model/` of a run folder is what was written, and was trained with the settings of the run's config.yaml.

    Returns:
        What it was made of; None: version 0.1.0 wrote it.

    Raises:
        DamagedFileError: a file is not what was written, or missing.
        OtherOriginError: it was trained with other settings.
    """
    path, way_out = folder / MODEL_FOLDER, f"Put it back, or delete {folder} and train again"
    is_new = (path / PROVENANCE_FILE).is_file() or is_sealed(
        folder / CONFIG_FILE
    )  # version 0.1.0 had neither
    check_checksums(path, way_out, required=is_new, is_model=True)
    made_of = Provenance.load(path, way_out)
    if is_new and made_of is None:
        raise DamagedFileError(f"{path / PROVENANCE_FILE} is missing. {way_out}")
    if made_of is not None and not made_of.has_settings_of(config):
        raise OtherOriginError(
            f"{folder / CONFIG_FILE} does not hold the settings that {path} was trained with: one of them is another run's. "
            f"{way_out}"
        )
    return made_of


def eval_targets(data: PreparedData, split: str, config: TrainConfig) -> npt.NDArray[np.int64]:
    """Targets of a split in the order of `data.targets`; with `max_eval_targets` a random subset that follows the seed."""
    rows, limit = data.targets(split), config.max_eval_targets
    if not limit or len(rows) <= limit:
        return rows
    rng = np.random.default_rng([config.seed, SPLIT_CODES[split]])
    return rows[np.sort(rng.choice(len(rows), limit, replace=False))]


def _data_of(config: TrainConfig, folder: Path) -> Path:
    """Where the data of a run is: where it was, or moved together with the run folder."""
    near = _moved(config.data, config, folder)
    for path in (config.data, near):
        if path.is_dir():
            return path
    raise FileNotFoundError(
        f"the data that {folder} was trained on is neither at {config.data} nor at {near}: say with --data where it is"
    )


def _moved(path: Path, config: TrainConfig, folder: Path) -> Path:
    """A path of config.yaml where it lies if everything has been moved with the run folder."""
    return Path(os.path.normpath(folder.absolute() / os.path.relpath(path, config.out)))


def model_settings_of(config: TrainConfig, folder: Path, base: str | None = None) -> ModelConfig:
    """The model's settings of a run, with the pretrained model where it is now.

    Args:
        config: of the run folder.
        folder: the run folder.
        base: where the pretrained model is; None: where it was, or moved together with the run folder.

    Raises:
        PretrainedModelError: nothing is there.
        OtherOriginError: it is another model.
    """
    model = config.model
    if base is not None and not model.uses_lora:
        raise ValueError(f"{folder} holds a whole model and needs no base model: leave --base out")
    if not model.uses_lora:
        return model
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
    made_of = Provenance.load(folder / MODEL_FOLDER, f"Put it back, or delete {folder} and train again")
    if made_of is not None and made_of.base_model != found:
        raise OtherOriginError(
            f"{reference} is not the pretrained model that {folder} was trained from: its adapter fits that one only. Say with "
            "--base where it is"
        )
    return replace(model, pretrained=reference)


@contextmanager
def loading(path: Path, way_out: str) -> Iterator[None]:
    """A model folder without checksums (of version 0.1.0) may be damaged: what libraries meet in one is anything.

    Raises:
        DamagedFileError: naming the folder.
    """
    try:
        yield
    except (PretrainedModelError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DamagedFileError(f"{path} cannot be read ({reason:.300}). {way_out}") from error


def _load_model(config: TrainConfig, path: Path, tokenizer: PreTrainedTokenizerBase, device: str) -> Any:
    if config.model.uses_lora:
        base = apply_dti(load_causal_lm(config.model, tokenizer, device), config.dti)
        model: Any = adapter_from(base, path)
    else:
        model = apply_dti(model_from(path), config.dti)
        if config.dti.train_slopes:
            load_slopes(model, path)
    if not config.model.quantize:
        model.to(device)
    return model


def load_slopes(model: PreTrainedModel, folder: Path) -> None:
    """Trained slopes, which a plain transformers model has no place for and leaves out."""
    for file in sorted(folder.glob("*.safetensors")):
        slopes = {name: x for name, x in load_file(file).items() if name.endswith(".alibi_slopes")}
        model.load_state_dict(slopes, strict=False)


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
