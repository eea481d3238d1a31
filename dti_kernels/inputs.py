"""The operators' inputs and gradients, stated once: schemas, fakes, checks and the C struct follow these fields."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class Inputs(NamedTuple):
    """Inputs of both operators in the order of their schemas: T rows, C of them context, S of them [SUM]; H query heads, G key heads."""

    q: Tensor  # (T, H, D), or the [SUM] rows only: (S, H, D)
    k: Tensor  # (T, G, D), as v
    v: Tensor
    k_sum: Tensor | None  # (T, G, D), the keys that [SUM] rows read; None: k
    k_initial: Tensor | None  # (C, G, D), as v_initial: the reset's initial states; None: no reset
    v_initial: Tensor | None
    ratios: Tensor | None  # (n + 1,), the reset's ratio at each distance in interactions
    slopes: Tensor | None  # (H,), ALiBi; None: no ALiBi
    rows: Tensor  # (fields, T) int32, `StreamLayout.rows`
    keys: Tensor  # (fields, C) int32, `StreamLayout.keys`
    scale: float
    mean_span: int

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """All but the numbers, in order."""
        tensors: tuple[Any, ...] = self[:NUM_TENSORS]
        return tensors

    def of_tensors(self, tensors: tuple[Any, ...]) -> Inputs:
        """The same numbers with other tensors, in order."""
        return Inputs._make((*tensors, *self[NUM_TENSORS:]))

    @property
    def num_context(self) -> int:
        """`C`."""
        return self.keys.shape[1]

    @property
    def num_skipped(self) -> int:
        """Rows that have no query: 0, or C where q holds the [SUM] rows only."""
        return self.rows.shape[1] - self.q.shape[0]

    def differentiable(self, slopes_grad: bool) -> list[Tensor | None]:
        """The inputs that get a gradient, in the order of `Gradients`; None for slopes whose gradient nobody asks for."""
        x = self if slopes_grad else self._replace(slopes=None)
        return [getattr(x, name[1:]) for name in Gradients._fields]


NUM_TENSORS = Inputs._fields.index("scale")  # they come before the numbers


class Gradients(NamedTuple):
    """Gradients of the inputs that have one, each of its input's shape and dtype; empty where the input is None."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dk_sum: Tensor
    dk_initial: Tensor
    dv_initial: Tensor
    dslopes: Tensor  # empty too where nobody asked for it
