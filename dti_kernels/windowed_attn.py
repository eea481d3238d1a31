"""`windowed_attn`: the operator's contract, its checks and its gradient.

    context row:  s_j = scale q . k_j                                  over the visible context keys j of the row
    [SUM] row:    s_j = scale q . k~_j - slope_h dist(row, j)          and itself at distance 0
    out = sum_j softmax(s)_j v~_j

O(T x (window + tile)) time and O(T) memory; the backward recomputes probabilities and keeps none.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dti_kernels import ops  # noqa: F401  registers the operators
from dti_kernels.contract import accumulation_dtype, check_inputs, check_tensors
from dti_kernels.counts import shown
from dti_kernels.fixes import HiddenStateReset, real
from dti_kernels.layout import StreamLayout

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
        TypeError: an argument is of another type than the signature's, a tensor sparse or nested, or dtypes differ or are unsupported.
        ValueError: a shape or device does not fit the layout, there are no heads or head_dim is 0, or scale is negative or not
            finite; the message gives what it must be and what it was. Values of tensors are not read: slopes may be any numbers.

    Cost: O(T x (window + tile) x H x D) time, O(T) memory. Deterministic: two runs are bitwise equal, on a CPU with any number
    of threads (in PyTorch's implementation, which computes where there is no compiler: with as many).
    """
    check_types(q, k, v, layout, k_sum, alibi_slopes, reset)
    if not q.is_meta and torch.is_autocast_enabled(q.device.type):
        q, k, v, k_sum, reset = _autocast(q.device.type, q, k, v, k_sum, reset)
    inputs, scale = checked_inputs(q, k, v, layout, k_sum, alibi_slopes, reset, scale)
    out: Tensor = _WindowedAttn.apply(*inputs, scale, layout.mean_span)
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


def check_types(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: StreamLayout,
    k_sum: Tensor | None,
    alibi_slopes: Tensor | None,
    reset: HiddenStateReset | None,
) -> None:
    """Raise TypeError unless everything is what the signature says."""
    if not isinstance(layout, StreamLayout):
        raise TypeError(f"layout must be a StreamLayout, got {type(layout).__name__}")
    named: dict[str, object] = {"q": q, "k": k, "v": v}
    if k_sum is not None:
        named["k_sum"] = k_sum
    if alibi_slopes is not None:
        named["alibi_slopes"] = alibi_slopes
    if reset is not None:
        if not isinstance(reset, HiddenStateReset):
            raise TypeError(f"reset must be a HiddenStateReset, got {type(reset).__name__}")
        named["reset.k_initial"], named["reset.v_initial"] = reset.k_initial, reset.v_initial
    check_tensors(named)


def checked_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: StreamLayout,
    k_sum: Tensor | None,
    alibi_slopes: Tensor | None,
    reset: HiddenStateReset | None,
    scale: float | None,
) -> tuple[tuple[Tensor | None, ...], float]:
    """The operators' tensors and the scale.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not fit each other and the layout, or the scale is no number from 0 on.
            No values are read.
    """
    ratios = k_initial = v_initial = None
    if reset is not None:
        k_initial, v_initial = reset.k_initial, reset.v_initial
        ratios = reset.ratios(
            layout.reset_window, accumulation_dtype(q.dtype), layout.device, farthest=layout.num_context
        )
    inputs = (q, k, v, k_sum, k_initial, v_initial, ratios, alibi_slopes, layout.rows, layout.keys)
    check_inputs(*inputs)
    if scale is None:
        return inputs, q.shape[2] ** -0.5
    number = real("scale", scale)
    if not 0.0 <= number < math.inf:
        raise ValueError(f"scale must be finite and >= 0, got {shown(scale)}")
    return inputs, number
