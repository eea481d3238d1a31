"""The cache of an earlier pass: keys and values of context rows, so that only new rows run through the model.

Keys are kept before rotation: one copy serves [SUM] rows, which read them as they are, and context rows, which rotate them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dti_kernels import StreamLayout


class LayerKeys(NamedTuple):
    """Keys and values of one layer before rotation, `(rows, G, D)` each; the initial ones if the layer resets."""

    k: Tensor
    v: Tensor
    k_initial: Tensor | None = None
    v_initial: Tensor | None = None

    def rows(self, rows: slice) -> LayerKeys:
        """Some rows: views."""
        return self.mapped(lambda x: x[rows])

    def mapped(self, function: Callable[[Tensor], Tensor]) -> LayerKeys:
        """What a function makes of each."""
        initial = (None if x is None else function(x) for x in self[2:])
        return LayerKeys(function(self.k), function(self.v), *initial)

    @property
    def num_bytes(self) -> int:
        """Bytes of all four."""
        return sum(x.numel() * x.element_size() for x in self if x is not None)


@dataclass(frozen=True, eq=False)
class Past:
    """Context rows whose keys are known: the model is given the other rows only, and positions of all.

    Attributes:
        layers: per layer, the keys of the known rows.
        known: `(K,)` int64, which context rows of the layout they are.
        given: `(T - K,)` int64, the other rows, ascending.
    """

    layers: Sequence[LayerKeys]
    known: Tensor
    given: Tensor

    def merge(self, layer: int, keys: LayerKeys, layout: StreamLayout) -> LayerKeys:
        """Keys of all rows (initial ones: of all context rows) from those of the given rows."""
        merged = []
        num_rows = (layout.num_rows,) * 2 + (layout.num_context,) * 2
        for known, given, rows in zip(self.layers[layer], keys, num_rows):
            if known is not None and given is not None:
                full = self.spread(given, rows)
                full[self.known] = known
                merged.append(full)
        return LayerKeys(*merged)

    def spread(self, x: Tensor, num_rows: int) -> Tensor:
        """`(given rows, ...)` to `(num_rows, ...)`, zeros in the known rows."""
        full = x.new_zeros(num_rows, *x.shape[1:])
        full[self.given[: len(x)]] = x
        return full


def concatenated(states: Sequence[Sequence[LayerKeys]]) -> list[LayerKeys]:
    """Per layer, the rows of several states one after the other."""

    def joined(parts: tuple[Tensor, ...]) -> Tensor:
        return torch.cat(parts)

    return [
        LayerKeys(*(joined(parts) for parts in zip(*of_layer) if parts[0] is not None))
        for of_layer in zip(*states)
    ]
