"""Replays without CUDA graphs: the same computation over the same buffers, once more, for rehearsals and for tests on a CPU.

As with a graph, a replay's host code is that of the capture, so what it remembers of the captured pass is old, and its outputs lie where
they lay. Otherwise than with a graph, the host's code runs again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from benchmarks.recording import REHEARSING
from dti_model.model import CudaCapture, Outputs

Result = TypeVar("Result")


class Rerun:
    """A `Capture` without a GPU.

    Attributes:
        captured: computations that were captured.
        replayed: calls of their replays.
    """

    def __init__(self, device: torch.device) -> None:
        self.captured = self.replayed = 0
        self._turn = threading.Lock()

    def capture(self, computation: Callable[[], Result]) -> Callable[[], Result]:
        """Runs it, and again for each replay."""
        assert self._turn.locked(), "something is captured out of turn"
        self.captured += 1
        outputs = computation()

        def replay() -> Result:
            assert self._turn.locked(), "something is replayed out of turn"
            self.replayed += 1
            again = computation()
            for old, new in zip(_tensors(outputs), _tensors(again), strict=True):
                old.copy_(new)
            return outputs

        return replay

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """Two at a time are an error, not a wait: whoever calls has a lock."""
        assert self._turn.acquire(blocking=False), "two computations at a time"
        try:
            yield
        finally:
            self._turn.release()

    def wait(self) -> None:
        """Nothing is under way."""


def _tensors(outputs: Any) -> list[torch.Tensor]:
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    assert isinstance(outputs, Outputs)
    return [outputs.logits, *(x for layer in outputs.recorded for x in layer if x is not None)]


# What captures on `DEVICE`.
CAPTURE = Rerun if REHEARSING else CudaCapture
