"""Passes of scoring as CUDA graphs: a request then costs what the device needs, and not what Python needs to launch a thousand kernels.

A graph launches the same kernels on the same grids, so passes are padded to few shapes (`Bucket`) by rows that nobody reads. All that
differs between two passes of a bucket reaches the model through its `Buffers`: one array of integers and the keys of encoded histories.

    1st pass of a bucket     is computed from new buffers, kernel by kernel
    2nd pass                 is captured, and its buffers are kept
    others                   fill the buffers, and one launch replays all

The first three replays are compared with the pass itself. Every pass of a bucket should give the same bits, whether it is replayed or not
(`tests/model/test_graphs_gpu.py` asks a GPU). Those of a pass without padding differ by rounding, where a matrix product of another shape
is summed in another order.

Weights are read where they lie, so values that are changed in place count. Graphs are dropped where weights have moved or others have taken
their place (`model.to`, another dtype, `load_state_dict(assign=True)`), and where adapters are switched, merged, disabled or scaled. Anything
else that changes what the model computes is for a new scorer: modules that are exchanged, hooks, PyTorch's switches of precision and
determinism.
"""

from __future__ import annotations

import threading
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dti_kernels import StreamLayout, padded_layout
from dti_model.config import DTIConfig
from dti_model.model.attention import is_compiled, layers_of, token_logits
from dti_model.model.capture import Capture, CudaCapture, Forward, Outputs, are_close, reason_of
from dti_model.model.lora import keep_token_indices
from dti_model.model.passes import PackedPass, Passes
from dti_model.model.past import LayerKeys, Past
from dti_model.precision import Resolved, computing

# Rows, and FLOPs in each layer, beyond which a pass keeps the device busy while the host launches it, and padding costs more than it saves.
# On an H200 the host takes 1.2 ms a layer. The rows are those of the default token budget.
MOST_ROWS, MOST_FLOPS = 16384, 2e11
# Graphs that are kept; the least recently used is dropped. Each has its buffers, its outputs and a few MB of its nodes.
MOST_GRAPHS = 32
# Passes of a bucket before one is captured, which takes as long as several of them. A bucket whose graph was dropped needs twice as many as
# the last time, so that more buckets than graphs do not mean a capture for every pass.
_FIRST = 2


def size_of(num_rows: int) -> int:
    """Up to how many rows so many are padded: by less than 16, a quarter up to 512 rows, or an eighth above."""
    last = max(num_rows, 1) - 1
    step = max(16, 1 << max(last.bit_length() - (3 if num_rows <= 512 else 4), 0))
    return (last // step + 1) * step


class Bucket(NamedTuple):
    """All that a launch or a line of Python may depend on, of the passes that share a graph."""

    num_known: int  # context rows whose keys are given; 0: there is no past
    num_given: int  # other context rows
    num_sum: int
    window: int
    reset_window: int
    mean_span: int  # chooses tiles
    records: bool

    @staticmethod
    def of(packed: PackedPass, records: bool) -> Bucket:
        """The bucket of a pass. It has one context row more at least, see `padded_layout`."""
        layout, num_known = packed.layout, int(packed.known.sum())
        return Bucket(
            size_of(num_known) if num_known else 0,
            size_of(layout.num_context - num_known + 1),
            size_of(layout.num_sum),
            layout.window,
            layout.reset_window,
            layout.mean_span,
            records,
        )


class Buffers:
    """What a pass of a bucket reads, on the device: the same tensors in every pass.

    Attributes:
        numbers: all integers, int32; the others are parts of it.
        input_ids: `(T - K,)` of the rows that are computed.
        known: `(K,)` context rows whose keys are given.
        given: `(T - K,)` the other rows, ascending.
        layout: of the padded pass.
        layers: by layer, the keys of the known rows; empty: there are none.
        tokens: whose logits are wanted.
    """

    def __init__(
        self, bucket: Bucket, packed: PackedPass, tokens: Sequence[int], device: torch.device
    ) -> None:
        """Buffers for passes like this one."""
        self._bucket = bucket
        num_context = bucket.num_known + bucket.num_given
        num_rows, num_given = num_context + bucket.num_sum, bucket.num_given + bucket.num_sum
        fields, key_fields = len(packed.layout.rows), len(packed.layout.keys)
        sizes = [num_given, bucket.num_known, num_given, fields * num_rows, key_fields * num_context]
        self.numbers = torch.zeros(sum(sizes), dtype=torch.int32, device=device)
        self.input_ids, self.known, self.given, rows, keys = self.numbers.split(sizes)
        arrays = rows.view(fields, num_rows), keys.view(key_fields, num_context)
        numbers = bucket.window, bucket.reset_window, bucket.mean_span
        self.layout = StreamLayout(*arrays, *numbers, checked=True)
        like = packed.states[0] if bucket.num_known else ()
        self.layers = [layer.mapped(lambda x: x.new_zeros(bucket.num_known, *x.shape[1:])) for layer in like]
        self.tokens = torch.tensor(list(tokens), device=device)

    def fill(self, packed: PackedPass) -> None:
        """Write a pass of the bucket into them, with one copy from the host that does not wait for the device."""
        numbers = torch.from_numpy(self._numbers(packed))
        self.numbers.copy_(numbers.pin_memory() if self.numbers.is_cuda else numbers, non_blocking=True)
        first = 0
        for state in packed.states if self.layers else ():
            stop = first + len(state[0].k)
            _copy(state, [layer.rows(slice(first, stop)) for layer in self.layers])
            first = stop

    def _numbers(self, packed: PackedPass) -> np.ndarray:
        """`numbers` of a pass. Rows of padding get token 0; the first of them count as known."""
        bucket, old = self._bucket, packed.layout.num_context
        layout = padded_layout(packed.layout, bucket.num_known + bucket.num_given, bucket.num_sum)
        is_known = np.zeros(layout.num_rows, bool)
        is_known[:old] = packed.known[:old]
        is_known[old : old + bucket.num_known - int(is_known.sum())] = True
        ids = np.zeros(layout.num_rows, np.int64)
        ids[:old] = packed.input_ids[:old]
        ids[layout.num_context : layout.num_context + packed.layout.num_sum] = packed.input_ids[old:]
        parts = [ids[~is_known], np.flatnonzero(is_known), np.flatnonzero(~is_known)]
        parts += [x.numpy().ravel() for x in (layout.rows, layout.keys)]
        return np.concatenate(parts).astype(np.int32)

    def past(self) -> Past | None:
        """The keys of the known rows."""
        return Past(self.layers, self.known.long(), self.given.long()) if self.layers else None


@dataclass
class _Graph:
    """A bucket's.

    Attributes:
        buffers: that it reads.
        forward: the pass itself over them.
        replay: of that pass.
        unchecked: how many replays are still compared with the pass: the first has the inputs of the capture, the others have not.
    """

    buffers: Buffers
    forward: Forward
    replay: Forward
    unchecked: int = 3


def _copy(source: Sequence[LayerKeys], target: Sequence[LayerKeys]) -> None:
    """Keys of all layers, in a few launches for all of them."""
    into, of = ([x for layer in layers for x in layer if x is not None] for layers in (target, source))
    if into:
        torch._foreach_copy_(into, of)


class GraphedPasses(Passes):
    """Passes that are replayed, from several threads one after the other."""

    def __init__(
        self,
        model: nn.Module,
        config: DTIConfig,
        tokens: Sequence[int],
        precision: Resolved,
        new_capture: Callable[[torch.device], Capture] = CudaCapture,
        most_graphs: int = MOST_GRAPHS,
    ) -> None:
        """Passes of a model; arguments as of `Passes`.

        Args:
            new_capture: makes what captures passes on a device.
            most_graphs: that are kept.
        """
        super().__init__(model, config, tokens, precision)
        keep_token_indices(model)
        self._new_capture, self._most_graphs = new_capture, most_graphs
        self._lock = threading.Lock()
        self._adapters = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
        self._failed, self._kind = False, self.device.type
        layers = layers_of(model)
        self._flops_per_row = 2 * sum(x.numel() for x in layers.parameters()) / len(layers)
        self._start()

    def _start(self) -> None:
        """Begin without graphs, for the model as it is now. (A pool of memory cannot be used again once all its graphs are gone.)"""
        # Where modules hold weights: a parameter that another one has replaced still has its address.
        held = [x for module in self.model.modules() for x in (module._parameters, module._buffers)]
        self._slots = [(weights, name) for weights in held for name in weights]
        self._of_model = self._state_of_model()
        self._capture = self._new_capture(self.device)
        self._graphs: OrderedDict[Bucket, _Graph] = OrderedDict()
        self._seen: Counter[Bucket] = Counter()
        self._needed: dict[Bucket, int] = {}

    def _state_of_model(self) -> Hashable:
        """What graphs depend on beside their buffers: where weights lie, and which adapters are in use."""
        adapters = [
            (x.merged, x.disable_adapters, *x.active_adapters, *getattr(x, "scaling", {}).items())
            for x in self._adapters
        ]
        weights = [held.get(name) for held, name in self._slots]
        return tuple([0 if x is None else x.data_ptr() for x in weights]), tuple(adapters)

    def compute(self, packed: PackedPass, records: bool = False) -> tuple[Tensor, list[LayerKeys]]:
        """As `Passes.compute`, padded, unless there are many rows or FLOPs. A model in training mode, or on a CPU by now, is not padded."""
        computed = packed.layout.num_rows - int(packed.known.sum())
        is_long = packed.layout.num_rows > MOST_ROWS or computed * self._flops_per_row > MOST_FLOPS
        if is_long or self.model.training or self.device.type != self._kind:
            return super().compute(packed, records)
        bucket = Bucket.of(packed, records)
        # Tensors that a caller's inference mode made could not be written outside it.
        with self._lock, torch.inference_mode(False), torch.no_grad():
            if self._state_of_model() != self._of_model:
                self._capture.wait()
                self._start()
            try:
                with self._capture.in_turn():
                    return self._computed(bucket, packed)
            except torch.OutOfMemoryError:  # graphs hold memory that the pass alone would have
                self._capture.wait()
                self._start()
        torch.cuda.empty_cache()
        return super().compute(packed, records)

    def _computed(self, bucket: Bucket, packed: PackedPass) -> tuple[Tensor, list[LayerKeys]]:
        """Copies of the rows of the pass, which the next one does not overwrite."""
        graph = self._graphs.get(bucket)
        if graph is not None:
            self._graphs.move_to_end(bucket)
            graph.buffers.fill(packed)
        else:
            buffers = Buffers(bucket, packed, self._tokens, self.device)
            buffers.fill(packed)
            forward = partial(self._forward, buffers, bucket.records)
            graph = self._captured(bucket, buffers, forward)
        outputs = forward() if graph is None else graph.replay()
        if graph is not None and graph.unchecked:
            eager = graph.forward()
            graph.unchecked -= 1
            if not _agree(outputs, eager, packed):
                self._give_up(RuntimeError("its replay computes something else than the pass itself"))
                outputs = eager
        rows = slice(packed.layout.num_context)
        theirs = [layer.rows(rows) for layer in outputs.recorded]
        recorded = [layer.mapped(torch.empty_like) for layer in theirs]
        _copy(theirs, recorded)
        return outputs.logits[: packed.layout.num_sum].clone(), recorded

    def _forward(self, buffers: Buffers, records: bool) -> Outputs:
        """The model's pass over buffers: what is captured. It knows nothing of the request."""
        recorded: list[LayerKeys] | None = [] if records else None
        # Without autocast's cache: what a capture computes lies in its pool, and no other pass may find it.
        with computing(self._precision, self.device, cached=False):
            logits = token_logits(
                self.model,
                buffers.input_ids.long(),
                buffers.layout,
                self._config,
                buffers.tokens,
                past=buffers.past(),
                recorded=recorded,
            )
        return Outputs(logits, recorded or [])

    def _captured(self, bucket: Bucket, buffers: Buffers, forward: Forward) -> _Graph | None:
        """The graph of a bucket that has been met often enough; None: compute this pass as it is."""
        self._seen[bucket] += 1
        if self._failed or self._seen[bucket] < self._needed.get(bucket, _FIRST):
            return None
        try:
            replay = self._capture.capture(forward)
        except Exception as error:  # of PyTorch, the driver, or a module of the model that reads the device
            self._give_up(error)
            return None
        graph = self._graphs[bucket] = _Graph(buffers, forward, replay)
        if len(self._graphs) > self._most_graphs:
            self._capture.wait()
            dropped, _ = self._graphs.popitem(last=False)
            self._needed[dropped], self._seen[dropped] = 2 * self._needed.get(dropped, _FIRST), 0
        return graph

    def _give_up(self, error: BaseException) -> None:
        """Capture nothing any more, and say so once."""
        self._failed = True
        self._capture.wait()
        self._graphs.clear()
        warnings.warn(
            f"scoring goes on without CUDA graphs, which makes requests slower: a pass could not be captured "
            f"({reason_of(error)}). Scorer(..., graphs=False) never tries.",
            stacklevel=2,
        )


def _agree(outputs: Outputs, eager: Outputs, packed: PackedPass) -> bool:
    """Whether a replay is right in the rows of a pass: its logits, and the keys of each layer."""
    pairs = [(outputs.logits[: packed.layout.num_sum], eager.logits[: packed.layout.num_sum])]
    for layers in zip(outputs.recorded, eager.recorded, strict=True):
        ours, theirs = (layer.rows(slice(packed.layout.num_context)) for layer in layers)
        pairs += [(x, y) for x, y in zip(ours, theirs) if x is not None and y is not None]
    return all(are_close(x, y) for x, y in pairs)


def can_be_graphed(model: Any) -> bool:
    """Whether passes of a model may be captured: on one GPU, with plain weights, and not compiled, which launches graphs of its own."""
    tensors = [*model.parameters(), *model.buffers()]
    return (
        {x.device.type for x in tensors} == {"cuda"}
        and len({x.device for x in tensors}) == 1
        and not any(isinstance(x, DTensor) for x in tensors)
        and all(x.is_floating_point() for x in model.parameters())
        and getattr(model, "quantization_method", None) is None
        and not any(is_compiled(module) for module in model.modules())
    )


def passes_of(
    model: nn.Module, config: DTIConfig, tokens: Sequence[int], precision: Resolved, graphs: bool
) -> Passes:
    """Passes of a model, through CUDA graphs where they are wanted and possible; other arguments as of `Passes`."""
    kind = GraphedPasses if graphs and can_be_graphed(model) else Passes
    return kind(model, config, tokens, precision)
