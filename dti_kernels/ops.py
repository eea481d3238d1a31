"""Operator schemas, shapes without data, and which implementation runs on which device.

`dti::windowed_attn_fwd` and `dti::windowed_attn_bwd` take tensors only, so that they trace, compile and checkpoint like any
other operator. CPU tensors run `cpu.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dti_kernels import cpu

_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor k_sum, Tensor? k_initial, Tensor? v_initial, Tensor? ratios, Tensor? slopes, "
    "Tensor rows, Tensor keys"
)
_LIBRARY = torch.library.Library("dti", "DEF")
_LIBRARY.define(f"windowed_attn_fwd({_INPUTS}, float scale) -> (Tensor out, Tensor lse)")
_LIBRARY.define(
    f"windowed_attn_bwd(Tensor grad_out, {_INPUTS}, Tensor out, Tensor lse, float scale) -> "
    "(Tensor dq, Tensor dk, Tensor dv, Tensor dk_sum, Tensor dk_initial, Tensor dv_initial, Tensor dslopes)"
)
_LIBRARY.impl("windowed_attn_fwd", cpu.forward, "CPU")
_LIBRARY.impl("windowed_attn_bwd", cpu.backward, "CPU")

accumulation_dtype = cpu.accumulation_dtype


@torch.library.register_fake("dti::windowed_attn_fwd", lib=_LIBRARY)
def _fwd_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_sum: Tensor,
    k_initial: Tensor | None,
    v_initial: Tensor | None,
    ratios: Tensor | None,
    slopes: Tensor | None,
    rows: Tensor,
    keys: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=accumulation_dtype(q.dtype))


@torch.library.register_fake("dti::windowed_attn_bwd", lib=_LIBRARY)
def _bwd_fake(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_sum: Tensor,
    k_initial: Tensor | None,
    v_initial: Tensor | None,
    ratios: Tensor | None,
    slopes: Tensor | None,
    rows: Tensor,
    keys: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    def like(x: Tensor | None) -> Tensor:
        return q.new_empty(0) if x is None else x.new_empty(x.shape)

    return like(q), like(k), like(v), like(k_sum), like(k_initial), like(v_initial), like(slopes)
