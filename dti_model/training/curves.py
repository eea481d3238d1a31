"""Curves of a training run: TensorBoard's files in the run folder, and W&B.

They are an aid. A disk that is full when a curve is written, or a folder that cannot be made, ends the curves with a warning and not the
run, which has checkpoints to write and says itself what it lacks.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.integrations.integration_utils import TensorBoardCallback, WandbCallback


def curves(report_to: tuple[str, ...], folder: Path) -> list[TrainerCallback]:
    """Trainer's own callbacks; TensorBoard's files go into `folder`."""
    callbacks: list[TrainerCallback] = []
    if "tensorboard" in report_to:
        # Read by Trainer's callback when it is made.
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder)
        callbacks.append(Curves(folder))
    if "wandb" in report_to:
        callbacks.append(WandbCallback())
    return callbacks


class Curves(TensorBoardCallback):
    """Trainer's TensorBoard callback, which warns where it cannot write and then writes no more."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder, self.ended = folder, False
        self._hook = threading.excepthook

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        # The writer's thread prints the traceback of the error that it then gives to us.
        self._hook, threading.excepthook = threading.excepthook, self._without_writers
        self._try(super().on_train_begin, *args, **kwargs)

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        self._try(super().on_log, *args, **kwargs)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self._try(super().on_train_end, *args, **kwargs)
        threading.excepthook = self._hook

    def _try(self, call: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        if self.ended:
            return
        try:
            call(*args, **kwargs)
        except OSError as error:
            self.ended, self.tb_writer = True, None
            with suppress(OSError):  # its file may lie on the same disk
                print(
                    f"WARNING: {self.folder} cannot be written ({error}): curves end here, the run goes on",
                    file=sys.stderr,
                    flush=True,
                )

    def _without_writers(self, error: threading.ExceptHookArgs) -> None:
        if type(error.thread).__module__.startswith("tensorboard.") and isinstance(error.exc_value, OSError):
            return
        self._hook(error)
