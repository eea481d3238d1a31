"""Started by torchrun with two processes: trains with DDP, then with FSDP2, each stopped by SIGTERM on the way and resumed."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
from contextlib import suppress
from datetime import timedelta
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


def give_gloo_one_thread() -> None:
    """Of two threads of a group, PyTorch's default, each writes the name of what it has done into one string, without a lock
    (`ProcessGroupGloo::runLoop`, 2.13). Long names, which sharded training on CPUs has, are freed by both, and SIGSEGV ends a process now and then.
    """
    gloo: Any = torch.distributed.distributed_c10d.ProcessGroupGloo
    initialise = gloo.__init__

    def with_one(self: Any, store: Any, rank: int, size: int, timeout: timedelta) -> None:
        options = gloo._Options()
        options._devices, options._threads, options._timeout = [gloo.create_default_device()], 1, timeout
        initialise(self, store, rank, size, options)

    gloo.__init__ = with_one


def num_gloo_threads() -> int:
    """Of this process; one for each group and thread of it."""
    found = 0
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # a thread that has ended meanwhile
            found += (task / "comm").read_text() == "pt_gloo_runloop\n"
    return found


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    give_gloo_one_thread()
    # C++ frames of all threads, should a signal end this process: those of a process group have no others.
    torch._C._set_print_stack_traces_on_fatal_signal(True)
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
        assert num_gloo_threads() == 1
    (folder / f"stopped-{rank()}.json").write_text(json.dumps(stopped))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    exit_with(0)
