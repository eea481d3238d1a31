"""Training steps as CUDA graphs: forward, loss and backward cost what the device needs, and not what Python needs to launch them.

A step of a small language model is some three thousand kernels, which the host launches more slowly than a GPU computes them. A graph
launches the same kernels on the same grids, so batches are padded to few shapes (`padded_batch`) by rows that nobody reads and whose
gradients are zero. A step has the same bits whether it is replayed or not, so a run that goes on after a checkpoint ends as an unbroken one
does.

    1st batch of a shape     is computed kernel by kernel
    2nd batch                too, then its step is captured and replayed, and the gradients are compared
    others                   one launch each

Gradients are accumulated in tensors that stay where they are. The clipping and the optimizer stay outside.
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

from dti_kernels import StreamLayout, padded_layout
from dti_model.model import Capture, CudaCapture, keep_token_indices
from dti_model.prompts import StreamBatch

# FLOPs of a step in each layer, beyond which a GPU takes longer than its host, and batches stay as they are. On an H200 SmolLM2-135M's steps
# have 4e11 and take a third of what their host takes; two layers of Llama-3.1-8B have 1e13, and a graph makes them 4 % slower.
MOST_FLOPS = 1e12
# The label of a [SUM] that stands for no target.
NO_LABEL = -1
# Graphs that are kept, of the shapes that came first; each has its nodes, and the memory between inputs and gradients is theirs together.
MOST_GRAPHS = 24
# Batches of a shape before its step is captured, which takes as long as a few steps.
_FIRST = 2

# Loss of a batch, with its gradients added to those of the parameters: from the batch, and the number of targets of the optimizer step.
Step = Callable[[StreamBatch, Tensor], Tensor]


def padded_batch(batch: StreamBatch) -> StreamBatch:
    """The batch in one of few shapes: up to a thirty-second more context rows, and up to an eighth more [SUM] rows, of label `NO_LABEL`.

    Args:
        batch: on the CPU.
    """
    layout = batch.layout
    num_context, num_sum = _rounded(layout.num_context + 1, 32), _rounded(layout.num_sum, 8)
    more = num_context - layout.num_context, num_sum - layout.num_sum
    context, sums = batch.input_ids.split([layout.num_context, layout.num_sum])
    ids = torch.cat([F.pad(context, (0, more[0])), F.pad(sums, (0, more[1]))])
    labels = F.pad(batch.labels, (0, more[1]), value=NO_LABEL)
    return StreamBatch(ids, padded_layout(layout, num_context, num_sum), labels, batch.targets)


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
    """A shape's: what it reads, and the launch, which returns the loss."""

    inputs: _Inputs
    replay: Callable[[], Tensor]


class _Gradients:
    """Tensors that parameters have their gradients in, from step to step, though optimizers let go of them in between."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        """Those of the parameters that have a gradient now: others have no part in the loss, and the optimizer is to leave them alone."""
        self._parameters = [x for x in parameters if x.grad is not None]
        self._tensors = [torch.empty_like(x) for x in self._parameters]

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

    def norms(self) -> Tensor:
        """`(parameters,)` of each, on the device."""
        return torch.stack([x.float() for x in torch._foreach_norm(self._tensors)])


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
        self._failed = False

    @property
    def num_graphs(self) -> int:
        """Shapes whose steps are replayed."""
        return len(self._graphs)

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
        graph = self._graphs.get(shape)
        with self._capture.in_turn():
            if graph is not None and self._gradients is not None:
                self._gradients.take()
                graph.inputs.fill(batch, num_targets)
                return graph.replay().clone()
            if self._may_be_captured(shape):
                return self._captured(shape, batch, num_targets, step)
            return self._eager(batch, num_targets, step)

    def _eager(self, batch: StreamBatch, num_targets: Tensor, step: Step) -> Tensor:
        """A step as it is; without graphs from then on where the memory does not suffice for both."""
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
        self._give_up("memory does not suffice for graphs and for batches of other shapes")
        return step(batch, num_targets)

    def _may_be_captured(self, shape: _Shape) -> bool:
        """In the first batch of an optimizer step: a capture needs gradients of its own."""
        return (
            not self._failed
            and self._seen[shape] >= _FIRST
            and len(self._graphs) < self._most_graphs
            and self._gradients is not None
            and self._gradients.are_new()
        )

    def _captured(self, shape: _Shape, batch: StreamBatch, num_targets: Tensor, step: Step) -> Tensor:
        """Compute the step, capture it, and compute it again by its first replay; the result is one of the two, which should be equal."""
        device = batch.input_ids.device
        random = _random_state(device)
        loss = self._eager(batch, num_targets, step)
        capture, gradients = self._capture, self._gradients
        if capture is None or gradients is None:  # no memory
            return loss
        norms = gradients.norms()
        inputs = _Inputs(batch, num_targets)
        reason = "its replay computes something else than the step itself"
        try:
            replay = capture.capture(partial(step, inputs.batch, inputs.num_targets))
            gradients.forget()  # what the capture's own run has added
            gradients.take()
            _set_random_state(device, random)
            again = replay().clone()
            if _are_close(again, loss) and _are_close(gradients.norms(), norms):
                self._graphs[shape] = _Graph(inputs, replay)
                return again
        except Exception as error:  # of PyTorch, the driver, or a module of the model that reads the device
            cause = error.__context__ or error  # the end of a capture that failed fails too
            reason = f"{type(cause).__name__}: {' '.join(str(cause).split())[:200]}"
        self._give_up(reason)
        _set_random_state(device, random)
        return step(batch, num_targets)

    def _give_up(self, reason: str) -> None:
        """Capture nothing any more, and say so; the gradients are gone."""
        self._failed = True
        if self._capture is not None:
            self._capture.wait()
        self._graphs.clear()
        if self._gradients is not None:
            self._gradients.forget()
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


def _are_close(actual: Tensor, expected: Tensor) -> bool:
    """Within 2 %, or a thousandth of the largest: libraries may multiply in another order in a capture."""
    bound = 0.001 * float(expected.nan_to_num(0.0, 0.0, 0.0).abs().max())
    return torch.allclose(actual, expected, rtol=0.02, atol=bound, equal_nan=True)
