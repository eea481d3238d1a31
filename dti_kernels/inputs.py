"""The operators' inputs and gradients, stated once: schemas, fakes and the C struct are made from these fields."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Inputs(NamedTuple):
    """What both operators take, in the order of their schemas. T rows of which C are context and S are [SUM]; H query heads, G key heads."""

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


class Gradients(NamedTuple):
    """Gradients of the inputs that have one, each of its input's shape and dtype; empty where the input is None."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dk_sum: Tensor
    dk_initial: Tensor
    dv_initial: Tensor
    dslopes: Tensor  # empty too where nobody asked for it
