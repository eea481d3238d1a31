"""The specification: attention over streaming prompts, dense and in plain PyTorch.

    context row i:  s = scale * q_i . k_j                                     over visible keys j
    [SUM] row:      s = scale * q . k~_j - slope_h * dist(row, j)  and itself at distance 0
    out = softmax(s) @ v   (v~ for [SUM] rows where there is a reset)

O(T x C) memory and time. Differentiable any number of times, in any dtype: float64 here is what every other path is held to.
A key that a row does not see is not multiplied: where an input is not finite, rows are computed one after the other from the keys they
see. If only the gradient of the output is not finite, it reaches other rows' keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dti_kernels.contract import checked_inputs
from dti_kernels.inputs import Inputs
from dti_kernels.layout import StreamLayout
from dti_kernels.reset import HiddenStateReset


def windowed_attn_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: StreamLayout,
    k_sum: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    reset: HiddenStateReset | None = None,
    scale: float | None = None,
) -> Tensor:
    """Dense reference of `windowed_attn`, with the same arguments, errors and result. Cost: O(T x C) time and memory; many times that where an
    input is not finite."""
    tensors = {"q": q, "k": k, "v": v, "k_sum": k_sum, "alibi_slopes": alibi_slopes}
    inputs = checked_inputs(tensors, layout, reset, scale)
    x = _Dense.of(inputs, layout, reset)
    first = inputs.num_skipped
    if all(tensor.isfinite().all() for tensor in inputs[:6] if tensor is not None):
        rows = [torch.arange(first, layout.num_context), torch.arange(layout.num_context, layout.num_rows)]
        keys = [torch.arange(layout.num_context)] * 2
    else:
        rows = list(torch.arange(first, layout.num_rows)[:, None])
        keys = [seen.nonzero()[:, 0] for seen in x.visible[first:]]
    parts = [x.attend(of.to(q.device), to.to(q.device)) for of, to in zip(rows, keys) if len(of)]
    return torch.cat([q.transpose(0, 1)[:, :0], *parts], 1).transpose(0, 1)


@dataclass(frozen=True)
class _Dense:
    """The inputs with a key head for every query head: `q (H, T or S, D)`, `k, v, k_sum (H, T, D)`, initial states `(H, C, D)`;
    `visible (T, C)`, `distance, ratio (S, C)`."""

    q: Tensor
    k: Tensor
    v: Tensor
    k_sum: Tensor
    k_initial: Tensor | None
    v_initial: Tensor | None
    slopes: Tensor | None
    visible: Tensor
    distance: Tensor
    ratio: Tensor | None
    scale: float

    @staticmethod
    def of(x: Inputs, layout: StreamLayout, reset: HiddenStateReset | None) -> _Dense:
        def heads(z: Tensor) -> Tensor:
            return z.repeat_interleave(x.q.shape[1] // z.shape[1], dim=1).transpose(0, 1)

        return _Dense(
            q=heads(x.q),
            k=heads(x.k),
            v=heads(x.v),
            k_sum=heads(x.k if x.k_sum is None else x.k_sum),
            k_initial=None if x.k_initial is None else heads(x.k_initial),
            v_initial=None if x.v_initial is None else heads(x.v_initial),
            slopes=None if x.slopes is None else x.slopes.to(x.q.dtype)[:, None, None],
            visible=layout.dense_visibility(),
            distance=alibi_distance(layout).to(x.q.dtype),
            ratio=None if reset is None else reset_ratio(layout, reset, x.q.dtype),
            scale=x.scale,
        )

    def attend(self, rows: Tensor, keys: Tensor) -> Tensor:
        """`(H, len(rows), D)`: what rows, all of context tokens or all [SUM] rows, read of some context keys."""
        num_rows, num_context = self.visible.shape
        q = self.q[:, rows - (num_rows - self.q.shape[1])]
        visible, v = self.visible[rows][:, keys], self.v[:, keys]
        if rows[0] < num_context:
            return _softmax(self.scale * q @ self.k[:, keys].mT, visible) @ v
        of_sums = rows - num_context
        s, ratio = q @ self.k_sum[:, keys].mT, None
        if self.ratio is not None and self.k_initial is not None:
            ratio = self.ratio[of_sums][:, keys]
            s = (1 - ratio) * s + ratio * (q @ self.k_initial[:, keys].mT)
        s = self.scale * s
        if self.slopes is not None:
            s = s - self.slopes * self.distance[of_sums][:, keys]
        s_own = self.scale * (q * self.k_sum[:, rows]).sum(-1, keepdim=True)
        p = _softmax(torch.cat([s, s_own], -1), torch.cat([visible, visible.new_ones(len(rows), 1)], 1))
        p, p_own = p[..., :-1], p[..., -1:]
        own = p_own * self.v[:, rows]
        if ratio is None or self.v_initial is None:
            return p @ v + own
        return ((1 - ratio) * p) @ v + (ratio * p) @ self.v_initial[:, keys] + own


def alibi_distance(layout: StreamLayout) -> Tensor:
    """`(S, C)` int64, tokens from a [SUM] back to a key; a prefix key outside the span sits right before it."""
    num_context = layout.num_context
    start, stop, prefix_stop = (
        x[num_context:, None].long() for x in (layout.start, layout.stop, layout.prefix_stop)
    )
    key = torch.arange(num_context, device=layout.device)
    return torch.where(key < prefix_stop, (stop - start) + (prefix_stop - key), stop - key)


def reset_ratio(layout: StreamLayout, reset: HiddenStateReset, dtype: torch.dtype) -> Tensor:
    """`(S, C)`: how much of the initial state each [SUM] reads of each key, 0 at distance <= 0."""
    ratios = reset.ratios(layout.reset_window, dtype, layout.device, farthest=layout.num_context)
    num_context = layout.num_context
    reset_id = layout.reset_id
    distance = reset_id[num_context:, None] - reset_id[None, :num_context]
    return ratios[distance.clamp(0, len(ratios) - 1).long()]


def _softmax(scores: Tensor, visible: Tensor) -> Tensor:
    return torch.softmax(scores.masked_fill(~visible, float("-inf")), -1)
