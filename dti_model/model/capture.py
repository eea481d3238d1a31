"""CUDA graphs: a computation on a GPU, recorded once and launched as a whole.

Whatever the computation reads has to lie in tensors that stay where they are, and its host code runs once, at the capture. A capture fails
where the host reads the device or copies memory that is not pinned.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from dti_model.model.past import LayerKeys


class Outputs(NamedTuple):
    """Of a pass: logits at the [SUM] rows, and the keys of all context rows by layer if they are recorded."""

    logits: Tensor
    recorded: list[LayerKeys]


Forward = Callable[[], Outputs]
Result = TypeVar("Result")


class Capture(Protocol):
    """How computations are captured and replayed. Calls come one at a time, `capture` and its results inside `in_turn`."""

    def capture(self, computation: Callable[[], Result]) -> Callable[[], Result]:
        """A call that computes it again from what its inputs hold then. Its outputs lie where they lay before."""

    def in_turn(self) -> AbstractContextManager[object]:
        """A context for everything that reads or writes the inputs and outputs of captured computations."""

    def wait(self) -> None:
        """Wait until the device is done with all of them, so that they can be dropped."""


def are_close(actual: Tensor, expected: Tensor) -> bool:
    """Whether a replay's numbers are right: within 2 % of the largest, since libraries may multiply in another order in a capture."""
    if not expected.numel():
        return True
    actual, expected = actual.float(), expected.float()
    bound = 0.02 * float(expected.nan_to_num(0.0, 0.0, 0.0).abs().max())
    return torch.allclose(actual, expected, rtol=0.0, atol=bound, equal_nan=True)


def reason_of(error: BaseException) -> str:
    """Why a capture failed, in a line: the end of one that failed fails too, so the cause is what came before."""
    cause = error.__context__ or error
    return f"{type(cause).__name__}: {' '.join(str(cause).split())[:200]}"


# PyTorch captures one graph at a time.
_CAPTURING = threading.Lock()


class CudaCapture:
    """CUDA graphs of one device (HIP's on ROCm), captured on one stream, with one pool of memory between them.

    They share the memory of what lies between inputs and outputs, because they never run at the same time.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            self._stream = torch.cuda.Stream()
            self._pool = torch.cuda.graph_pool_handle()
            self._done = torch.cuda.Event()

    def capture(self, computation: Callable[[], Result]) -> Callable[[], Result]:
        """A replay of a computation, which is run twice: once to warm up caches, workspaces and compilers, which a capture cannot.

        Raises:
            RuntimeError: something in it cannot be captured.
        """
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        with _CAPTURING:
            self._stream.wait_stream(current)
            # A capture that fails stays on its stream: the outer context is what leaves it. What other threads do on other streams
            # does not disturb a capture of this thread, unless they wait for the whole device.
            with torch.cuda.stream(self._stream):
                computation()
                with torch.cuda.graph(
                    graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
                ):
                    outputs = computation()
            current.wait_stream(self._stream)

        def replay() -> Result:
            graph.replay()
            return outputs

        return replay

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """The stream that is current here waits for the one that was current there."""
        with torch.cuda.device(self._device):
            torch.cuda.current_stream().wait_event(self._done)
            try:
                yield
            finally:
                self._done.record()

    def wait(self) -> None:
        """Wait for the device, while nobody captures: that would end a capture."""
        with _CAPTURING:
            torch.cuda.synchronize(self._device)
