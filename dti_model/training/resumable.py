"""Hugging Face's Trainer with checkpoints of our own (`checkpoint.py`) and an orderly end at SIGTERM.

Trainer's have four flaws: a half-written checkpoint looks like a whole one, tensors are pickled, a run that early stopping had ended
trains on when it is resumed, and the loss of the steps since the last log line is forgotten.
"""

from __future__ import annotations

import signal
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from dti_model.ranks import first_rank_does, gather_from_ranks, rank, world_size
from dti_model.training.checkpoint import (
    CHECKPOINT_VERSION,
    OPTIMIZER_FILE,
    RUN_FILE,
    TRAINER_FILE,
    WEIGHTS_FILE,
    CheckpointError,
    check_checkpoint,
    load_optimizer,
    load_weights,
    random_state,
    read_document,
    set_random_state,
    tidy,
    using,
    whole_optimizer,
    whole_weights,
    write_checkpoint,
)

# EX_TEMPFAIL of sysexits.h: give the same command again. A process that SIGTERM itself has ended shows another status.
TERMINATED_STATUS = 75


class Terminated(SystemExit):
    """SIGTERM came and a checkpoint was written; ends the process with status 75 unless it is caught."""


class ResumableTrainer(Trainer):
    """Trainer whose runs can be killed at any moment and go on bit for bit."""

    provenance: dict[str, Any] | None = None  # what data, tokenizer and base model are, for the checkpoints
    terminate = False  # SIGTERM has reached this process
    stopping = False  # SIGTERM has reached some rank: all of them know
    _stopped_early = False
    _resumed: tuple[float, int] | None = None  # loss since the last log line, and its step

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's; meanwhile SIGTERM asks for a checkpoint at the end of the step, and ends the process there (`Terminated`)."""
        if threading.current_thread() is not threading.main_thread():
            return super().train(*args, **kwargs)
        previous = signal.signal(signal.SIGTERM, self._note_sigterm)
        try:
            result = super().train(*args, **kwargs)
        finally:
            signal.signal(signal.SIGTERM, previous)
        if any(gather_from_ranks(self.terminate)):  # in or after the last step, where nothing looked at it
            self._say(
                "SIGTERM: stopped at the end of training, before scoring. Give the same command again to go on"
            )
            raise Terminated(TERMINATED_STATUS)
        return result

    def _say(self, line: str) -> None:
        if self.state.is_world_process_zero:
            print(line, flush=True)

    def _note_sigterm(self, *_: Any) -> None:
        self.terminate = True

    def _folder(self, step: int) -> Path:
        return Path(str(self.args.output_dir)) / f"checkpoint-{step}"

    def _unwrapped(self) -> torch.nn.Module:
        model: torch.nn.Module = self.accelerator.unwrap_model(self.model)
        return model

    def _torch_optimizer(self) -> torch.optim.Optimizer:
        optimizer: Any = self.optimizer
        inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
        return inner

    def _scheduler(self) -> Any:
        assert self.lr_scheduler is not None
        return self.lr_scheduler

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        state, folder = self.state, self._folder(self.state.global_step)
        best = self._folder(state.best_global_step) if state.best_global_step else folder
        if state.best_global_step:
            state.best_model_checkpoint = str(best)
        weights = whole_weights(self._unwrapped())
        moments, groups = whole_optimizer(self._unwrapped(), self._torch_optimizer())
        run = {
            "version": CHECKPOINT_VERSION,
            "provenance": self.provenance,
            "groups": groups,
            "scheduler": self._scheduler().state_dict(),
            "random": gather_from_ranks(random_state()),
            "unlogged_loss": gather_from_ranks(self._tr_loss.item()),
            "last_logged_step": self._globalstep_last_logged,
        }
        callbacks: Any = state.stateful_callbacks  # a dictionary by the time that training runs
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                callbacks[type(callback).__name__] = callback.state()

        def write() -> None:
            tensors = {WEIGHTS_FILE: weights, OPTIMIZER_FILE: moments}
            write_checkpoint(folder, tensors, {RUN_FILE: run, TRAINER_FILE: asdict(state)})
            tidy(folder.parent, keep={folder, best})

        first_rank_does(write)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_weights(self._unwrapped(), Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        assert self.state.best_global_step is not None
        first_rank_does(
            lambda: check_checkpoint(self._folder(int(self.state.best_global_step or 0)), best=True)
        )
        load_weights(self._unwrapped(), self._folder(self.state.best_global_step))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        assert checkpoint is not None
        file = Path(checkpoint) / RUN_FILE
        run = read_document(file)
        with using(file):
            if isinstance(run["random"], list) and len(run["random"]) != world_size():
                raise CheckpointError(
                    f"{checkpoint} was written by {len(run['random'])} processes and this run has {world_size()}: an epoch would "
                    "not go on where it was. Start as many, or choose another --out"
                )
            load_optimizer(self._unwrapped(), self._torch_optimizer(), file.parent, run["groups"])
            self._scheduler().load_state_dict(run["scheduler"])
            self._resumed = float(run["unlogged_loss"][rank()]), int(run["last_logged_step"])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            file = Path(checkpoint) / RUN_FILE
            with using(file):
                set_random_state(read_document(file)["random"][rank()])

    def _run_epoch(self, **kwargs: Any) -> None:  # type: ignore[override]  # Trainer names every argument
        if self._stopped_early:
            self.control.should_training_stop = True
            return
        if self._resumed is not None:
            unlogged_loss, self._globalstep_last_logged = self._resumed
            self._tr_loss += unlogged_loss
            self._resumed = None
        super()._run_epoch(**kwargs)


class SaveInTime(TrainerCallback):
    """Checkpoints inside an epoch: every `save_steps`, and at SIGTERM, which then ends the run.

    Never at an epoch's last step: Trainer validates and saves right after it, and a run resumed from in between would go without that
    validation.
    """

    def __init__(self, trainer: ResumableTrainer, save_steps: int) -> None:
        self.trainer, self.save_steps = trainer, save_steps

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # Early stopping may have ended the run of the checkpoint. Trainer forgets it and would train on.
        kept = state.stateful_callbacks.get("TrainerControl", {}).get("args", {})
        self.trainer._stopped_early = kept.get("should_training_stop", False)
        if state.best_global_step:  # also where the run folder has been moved
            state.best_model_checkpoint = str(self.trainer._folder(state.best_global_step))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        step = state.global_step
        is_due = self.trainer.stopping or bool(self.save_steps and step % self.save_steps == 0)
        steps_per_epoch = len(self.trainer.train_dataset) // (args.gradient_accumulation_steps * world_size())  # type: ignore[arg-type]
        is_epoch_end = step % steps_per_epoch == 0 or step == state.max_steps
        if is_due and not is_epoch_end:
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.trainer.stopping:
            folder = self.trainer._folder(state.global_step)
            self.trainer._say(f"SIGTERM: wrote {folder} and stopped. Give the same command again to go on")
            raise Terminated(TERMINATED_STATUS)
