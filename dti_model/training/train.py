"""One training run: from prepared data to a run folder with model, metrics, predictions and plot."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from dti_model.config import OptimConfig, TrainConfig
from dti_model.data import DataError, PreparedData
from dti_model.devices import device_of_rank
from dti_model.evaluation.baselines import baseline_metrics, item_user_auc
from dti_model.evaluation.metrics import click_metrics
from dti_model.evaluation.scoring import score_targets
from dti_model.files import without_nan
from dti_model.launch import let_settings_rule
from dti_model.model.run import MODEL_FOLDER, Run, eval_targets
from dti_model.model.run_folder import CHECKPOINTS_FOLDER, RunExistsError
from dti_model.output import unbreakable_output
from dti_model.prompts import PackedPrompts, Prompts
from dti_model.ranks import first_rank_does, rank, world_size
from dti_model.training.curves import curves
from dti_model.training.results import write_results
from dti_model.training.resumable import SaveInTime
from dti_model.training.start import check_same_origin, find_checkpoint, run_folder_of
from dti_model.training.trainer import RunLog, StreamTrainer

__all__ = ["RunExistsError", "evaluate_run", "train"]


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
        OtherOriginError: data, tokenizer or pretrained model changed since the checkpoint was written.
        CheckpointError: the checkpoint to go on from is damaged.
        WriteError: the disk is full.
        DataError: the prepared data cannot be read or has no usable targets.
        NonFiniteLossError: training diverged.
        ValueError: FSDP2 cannot shard this model.
    """
    config = config.located()
    _check_splits(PreparedData.open(config.data), config)
    arguments = _arguments(config, config.optim)  # joins the other processes, where there are any
    with unbreakable_output(), run_folder_of(config.out, "dti train"):
        return _train_in(config, arguments)


def _train_in(config: TrainConfig, arguments: TrainingArguments) -> dict[str, Any]:
    """`train`, in a run folder that is ours alone."""
    checkpoint = first_rank_does(lambda: find_checkpoint(config))
    set_seed(config.seed)
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    # Else PyTorch also writes NaN into every new buffer, a pass over memory each, which is for finding reads of what nobody wrote.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a property of the module
    run = Run.start(config)
    _check_sharding(run)
    if checkpoint is not None:
        check_same_origin(checkpoint, run.provenance)
    trainer = _trainer(run, arguments)
    # A pretrained model has a level before training. Not again after an interruption: it would count for early stopping.
    trainer.args.eval_on_start = config.model.pretrained is not None and checkpoint is None
    if rank():
        torch.manual_seed(config.seed + rank())  # weights are equal by now; dropout differs from rank to rank
    first_rank_does(lambda: config.save(config.out))
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    _save_model(run, trainer)
    return _finish(run, trainer)


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
        labels = data.label[data.targets(split) if split == "train" else eval_targets(data, split, config)]
        if len(set(labels.tolist())) < 2:
            raise DataError(
                f"{data.path}: the {len(labels):,} {split} targets do not have both classes, so there is no AUC. "
                "Prepare again with another --threshold, --split or --min-context, or with more data"
            )


def _trainer(run: Run, arguments: TrainingArguments) -> StreamTrainer:
    config, optim = run.config, run.config.optim
    prompts = Prompts.streaming(run.data, run.data.targets("train"), config.window, config.targets_per_prompt)
    dataset = PackedPrompts(
        run.builder,
        prompts,
        optim.token_budget,
        config.seed,
        batch_multiple=world_size() * optim.accumulation,
    )
    validation = run.targets("val")
    labels, users = run.data.label[validation], run.data.users_of(validation)

    def validate() -> dict[str, float]:
        scores = score_targets(
            run.model, config.dti, run.builder, validation, optim.token_budget, config.validation_k or None
        )
        return click_metrics(labels, scores, users)

    callbacks: list[TrainerCallback] = [EarlyStoppingCallback(optim.patience)] if optim.patience else []
    callbacks.append(RunLog(config.progress, item_user_auc(run.data, validation)))
    callbacks += curves(config.report_to, config.out / "tensorboard")
    trainer = StreamTrainer(
        model=run.model,
        args=arguments,
        train_dataset=dataset,
        eval_dataset=dataset,  # Trainer wants one; `validate` knows the validation targets
        callbacks=callbacks,
        dti=config.dti,
        answers=run.builder.format.labels,
        validate=validate,
    )
    trainer.provenance = asdict(run.provenance)
    trainer.add_callback(SaveInTime(trainer, optim.save_steps))
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer


def _arguments(config: TrainConfig, optim: OptimConfig) -> TrainingArguments:
    let_settings_rule(optim.bf16)
    often = "steps" if optim.validate_every else "epoch"
    special: dict[str, Any] = {}
    if optim.activation_checkpointing and not optim.fsdp:
        special[_checkpointing_option({field.name for field in fields(TrainingArguments)})] = True
    if optim.fsdp:
        special["fsdp"] = True
        special["fsdp_config"] = {"version": 2, "activation_checkpointing": optim.activation_checkpointing}
    return TrainingArguments(
        output_dir=str(config.out / CHECKPOINTS_FOLDER),
        num_train_epochs=optim.epochs,
        max_steps=optim.max_steps or -1,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=optim.accumulation,
        learning_rate=optim.learning_rate,
        weight_decay=optim.weight_decay,
        adam_beta2=0.95,
        lr_scheduler_type="cosine",
        warmup_steps=optim.warmup,
        max_grad_norm=optim.clip,
        bf16=optim.bf16,
        eval_strategy=often,
        save_strategy=often,
        eval_steps=optim.validate_every or None,
        save_steps=optim.validate_every or 500,  # not read by epochs
        restore_callback_states_from_checkpoint=True,
        load_best_model_at_end=True,
        metric_for_best_model="auc",
        greater_is_better=True,
        logging_steps=config.logging_steps,
        logging_first_step=True,
        report_to="none",  # see curves.py
        ddp_find_unused_parameters=False,
        disable_tqdm=not config.progress,
        remove_unused_columns=False,
        dataloader_num_workers=0,
        seed=config.seed,
        data_seed=config.seed,
        use_cpu=not torch.cuda.is_available(),
        **special,
    )


def _checkpointing_option(known: Collection[str]) -> str:
    """What `TrainingArguments` of this transformers calls it: renamed after 5.17, and the old name goes with version 6."""
    new = "activation_checkpointing"
    return new if new in known else "gradient_checkpointing"


def _finish(run: Run, trainer: StreamTrainer) -> dict[str, Any]:
    """Score with all ranks; rank 0 writes everything down."""
    splits = ("test", "val") if run.config.score_test else ("val",)
    scores = {split: run.score(split, progress=run.config.progress) for split in splits}
    result: dict[str, Any] = first_rank_does(lambda: write_results(run, trainer, scores))
    return result


def evaluate_run(
    folder: Path,
    data_folder: Path | None,
    split: str,
    device: str | None = None,
    progress: bool = True,
    k: int | None = 1,
    other_data: bool = False,
    base: str | None = None,
) -> dict[str, Any]:
    """Score a split with a trained run, `k` targets per prompt (None: whole histories); metrics of the model and of the lines on the
    same targets. The processes of a launcher share the work, and `device` is then a type. Other arguments and errors as `Run.load`."""
    run = Run.load(folder, data_folder, device_of_rank(device), other_data, base)
    scores = run.score(split, k, progress=progress)
    baselines = baseline_metrics(run.data, split, run.targets(split))
    result = {
        split: run.metrics(split, scores),
        "baselines": {split: baselines},
        "provenance": asdict(run.provenance),
    }
    return dict(without_nan(result))
