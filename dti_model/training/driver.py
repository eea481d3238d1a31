"""One training run: from prepared data to a run folder with model, metrics, predictions and plot."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import set_seed

from dti_model.config import TrainConfig
from dti_model.data import DataError, PreparedData
from dti_model.devices import precision_of_ranks, say_precision
from dti_model.evaluation import eval_targets, grouped_auc
from dti_model.launch import let_settings_rule
from dti_model.model import MODEL_FOLDER, Run, train_targets
from dti_model.output import unbreakable_output
from dti_model.ranks import first_rank_does, join_ranks, rank
from dti_model.training.checkpoint import remove_leftovers
from dti_model.training.results import finish, score_at_end
from dti_model.training.setup import trainer_of, training_arguments
from dti_model.training.start import (
    CHECKPOINTS_FOLDER,
    check_same_origin,
    find_checkpoint,
    precision_of,
    run_folder_of,
    with_template_of_run,
)
from dti_model.training.trainer import StreamTrainer


def train(config: TrainConfig) -> dict[str, Any]:
    """Train, choose the best epoch on validation, score validation and test once, and write the run folder.

    A run folder with the same settings and an unfinished run goes on from its last checkpoint. The folder is locked meanwhile.

    Args:
        config: every setting.

    Returns:
        The content of metrics.json.

    Raises:
        RunExistsError: the folder belongs to a run with other settings, to a finished one, or to something else.
        LockedError: another process trains into it.
        OtherOriginError: data, tokenizer, pretrained model or the run to go on from changed since the checkpoint was written; or that
            run does not fit data or settings.
        CheckpointError: the checkpoint to go on from is damaged.
        WriteError: the disk is full.
        DataError: the prepared data cannot be read or has no usable targets.
        NonFiniteLossError: training diverged.
        ValueError: FSDP2 cannot shard this model; or `optim.precision` auto is another precision on another rank.
    """
    config = with_template_of_run(config.located())
    _check_splits(PreparedData.open(config.data), config)
    let_settings_rule()
    device = join_ranks()
    with unbreakable_output(), run_folder_of(config.out, "dti train"):
        return _train_in(config, device)


def _train_in(config: TrainConfig, device: torch.device) -> dict[str, Any]:
    """`train`, in a run folder that is ours alone."""
    checkpoint = first_rank_does(lambda: find_checkpoint(config))
    began = None
    if checkpoint is not None:
        # A run that goes on from its last step saves no more, and tidies no more.
        first_rank_does(lambda: remove_leftovers(config.out / CHECKPOINTS_FOLDER))
        began = precision_of(checkpoint)
        if not TrainConfig.load(config.out).optim.graphs:  # it goes on bit for bit, without padding
            config = replace(config, optim=replace(config.optim, graphs=False))
    precision = precision_of_ranks(config.optim.precision, device, "--optim.precision", began)
    arguments = training_arguments(config, precision)
    set_seed(config.seed)
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    # Else PyTorch also writes NaN into every new buffer, a pass over memory each, which is for finding reads of what nobody wrote.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a property of the module
    run = Run.start(config, precision)
    _check_sharding(run)
    if checkpoint is not None:
        check_same_origin(checkpoint, run.provenance)
    say_precision(config.optim.precision, device, "--optim.precision", began)
    trainer = trainer_of(run, arguments)
    # A pretrained model, or that of an earlier run, has a level before training. Not again after an interruption: it would count for early stopping.
    has_level = config.model.pretrained is not None or config.init is not None
    trainer.args.eval_on_start = has_level and checkpoint is None
    if rank():
        torch.manual_seed(config.seed + rank())  # weights are equal by now; dropout differs from rank to rank
    first_rank_does(lambda: config.save(config.out))
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    scores = score_at_end(run)
    _save_model(run, trainer)
    return finish(run, trainer, scores)


def _check_sharding(run: Run) -> None:
    # accelerate does not see through peft's wrapper that embedding and head are one weight, and shards it twice.
    config = run.config
    if config.optim.fsdp and config.model.uses_lora and run.model.config.tie_word_embeddings:
        raise ValueError(
            f"{config.model.pretrained} has one weight for embedding and head, which FSDP2 cannot shard together with "
            "LoRA: leave optim.fsdp out (DDP), or use model.finetune full"
        )


def _save_model(run: Run, trainer: StreamTrainer) -> None:
    # A sharded model is gathered by all ranks.
    weights = trainer.accelerator.get_state_dict(trainer.model) if trainer.is_fsdp_enabled else None
    first_rank_does(lambda: run.save_model(run.config.out / MODEL_FOLDER, weights))


def _check_splits(data: PreparedData, config: TrainConfig) -> None:
    """Before hours of training: both classes in every split that is scored."""
    for split in ("train", "val", "test") if config.score_test else ("train", "val"):
        labels = data.label[
            train_targets(config, data) if split == "train" else eval_targets(data, split, config)
        ]
        if len(set(labels.tolist())) < 2:
            raise DataError(
                f"{data.path}: the {len(labels):,} {split} targets do not have both classes, so there is no AUC. "
                "Prepare again with another --threshold, --split or --min-context, or with more data"
            )
    if config.select_by == "gauc":
        rows = eval_targets(data, "val", config)
        clicks, users = data.label[rows].astype(np.int64), data.users_of(rows)
        if grouped_auc(clicks, np.zeros(len(rows)), users)[1] == 0:
            raise DataError(
                f"{data.path}: no user has both classes among the {len(rows):,} validation targets, so there is no GAUC to choose the best "
                "epoch by: take --select-by auc or log_loss, or more validation targets (--max-eval-targets 0, or another --split)"
            )
