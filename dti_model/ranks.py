"""The processes (ranks) of one run, as torchrun or accelerate started them; a run of one process has rank 0 only.

Until it has joined the others (`join_ranks`, or TrainingArguments), every process takes itself for rank 0 of one.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState

from dti_model.launch import num_processes

Result = TypeVar("Result")

_WAIT = timedelta(minutes=30)  # for the first rank's work; as TrainingArguments have it


def join_ranks(cpu: bool | None = None) -> torch.device:
    """Join the processes that a launcher started, where there are any; call it before anything that asks for `rank`.

    Args:
        cpu: all compute on CPUs; None: where there is no CUDA.

    Returns:
        The device of this process. A second call changes nothing.

    Raises:
        ValueError: the environment does not say well which processes there are.
    """
    num_processes()
    state = PartialState(cpu=not torch.cuda.is_available() if cpu is None else cpu, timeout=_WAIT)
    device: torch.device = state.device
    return device


def rank() -> int:
    """This process, counted from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes work on this run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def exit_with(status: int) -> NoReturn:
    """End this process; call it last in a program that torchrun starts, instead of `sys.exit`, with its own files closed.

    One of several ranks ends as multiprocessing's children do: threads are waited for, exit handlers run, output is flushed, and the
    process is gone, without the end of the interpreter. A thread of the process group that frees its last tensor meanwhile would abort
    the process (SIGABRT), whatever it had achieved. Destroying the group does not prevent it while a model or a mesh refers to it.
    """
    if not dist.is_initialized():
        raise SystemExit(status)
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # full, closed or none at all
            stream.flush()
    os._exit(status)


def first_rank_does(work: Callable[[], Result]) -> Result:
    """Work that only one process may do, such as writing a file: all others wait for its result, or raise its error.

    Args:
        work: called on rank 0 only; result and errors must be picklable. Every rank has to get here.
    """
    if world_size() == 1:
        return work()
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome[0] = work()
        except Exception as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    result: Result = outcome[0]
    return result


def gather_from_ranks(value: Result) -> list[Result]:
    """A picklable value of every rank, in the order of the ranks, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values
