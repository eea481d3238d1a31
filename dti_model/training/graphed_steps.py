"""Training steps as CUDA graphs: forward, loss and backward cost what the device needs, and not what Python needs to launch them.

A step of a small language model is some three thousand kernels, which the host launches more slowly than a GPU computes them. A graph
launches the same kernels on the same grids, so batches are padded to few shapes (`padded_batch`) by rows that nobody reads and whose
gradients are zero. A step should have the same bits whether it is replayed or not, as it has in the tests on a GPU: then a run that goes on
after a checkpoint ends as an unbroken one does.

    1st batch of a shape     is computed kernel by kernel
    2nd batch                too, then its step is captured and replayed
    others                   one launch each

The first three replays of the first shape and the first of every other are compared with the step itself, gradient by gradient (`are_close`).
Gradients are accumulated in tensors that stay where they are. The clipping and the optimizer stay outside.

Weights that move are noticed. Anything else that changes what a step computes is for a new `StepGraphs`: parameters that are exchanged, frozen
or thawed, modules, hooks.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dti_kernels import StreamLayout
from dti_model.model import Capture, CudaCapture, are_close, keep_token_indices, reason_of, with_padding
from dti_model.prompts import StreamBatch

# FLOPs of a step in each layer, beyond which a GPU takes longer than its host, and batches stay as they are. On an H200 SmolLM2-135M's steps
# have 4e11, and the device takes .39 of what its host takes; two layers of Llama-3.1-8B have 1e13, and a graph makes them 4 % slower.
MOST_FLOPS = 1e12
# The label of a [SUM] that stands for no target.
NO_LABEL = -1
# Graphs that are kept, of the shapes that came first; each has its nodes, and the memory between inputs and gradients is theirs together.
MOST_GRAPHS = 24
# Batches of a shape before its step is captured, which takes as long as a few steps.
_FIRST = 2
# Replays that are compared with the step itself, each of which takes as long as two steps: of the first shape, and of every other.
_CHECKED_OF_FIRST, _CHECKED = 3, 1

# Loss of a batch, with its gradients added to those of the parameters: from the batch, and the number of targets of the optimizer step.
Step = Callable[[StreamBatch, Tensor], Tensor]


def padded_batch(batch: StreamBatch) -> StreamBatch:
    """The batch in one of few shapes: up to a sixteenth more context rows, and up to a quarter more [SUM] rows, of label `NO_LABEL`; small
    numbers up to the next multiple of 16. Packed batches are nearly full, so a run of a language model over films has some five to thirteen
    shapes, and 2 % more rows.

    Args:
        batch: on the CPU.
    """
    layout = batch.layout
    num_context, num_sum = _rounded(layout.num_context + 1, 16), _rounded(layout.num_sum, 4)
    labels = F.pad(batch.labels, (0, num_sum - layout.num_sum), value=NO_LABEL)
    ids, padded = with_padding(batch.input_ids, layout, num_context, num_sum)
    return StreamBatch(ids, padded, labels, batch.targets)


def _rounded(number: int, parts: int) -> int:
    """Up to the next multiple of a power of two, 16 or more, by less than a share of one in so many parts."""
    step = max(16, (1 << number.bit_length()) // (2 * parts))
    return -(-number // step) * step


class _Shape(NamedTuple):
    """All that a launch or a line of Python may depend on, of the batches that share a graph."""

    num_context: int
    num_sum: int
    window: int
    reset_window: int
    mean_span: int  # chooses tiles

    @staticmethod
    def of(layout: StreamLayout) -> _Shape:
        return _Shape(
            layout.num_context, layout.num_sum, layout.window, layout.reset_window, layout.mean_span
        )


class _Inputs:
    """What a captured step reads: the same tensors in every step.

    Attributes:
        batch: of the shape.
        num_targets: int64, no dimensions.
    """

    def __init__(self, batch: StreamBatch, num_targets: Tensor) -> None:
        """Copies of a batch's tensors; `targets`, which no step reads, is left out."""
        old = batch.layout
        arrays = old.rows.clone(), old.keys.clone()
        layout = StreamLayout(*arrays, old.window, old.reset_window, old.mean_span, checked=True)
        self.batch = StreamBatch(
            batch.input_ids.clone(), layout, batch.labels.clone(), batch.targets.new_empty(0)
        )
        self.num_targets = num_targets.clone()

    def fill(self, batch: StreamBatch, num_targets: Tensor) -> None:
        """Write another batch of the shape into them."""
        for mine, other in zip(self._tensors(self.batch), self._tensors(batch), strict=True):
            mine.copy_(other)
        self.num_targets.copy_(num_targets)

    @staticmethod
    def _tensors(batch: StreamBatch) -> tuple[Tensor, ...]:
        return batch.input_ids, batch.labels, batch.layout.rows, batch.layout.keys


@dataclass
class _Graph:
    """A shape's: what it reads, the launch, which returns the loss, and how many replays are still compared with the step."""

    inputs: _Inputs
    replay: Callable[[], Tensor]
    unchecked: int


class _Gradients:
    """Tensors that parameters have their gradients in, from step to step, though optimizers let go of them in between."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        """Those of the parameters that have a gradient now: others have no part in the loss, and the optimizer is to leave them alone."""
        found = [(x, x.grad) for x in parameters if x.grad is not None]
        self._parameters, self._tensors = [x for x, _ in found], [grad for _, grad in found]

    def take(self) -> None:
        """Let the parameters have these tensors: with zeros where they have no gradient, and with their gradient where they have another."""
        fresh = []
        for parameter, tensor in zip(self._parameters, self._tensors):
            if parameter.grad is None:
                fresh.append(tensor)
            elif parameter.grad is not tensor:
                tensor.copy_(parameter.grad)
            parameter.grad = tensor
        if fresh:
            torch._foreach_zero_(fresh)

    def forget(self) -> None:
        """No parameter has a gradient."""
        for parameter in self._parameters:
            parameter.grad = None

    def are_new(self) -> bool:
        """Whether no parameter has a gradient yet: the batch is the first of its optimizer step."""
        return all(parameter.grad is None for parameter in self._parameters)

    def restore(self, copies: Sequence[Tensor]) -> None:
        """Write what `copies` has returned."""
        torch._foreach_copy_(self._tensors, list(copies))

    def copies(self) -> list[Tensor]:
        """Of all."""
        return [x.clone() for x in self._tensors]

    def are_close(self, others: Sequence[Tensor]) -> bool:
        """Whether each is right, as the others are."""
        return all(are_close(x, y) for x, y in zip(self._tensors, others, strict=True))


class StepGraphs:
    """Steps of one model on one GPU, replayed where their shape has come before."""

    def __init__(
        self,
        model: nn.Module,
        new_capture: Callable[[torch.device], Capture] = CudaCapture,
        most_graphs: int = MOST_GRAPHS,
    ) -> None:
        """Without graphs yet.

        Args:
            model: whose parameters stay where they are.
            new_capture: makes what captures steps on a device.
            most_graphs: that are kept.
        """
        keep_token_indices(model)
        self._parameters = list(model.parameters())
        self._new_capture, self._most_graphs = new_capture, most_graphs
        self._capture: Capture | None = None
        self._places: list[int] = []
        self._graphs: dict[_Shape, _Graph] = {}
        self._seen: Counter[_Shape] = Counter()
        self._gradients: _Gradients | None = None
        self._failed, self._num_graphs = False, 0

    @property
    def num_graphs(self) -> int:
        """How many were captured so far."""
        return self._num_graphs

    def run(self, batch: StreamBatch, num_targets: Tensor, step: Step) -> Tensor:
        """The loss of a step, without dimensions; gradients are added to those that the parameters have.

        Args:
            batch: the result of `padded_batch`, on the device.
            num_targets: of the whole optimizer step, int64 without dimensions, on the device.
            step: computes it.
        """
        places = [x.data_ptr() for x in self._parameters]
        if self._capture is None:
            self._capture, self._places = self._new_capture(batch.input_ids.device), places
        if not self._failed and places != self._places:
            self._give_up("the weights have moved")
        shape = _Shape.of(batch.layout)
        self._seen[shape] += 1
        with self._capture.in_turn():
            if shape in self._graphs and self._gradients is not None:
                return self._replayed(shape, batch, num_targets, step)
            loss = self.as_it_is(batch, num_targets, step)
            if self._seen[shape] >= _FIRST and len(self._graphs) < self._most_graphs and not self._failed:
                reason = self._try_to_capture(shape, batch, num_targets, step)
                if reason:
                    self._give_up(reason)
            return loss

    def end(self) -> None:
        """Let go of graphs, and of the memory between inputs and gradients; steps that come later begin anew."""
        if self._capture is not None:
            self._capture.wait()
        self._graphs.clear()
        self._seen.clear()
        self._gradients = self._capture = None
        torch.cuda.empty_cache()  # does nothing where there is no GPU

    def as_it_is(self, batch: StreamBatch, num_targets: Tensor, step: Step) -> Tensor:
        """`run` without a graph, of a batch that need not be padded; without graphs from then on where the memory does not suffice for both."""
        if self._failed:
            return step(batch, num_targets)
        is_new = self._gradients is None or self._gradients.are_new()
        if self._gradients is not None:
            self._gradients.take()
        try:
            loss = step(batch, num_targets)
        except torch.OutOfMemoryError:
            if not (self._graphs and is_new):
                raise
        else:
            if self._gradients is None:
                self._gradients = _Gradients(self._parameters)
            return loss
        if self._gradients is not None:
            self._gradients.forget()
        self._give_up("memory does not suffice for graphs and for batches of other shapes")
        return step(batch, num_targets)

    def _try_to_capture(self, shape: _Shape, batch: StreamBatch, num_targets: Tensor, step: Step) -> str:
        """Capture a step that has been computed; gradients and random numbers are what they were. The reason why not; empty: it is captured."""
        capture, gradients = self._capture, self._gradients
        assert capture is not None
        assert gradients is not None
        device = batch.input_ids.device
        before, random = gradients.copies(), _random_state(device)
        inputs, reason = _Inputs(batch, num_targets), ""
        try:
            replay = capture.capture(partial(step, inputs.batch, inputs.num_targets))
            self._graphs[shape] = _Graph(inputs, replay, _CHECKED if self._graphs else _CHECKED_OF_FIRST)
            self._num_graphs += 1
        except Exception as error:  # of PyTorch, the driver, or a module of the model that reads the device
            reason = reason_of(error)
        gradients.restore(before)  # without what the capture's own run has added
        _set_random_state(device, random)
        return reason

    def _replayed(self, shape: _Shape, batch: StreamBatch, num_targets: Tensor, step: Step) -> Tensor:
        """A step by its graph; the first ones are computed as they are, too."""
        graph, gradients = self._graphs[shape], self._gradients
        assert gradients is not None
        gradients.take()
        if not graph.unchecked:
            graph.inputs.fill(batch, num_targets)
            return graph.replay().clone()
        device = batch.input_ids.device
        before, random = gradients.copies(), _random_state(device)
        loss = self.as_it_is(batch, num_targets, step)
        if self._failed:  # no memory for both
            return loss
        expected, after = gradients.copies(), _random_state(device)
        gradients.restore(before)
        _set_random_state(device, random)
        graph.inputs.fill(batch, num_targets)
        again = graph.replay().clone()
        graph.unchecked -= 1
        if are_close(again, loss) and gradients.are_close(expected):
            return again
        gradients.restore(expected)
        _set_random_state(device, after)
        self._give_up("its replay computes something else than the step itself")
        return loss

    def _give_up(self, reason: str) -> None:
        """Capture nothing any more, and say so; gradients stay where they are."""
        self._failed = True
        if self._capture is not None:
            self._capture.wait()
        self._graphs.clear()
        self._gradients = None
        torch.cuda.empty_cache()  # does nothing where there is no GPU
        warnings.warn(
            f"training goes on without CUDA graphs, which makes small models slower: {reason}. "
            "With --optim.graphs false it never tries",
            stacklevel=2,
        )


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_random_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
