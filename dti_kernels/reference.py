"""The specification: attention over streaming prompts, dense and in plain PyTorch.

    context row i:  s = scale * q_i . k_j                                     over visible keys j
    [SUM] row:      s = scale * q . k~_j - slope_h * dist(row, j)  and itself at distance 0
    out = softmax(s) @ v   (v~ for [SUM] rows where there is a reset)

O(T x C) memory and time. Differentiable any number of times, in any dtype: float64 here is what every other path is held to.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dti_kernels.layout import StreamLayout
from dti_kernels.scores import HiddenStateReset
from dti_kernels.windowed_attn import check_types, checked_inputs


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
    """Dense reference of `windowed_attn`, with the same arguments, errors and result. Cost: O(T x C) time and memory."""
    check_types(q, k, v, layout, k_sum, alibi_slopes, reset)
    _, scale = checked_inputs(q, k, v, layout, k_sum, alibi_slopes, reset, scale)
    k_sum = k if k_sum is None else k_sum
    num_context, group = layout.num_context, q.shape[1] // k.shape[1]
    k, v, k_sum = (x.repeat_interleave(group, dim=1).transpose(0, 1) for x in (k, v, k_sum))  # (H, T, D)
    q = q.transpose(0, 1)
    visible = layout.dense_visibility()
    if q.shape[1] == layout.num_sum:
        sums = _sum_rows(q, v, k_sum, layout, visible, alibi_slopes, reset, scale)
        return sums.transpose(0, 1)

    scores = scale * q[:, :num_context] @ k[:, :num_context].mT
    out = _softmax(scores, visible[:num_context]) @ v[:, :num_context]
    sums = _sum_rows(q[:, num_context:], v, k_sum, layout, visible, alibi_slopes, reset, scale)
    return torch.cat([out, sums], 1).transpose(0, 1)


def _sum_rows(
    q_HSD: Tensor,
    v: Tensor,
    k_sum: Tensor,
    layout: StreamLayout,
    visible: Tensor,
    alibi_slopes: Tensor | None,
    reset: HiddenStateReset | None,
    scale: float,
) -> Tensor:
    """`(H, S, D)` from queries `(H, S, D)` and keys and values `(H, T, D)`."""
    num_context = layout.num_context
    ratio: Tensor | float = 0.0
    k_initial, v_initial = k_sum[:, :num_context], v[:, :num_context]
    if reset is not None:
        ratio = reset_ratio(layout, reset, q_HSD.dtype)
        group = q_HSD.shape[0] // reset.k_initial.shape[1]
        k_initial = reset.k_initial.repeat_interleave(group, dim=1).transpose(0, 1)
        v_initial = reset.v_initial.repeat_interleave(group, dim=1).transpose(0, 1)
    s_HSC = scale * ((1 - ratio) * (q_HSD @ k_sum[:, :num_context].mT) + ratio * (q_HSD @ k_initial.mT))
    if alibi_slopes is not None:
        s_HSC = s_HSC - alibi_slopes.to(q_HSD.dtype)[:, None, None] * alibi_distance(layout).to(q_HSD.dtype)
    s_self = scale * (q_HSD * k_sum[:, num_context:]).sum(-1, keepdim=True)
    seen = torch.cat([visible[num_context:], visible.new_ones(layout.num_sum, 1)], 1)
    p_HSC1 = _softmax(torch.cat([s_HSC, s_self], -1), seen)
    p_HSC, p_self = p_HSC1[..., :-1], p_HSC1[..., -1:]
    return (
        ((1 - ratio) * p_HSC) @ v[:, :num_context] + (ratio * p_HSC) @ v_initial + p_self * v[:, num_context:]
    )


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
