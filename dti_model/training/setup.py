"""From the settings of a run to Trainer and its arguments."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, fields
from typing import Any

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from dti_model.config import MORE_IS_BETTER, TrainConfig
from dti_model.devices import device_named
from dti_model.evaluation import eval_targets, item_user_auc, score_split, split_metrics
from dti_model.launch import let_settings_rule
from dti_model.model import EAGER, Run, compiled_parts
from dti_model.precision import Resolved, resolve
from dti_model.prompts import PackedPrompts, Prompts
from dti_model.ranks import world_size
from dti_model.training.curves import curves
from dti_model.training.resumable import SaveInTime
from dti_model.training.start import CHECKPOINTS_FOLDER
from dti_model.training.trainer import RunLog, StreamTrainer


def trainer_of(run: Run, arguments: TrainingArguments) -> StreamTrainer:
    """The trainer of a run: packed prompts, validation, log, checkpoints."""
    config, optim = run.config, run.config.optim
    prompts = Prompts.streaming(run.data, run.train_targets, config.window, config.targets_per_prompt)
    dataset = PackedPrompts(
        run.builder,
        prompts,
        optim.token_budget,
        config.seed,
        batch_multiple=world_size() * optim.accumulation,
    )

    def validate() -> dict[str, float]:
        return split_metrics(run, "val", score_split(run, "val", config.validation_k or None))

    callbacks: list[TrainerCallback] = [EarlyStoppingCallback(optim.patience)] if optim.patience else []
    callbacks.append(RunLog(config.progress, item_user_auc(run.data, eval_targets(run.data, "val", config))))
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
        graphs=optim.graphs and not optim.activation_checkpointing and not optim.fsdp,
        parts=compiled_parts(arguments.device) if optim.compile else EAGER,
    )
    trainer.provenance = asdict(run.provenance)
    trainer.add_callback(SaveInTime(trainer, optim.save_steps))
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer


def training_arguments(config: TrainConfig, precision: Resolved | None = None) -> TrainingArguments:
    """The settings as Trainer's; joins the processes of a launcher, where there are any.

    `precision`: that the run computes in; None: what its settings mean on this machine.
    """
    optim = config.optim
    precision = precision or resolve(optim.precision, device_named(None))
    let_settings_rule(precision)
    often = "steps" if optim.validate_every else "epoch"
    special: dict[str, Any] = {}
    if optim.activation_checkpointing and not optim.fsdp:
        special[_checkpointing_option({field.name for field in fields(TrainingArguments)})] = True
    if optim.fsdp:
        special["fsdp"] = True
        special["fsdp_config"] = {"version": 2, "activation_checkpointing": optim.activation_checkpointing}
    arguments = TrainingArguments(
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
        bf16=precision == "bf16",
        eval_strategy=often,
        save_strategy=often,
        eval_steps=optim.validate_every or None,
        save_steps=optim.validate_every or 500,  # not read by epochs
        restore_callback_states_from_checkpoint=True,
        load_best_model_at_end=True,
        metric_for_best_model=config.select_by,
        greater_is_better=MORE_IS_BETTER[config.select_by],
        logging_steps=config.logging_steps,
        logging_nan_inf_filter=False,  # `StreamTrainer` stops there; Trainer would wait for the device twice a step
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
    if optim.fsdp and precision == "bf16":
        # FSDP2 gathers weights in bfloat16. accelerate's policy would also cast the inputs of every layer, which hands each a copy of the
        # pass's `Stream`, so that the initial states of the first layer would not reach the others.
        arguments.fsdp_plugin_args["mixed_precision_policy"] = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    return arguments


def _checkpointing_option(known: Collection[str]) -> str:
    """The option's name in this transformers: renamed after 5.17, and the old name goes with version 6."""
    new = "activation_checkpointing"
    return new if new in known else "gradient_checkpointing"
