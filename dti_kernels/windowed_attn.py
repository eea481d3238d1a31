"""`windowed_attn`: the operator's contract, its checks and its gradient.

    context row:  s_j = scale q . k_j                                  over the visible context keys j of the row
    [SUM] row:    s_j = scale q . k~_j - slope_h dist(row, j)          and itself at distance 0
    out = sum_j softmax(s)_j v~_j

O(T x (window + tile)) time and O(T) memory; the backward recomputes probabilities and keeps none.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dti_kernels import ops
from dti_kernels.layout import StreamLayout
from dti_kernels.scores import HiddenStateReset

_AUTOCAST_FROM = (torch.float16, torch.bfloat16, torch.float32)


def windowed_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: StreamLayout,
    k_sum: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    reset: HiddenStateReset | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention over a packed batch of streaming prompts.

    Context rows see the context keys of their own window (plus the prefix), causally. A [SUM] row sees the item text of its
    target, the n interactions before it, the prefix and itself, and nobody sees a [SUM]. `windowed_attn_reference` is the same
    function written densely. Gradients flow to q, k, v, k_sum, alibi_slopes and the reset's initial states, once (double
    backward raises and names the reference).

    Args:
        q: `(T, H, D)` queries, context rows first, then [SUM] rows; float16, bfloat16, float32 or float64 (GPU: not float64).
            Or the [SUM] rows only, `(S, H, D)`: what a last decoder layer needs, at the cost of those rows only.
        k: `(T, G, D)` keys, H a multiple of G; query head h reads key head h * G // H.
        v: `(T, G, D)` values.
        layout: which rows exist and what each sees.
        k_sum: `(T, G, D)` keys that [SUM] rows read (un-rotated, where k carries rotary positions); default k.
        alibi_slopes: `(H,)` floating point, subtracted per token of distance from the scores of [SUM] rows; None: no ALiBi.
        reset: blends what [SUM] rows read of far context back to initial states; None: no reset.
        scale: of the dot products; default `D ** -0.5`.

    A number that is not finite makes the rows that may see it NaN, or what IEEE arithmetic makes of it, and changes no other: their results
    stay bitwise on CPUs, within rounding on GPUs. So do gradients, of rows and of the keys that only such rows see.

    Under autocast, inputs are cast to its dtype as for any other attention.

    Returns:
        Shape and dtype of q. Softmax and accumulation run in float32 (float64 for float64 inputs).

    Raises:
        TypeError: an argument is no tensor, or dtypes differ or are unsupported.
        ValueError: a shape or device does not fit the layout, or scale is negative or not finite; the message gives what it
            must be and what it was.

    Cost: O(T x (window + tile) x H x D) time, O(T) memory. Deterministic: two runs are bitwise equal, on a CPU with any number
    of threads (in PyTorch's implementation, which computes where there is no compiler: with as many).
    """
    if isinstance(q, Tensor) and torch.is_autocast_enabled(q.device.type):
        q, k, v, k_sum, reset = _autocast(q.device.type, q, k, v, k_sum, reset)
    check_arguments(q, k, v, layout, k_sum, alibi_slopes, reset)
    if scale is not None and not (0.0 <= scale < float("inf")):
        raise ValueError(f"scale must be finite and >= 0, got {scale}")
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    ratios = k_initial = v_initial = None
    if reset is not None:
        k_initial, v_initial = reset.k_initial, reset.v_initial
        ratios = reset.ratios(
            layout.reset_window, ops.accumulation_dtype(q.dtype), q.device, farthest=layout.num_context
        )
    out: Tensor = _WindowedAttn.apply(
        q,
        k,
        v,
        k_sum,
        k_initial,
        v_initial,
        ratios,
        alibi_slopes,
        layout.rows,
        layout.keys,
        scale,
        layout.mean_span,
    )
    return out


def _autocast(
    device_type: str, q: Tensor, k: Tensor, v: Tensor, k_sum: Tensor | None, reset: HiddenStateReset | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, HiddenStateReset | None]:
    """What autocast does to the inputs of attention: the matmuls' dtype, float64 left alone. Slopes stay as they are."""
    dtype = torch.get_autocast_dtype(device_type)

    def cast(x: Any) -> Any:
        return x.to(dtype) if isinstance(x, Tensor) and x.dtype in _AUTOCAST_FROM else x

    if reset is not None:
        reset = replace(reset, k_initial=cast(reset.k_initial), v_initial=cast(reset.v_initial))
    return cast(q), cast(k), cast(v), cast(k_sum), reset


# Place of the slopes among the operator's inputs. Their gradient is left out where nobody asks: on CPUs it costs a second path.
_SLOPES = 7


class _WindowedAttn(torch.autograd.Function):
    """Ties the forward and backward operators together."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        *tensors, scale, mean_span = args
        out, lse = torch.ops.dti.windowed_attn_fwd(*tensors, scale, mean_span)
        ctx.save_for_backward(*tensors, out, lse)
        ctx.scale, ctx.mean_span = scale, mean_span
        return out  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # read once: activation checkpointing refuses a second unpacking
        slopes_grad = ctx.needs_input_grad[_SLOPES]
        grads = _WindowedAttnGrad.apply(grad_out, *saved, ctx.scale, ctx.mean_span, slopes_grad)
        # ratios, rows, keys and the numbers take no gradient.
        dq, dk, dv, dk_sum, dk_initial, dv_initial, dslopes = grads
        inputs = (dq, dk, dv, dk_sum, dk_initial, dv_initial, None, dslopes)
        return (*(g if x is not None else None for g, x in zip(inputs, saved)), None, None, None, None)


class _WindowedAttnGrad(torch.autograd.Function):
    """The backward operator; differentiating it again is refused with the way out."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        grads: tuple[Tensor, ...] = torch.ops.dti.windowed_attn_bwd(*args)
        return grads

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        raise NotImplementedError(
            "windowed_attn has no second derivative: its backward is a fused kernel. "
            "Use windowed_attn_reference where you need double backward (create_graph=True)."
        )


def check_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: StreamLayout,
    k_sum: Tensor | None,
    alibi_slopes: Tensor | None,
    reset: HiddenStateReset | None,
) -> None:
    """Raise TypeError or ValueError unless shapes, dtypes and devices fit each other and the layout. Reads no values."""
    if not isinstance(layout, StreamLayout):
        raise TypeError(f"layout must be a StreamLayout, got {type(layout).__name__}")
    named = {"q": q, "k": k, "v": v}
    if k_sum is not None:
        named["k_sum"] = k_sum
    if reset is not None:
        named |= {"reset.k_initial": reset.k_initial, "reset.v_initial": reset.v_initial}
    for name, x in named.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(x).__name__}")
        if x.ndim != 3:
            raise ValueError(f"{name} must be (rows, heads, head_dim), got shape {tuple(x.shape)}")
        if x.dtype != q.dtype or not x.is_floating_point():
            raise TypeError(f"{name} must have q's floating point dtype ({q.dtype}), got {x.dtype}")
        if x.device != layout.device:
            raise ValueError(f"{name} is on {x.device}, the layout on {layout.device}: use layout.to(...)")
    _, num_heads, head_dim = q.shape
    num_groups = k.shape[1]
    if num_groups < 1 or num_heads % num_groups:
        raise ValueError(f"q's heads must be a multiple of k's heads, got {num_heads} and {num_groups}")
    for name, x in named.items():
        num_rows = layout.num_context if name.startswith("reset") else layout.num_rows
        if name == "q" and q.shape[0] == layout.num_sum:
            num_rows = layout.num_sum
        expected = (num_rows, num_heads if name == "q" else num_groups, head_dim)
        if tuple(x.shape) != expected:
            raise ValueError(
                f"{name} must have shape {expected} for this layout (T = {layout.num_rows}, "
                f"C = {layout.num_context}), got {tuple(x.shape)}"
            )
    if alibi_slopes is not None and (
        not alibi_slopes.is_floating_point() or tuple(alibi_slopes.shape) != (num_heads,)
    ):
        raise ValueError(
            f"alibi_slopes must be floating point of shape ({num_heads},), "
            f"got {alibi_slopes.dtype} of shape {tuple(alibi_slopes.shape)}"
        )
