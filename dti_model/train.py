"""One training run: from prepared data to a run folder with model, metrics, predictions and plot."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import get_last_checkpoint

from dti_model.baselines import baseline_metrics
from dti_model.config import CONFIG_FILE, OptimConfig, TrainConfig
from dti_model.data import DataError, PreparedData
from dti_model.metrics import click_metrics
from dti_model.plots import plot_report
from dti_model.prompts import PackedPrompts, Prompts
from dti_model.report import metrics_table, sentence_about_baselines
from dti_model.run import CHECKPOINTS_FOLDER, METRICS_FILE, MODEL_FOLDER, Run, write_json
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
    """
    _check_splits(PreparedData.open(config.data))
    checkpoint = _find_checkpoint(config)
    set_seed(config.seed)
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    run = Run.start(config)
    trainer = _trainer(run)
    config.out.mkdir(parents=True, exist_ok=True)
    config.save(config.out)
    trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.is_world_process_zero():
        run.model.save_pretrained(config.out / MODEL_FOLDER)
        run.tokenizer.save_pretrained(config.out / MODEL_FOLDER)
    return _finish(run, trainer)


def _find_checkpoint(config: TrainConfig) -> str | None:
    """The checkpoint that an earlier, killed call with the same settings left; None: start anew. Writes nothing."""
    if (config.out / METRICS_FILE).exists():
        raise RunExistsError(f"{config.out} holds a finished run: choose another --out, or delete it")
    if (config.out / CONFIG_FILE).exists():
        checkpoints = config.out / CHECKPOINTS_FOLDER
        checkpoint = get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
        if checkpoint is not None and TrainConfig.load(config.out) != config:
            raise RunExistsError(
                f"{config.out} was started with other settings (see {CONFIG_FILE} there): choose another --out"
            )
        return checkpoint
    if config.out.exists() and any(config.out.iterdir()):
        raise RunExistsError(
            f"{config.out} exists, is not empty and is not a run folder: choose another --out"
        )
    return None


def _check_splits(data: PreparedData) -> None:
    """Before hours of training: both classes in every split that is scored."""
    for split in ("train", "val", "test"):
        labels = data.label[data.targets(split)]
        if len(set(labels.tolist())) < 2:
            raise DataError(
                f"{data.path}: the {len(labels):,} {split} targets do not have both classes, so there is no AUC. "
                "Prepare again with another --threshold, --split or --min-context, or with more data"
            )


def _trainer(run: Run) -> StreamTrainer:
    config, optim = run.config, run.config.optim
    prompts = Prompts.streaming(run.data, run.data.targets("train"), config.window, config.targets_per_prompt)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    dataset = PackedPrompts(
        run.builder, prompts, optim.token_budget, config.seed, batch_multiple=world_size * optim.accumulation
    )
    validation = run.data.targets("val")
    labels, users = run.data.label[validation], run.data.users_of(validation)

    def validate() -> dict[str, float]:
        scores = score_targets(
            run.model, config.dti, run.builder, validation, optim.token_budget, config.validation_k or None
        )
        return click_metrics(labels, scores, users)

    callbacks: list[TrainerCallback] = [EarlyStoppingCallback(optim.patience)] if optim.patience else []
    callbacks.append(RunLog(config.progress))
    trainer = StreamTrainer(
        model=run.model,
        args=_arguments(config, optim),
        train_dataset=dataset,
        eval_dataset=dataset,  # Trainer wants one; `validate` knows the validation targets
        callbacks=callbacks,
        dti=config.dti,
        answers=run.builder.format.labels,
        validate=validate,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer


def _arguments(config: TrainConfig, optim: OptimConfig) -> TrainingArguments:
    # Named only where wanted: transformers renames the option.
    checkpointing: dict[str, Any] = (
        {"activation_checkpointing": True} if optim.activation_checkpointing else {}
    )
    return TrainingArguments(
        output_dir=str(config.out / CHECKPOINTS_FOLDER),
        num_train_epochs=optim.epochs,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=optim.accumulation,
        learning_rate=optim.learning_rate,
        weight_decay=optim.weight_decay,
        adam_beta2=0.95,
        lr_scheduler_type="cosine",
        warmup_steps=optim.warmup,
        max_grad_norm=optim.clip,
        bf16=optim.bf16,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="auc",
        greater_is_better=True,
        logging_steps=10,
        logging_first_step=True,
        report_to="none",
        disable_tqdm=not config.progress,
        remove_unused_columns=False,
        dataloader_num_workers=0,
        seed=config.seed,
        data_seed=config.seed,
        use_cpu=not torch.cuda.is_available(),
        **checkpointing,
    )


def _finish(run: Run, trainer: StreamTrainer) -> dict[str, Any]:
    config, data = run.config, run.data
    result: dict[str, Any] = {"test": {}, "val": {}, "baselines": {}}
    scores = {}
    for split in ("val", "test"):
        scores[split] = run.score(split, progress=config.progress)
        run.write_predictions(config.out / f"predictions-{split}.parquet", split, scores[split])
        result[split] = run.metrics(split, scores[split])
        result["baselines"][split] = baseline_metrics(data, split)
    result["training"] = _training_facts(run, trainer)
    plot_report(
        config.out / "report.png",
        trainer.state.log_history,
        data.label[data.targets("test")],
        scores["test"],
        result["baselines"],
    )
    write_json(config.out / METRICS_FILE, result)
    print(metrics_table(result))
    print(sentence_about_baselines(result["test"], result["baselines"]["test"]))
    return result


def _training_facts(run: Run, trainer: StreamTrainer) -> dict[str, Any]:
    """Tokens trained, tokens that sliding-window prompts would have needed, and the speed of both where it was measured."""
    config, dataset, state = run.config, trainer.train_dataset, trainer.state
    assert isinstance(dataset, PackedPrompts)
    rows = run.data.targets("train")
    sliding = run.builder.num_rows(Prompts.streaming(run.data, rows, config.window, 1)).sum()
    epochs = state.global_step / (len(dataset) / config.optim.accumulation)
    facts: dict[str, Any] = {
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "targets": len(rows),
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
    validations = [entry for entry in log_history if "eval_auc" in entry]
    return max(validations, key=lambda entry: entry["eval_auc"])["epoch"] if validations else 0.0


def evaluate_run(
    folder: Path, data_folder: Path | None, split: str, device: str | None = None, progress: bool = True
) -> dict[str, Any]:
    """Score a split with a trained run; metrics of the model and of the lines on the same targets."""
    run = Run.load(folder, data_folder, device)
    scores = run.score(split, progress=progress)
    return {split: run.metrics(split, scores), "baselines": {split: baseline_metrics(run.data, split)}}
