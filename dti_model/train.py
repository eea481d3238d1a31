"""One training run: from prepared data to a run folder with model, metrics, predictions and plot."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from accelerate import PartialState
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments, set_seed
from transformers.integrations.integration_utils import TensorBoardCallback, WandbCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from dti_model.baselines import baseline_metrics, item_user_auc
from dti_model.checkpoint import last_checkpoint, write_folder
from dti_model.config import CONFIG_FILE, OptimConfig, TrainConfig
from dti_model.data import DataError, PreparedData
from dti_model.metrics import click_metrics
from dti_model.plots import plot_report
from dti_model.prompts import PackedPrompts, Prompts
from dti_model.ranks import first_rank_does, rank, world_size
from dti_model.report import metrics_table, sentence_about_baselines
from dti_model.resumable import SaveInTime
from dti_model.run import CHECKPOINTS_FOLDER, METRICS_FILE, MODEL_FOLDER, Run, eval_targets, write_json
from dti_model.scoring import score_targets
from dti_model.throughput import measure_training
from dti_model.trainer import RunLog, StreamTrainer


class RunExistsError(FileExistsError):
    """The run folder holds another run, or a finished one."""


def train(config: TrainConfig) -> dict[str, Any]:
    """Train, choose the best epoch on validation, score validation and test once, and write the run folder.

    A run folder with the same settings and an unfinished run goes on from its last checkpoint.

    Args:
        config: every setting.

    Returns:
        The content of metrics.json.

    Raises:
        RunExistsError: the folder belongs to a run with other settings, or to a finished one.
        DataError: the prepared data cannot be read or has no usable targets.
        NonFiniteLossError: training diverged.
        ValueError: FSDP2 cannot shard this model.
    """
    _check_splits(PreparedData.open(config.data), config)
    arguments = _arguments(config, config.optim)  # joins the other processes, where there are any
    checkpoint = first_rank_does(lambda: _find_checkpoint(config))
    set_seed(config.seed)
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    run = Run.start(config)
    _check_sharding(run)
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

    def write(folder: Path) -> None:
        run.save_model(folder, weights)

    first_rank_does(lambda: write_folder(run.config.out / MODEL_FOLDER, write))


def _find_checkpoint(config: TrainConfig) -> Path | None:
    """The checkpoint that an earlier, killed call with the same settings left; None: start anew. Writes nothing."""
    if (config.out / METRICS_FILE).exists():
        raise RunExistsError(f"{config.out} holds a finished run: choose another --out, or delete it")
    if (config.out / CONFIG_FILE).exists():
        checkpoint = last_checkpoint(config.out / CHECKPOINTS_FOLDER)
        if checkpoint is not None and not TrainConfig.load(config.out).same_run(config):
            raise RunExistsError(
                f"{config.out} was started with other settings (see {CONFIG_FILE} there): choose another --out"
            )
        return checkpoint
    if config.out.exists() and any(config.out.iterdir()):
        raise RunExistsError(
            f"{config.out} exists, is not empty and is not a run folder: choose another --out"
        )
    return None


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
    callbacks += _curves(config)
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
    trainer.add_callback(SaveInTime(trainer, optim.save_steps))
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer


def _curves(config: TrainConfig) -> list[TrainerCallback]:
    """Trainer's own TensorBoard and W&B callbacks; the curves lie in the run folder."""
    callbacks: list[TrainerCallback] = []
    if "tensorboard" in config.report_to:
        # Where Trainer's callback looks; read when training begins.
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(config.out / "tensorboard")
        callbacks.append(TensorBoardCallback())
    if "wandb" in config.report_to:
        callbacks.append(WandbCallback())
    return callbacks


def _arguments(config: TrainConfig, optim: OptimConfig) -> TrainingArguments:
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
        report_to="none",  # see _curves
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
    result: dict[str, Any] = first_rank_does(lambda: _write_results(run, trainer, scores))
    return result


def _write_results(
    run: Run, trainer: StreamTrainer, scores: dict[str, npt.NDArray[np.float64]]
) -> dict[str, Any]:
    config, data = run.config, run.data
    result: dict[str, Any] = {split: run.metrics(split, scores[split]) for split in scores}
    result["baselines"] = {split: baseline_metrics(data, split, run.targets(split)) for split in scores}
    for split in scores:
        run.write_predictions(config.out / f"predictions-{split}.parquet", split, scores[split])
    result["training"] = _training_facts(run, trainer)
    last = next(iter(scores))  # test, where it is scored
    plot_report(
        config.out / "report.png",
        trainer.state.log_history,
        data.label[run.targets(last)],
        scores[last],
        result["baselines"],
    )
    write_json(config.out / METRICS_FILE, result)
    print(metrics_table(result))
    print(sentence_about_baselines(result[last], result["baselines"][last]))
    return result


def _training_facts(run: Run, trainer: StreamTrainer) -> dict[str, Any]:
    """Tokens trained, tokens that sliding-window prompts would have needed, and the speed of both where it was measured."""
    config, dataset, state = run.config, trainer.train_dataset, trainer.state
    assert isinstance(dataset, PackedPrompts)
    rows = run.data.targets("train")
    sliding = run.builder.num_rows(Prompts.streaming(run.data, rows, config.window, 1)).sum()
    epochs = state.global_step / (len(dataset) / config.optim.accumulation / world_size())
    trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    facts: dict[str, Any] = {
        "parameters": trained,
        "frozen_parameters": sum(p.numel() for p in run.model.parameters()) - trained,
        "targets": len(rows),
        "processes": world_size(),
        "optimizer_steps": state.global_step,
        "epochs": round(epochs, 4),
        "best_epoch": round(_epoch_of_best(state.log_history), 4),
        "tokens": int(epochs * dataset.num_rows.sum()),
        "tokens_sliding_window": int(epochs * sliding),
    }
    if config.compare_steps:
        measured = measure_training(run, [config.targets_per_prompt, 1], config.compare_steps)
        names = {"streaming": config.targets_per_prompt, "sliding_window": 1}
        facts["throughput"] = {name: asdict(measured[k]) for name, k in names.items()}
    return facts


def _epoch_of_best(log_history: list[dict[str, float]]) -> float:
    validations = [entry for entry in log_history if "eval_auc" in entry and entry["step"]]
    return max(validations, key=lambda entry: entry["eval_auc"])["epoch"] if validations else 0.0


def evaluate_run(
    folder: Path,
    data_folder: Path | None,
    split: str,
    device: str | None = None,
    progress: bool = True,
    k: int | None = 1,
) -> dict[str, Any]:
    """Score a split with a trained run, `k` targets per prompt (None: whole histories); metrics of the model and of the lines on the
    same targets."""
    if device is None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        device = str(PartialState(cpu=not torch.cuda.is_available()).device)  # joins the other processes
    run = Run.load(folder, data_folder, device)
    scores = run.score(split, k, progress=progress)
    baselines = baseline_metrics(run.data, split, run.targets(split))
    return {split: run.metrics(split, scores), "baselines": {split: baselines}}
