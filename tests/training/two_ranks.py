"""Started by torchrun with two processes: trains with DDP, then with FSDP2, each stopped by SIGTERM on the way and resumed."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import accelerate.state
import torch
from accelerate.utils import DistributedType

from dti_model.config import TrainConfig
from dti_model.ranks import exit_with, rank
from dti_model.training import train
from dti_model.training.resumable import Terminated
from dti_model.training.trainer import StreamTrainer

STOP_AT = 7


def shard_on_cpus() -> None:
    """Accelerate reads its FSDP settings where the processes have accelerators; with this, where they have CPUs too."""
    initialise = accelerate.state.AcceleratorState.__init__

    def pretend(self: Any, *args: Any, **kwargs: Any) -> None:
        shared = accelerate.state.PartialState._shared_state
        if shared.get("distributed_type") == DistributedType.MULTI_CPU:
            shared["distributed_type"] = DistributedType.MULTI_GPU
        initialise(self, *args, **kwargs)

    accelerate.state.AcceleratorState.__init__ = pretend  # type: ignore[method-assign]


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    one = TrainConfig.load(folder / "one")
    training_step = StreamTrainer.training_step

    def terminated(self: StreamTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        # One rank hears of it in the step before, and tells the other at the start of the next: both stop after that one.
        if rank() == 1 and self.state.global_step == STOP_AT - 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return training_step(self, *args, **kwargs)

    stopped = {}
    for name in ("ddp", "fsdp"):
        if name == "fsdp":
            shard_on_cpus()
        optim = dataclasses.replace(one.optim, accumulation=1, fsdp=name == "fsdp")
        config = dataclasses.replace(one, out=folder / name, optim=optim)
        StreamTrainer.training_step = terminated  # type: ignore[method-assign]
        try:
            train(config)
        except Terminated as end:
            stopped[name] = [end.code, sorted(os.listdir(config.out / "checkpoints"))]
        StreamTrainer.training_step = training_step  # type: ignore[method-assign]
        train(config)
    (folder / f"stopped-{rank()}.json").write_text(json.dumps(stopped))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    exit_with(0)
