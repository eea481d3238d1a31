"""Run functions where Triton interprets its kernels on CPU tensors.

TRITON_INTERPRET must be set before triton is first imported, so the functions run in a child process of their own; one child
serves all tests of a pytest worker. A test gets back the function's own result or exception.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch


@functools.cache
def _child() -> ProcessPoolExecutor:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TRITON_INTERPRET", "1")
        pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_start)
        pool.submit(os.getpid).result()  # the child starts now, while the variable is set
    return pool


def _start() -> None:
    torch.set_num_threads(1)
    # Memory that nobody wrote is NaN, so that reading it shows.
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True


def interpret(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)` in the child; both must be importable or picklable."""
    return _child().submit(function, *args).result()
