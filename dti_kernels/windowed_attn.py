"""`windowed_attn`: the operator's contract and its gradient.

    context row:  s_j = scale q . k_j                                  over the visible context keys j of the row
    [SUM] row:    s_j = scale q . k~_j - slope_h dist(row, j)          and itself at distance 0
    out = sum_j softmax(s)_j v~_j

O(T x (window + tile)) time and O(T) memory; the backward recomputes probabilities and keeps none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dti_kernels import ops  # noqa: F401  registers the operators
from dti_kernels.contract import checked_inputs
from dti_kernels.inputs import Gradients, Inputs
from dti_kernels.layout import StreamLayout
from dti_kernels.reset import HiddenStateReset


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
            Or the [SUM] rows only, `(S, H, D)`: a last decoder layer needs no others, and they alone cost time.
        k: `(T, G, D)` keys, H a multiple of G; query head h reads key head h * G // H.
        v: `(T, G, D)` values.
        layout: which rows exist and what each sees.
        k_sum: `(T, G, D)` keys that [SUM] rows read (un-rotated, where k carries rotary positions); default k.
        alibi_slopes: `(H,)` floating point, subtracted per token of distance from the scores of [SUM] rows; None: no ALiBi.
        reset: blends what [SUM] rows read of far context back to initial states; None: no reset.
        scale: of the dot products; default `D ** -0.5`.

    A number that is not finite reaches the rows that may see it, which become NaN or the result of IEEE arithmetic, and no other: the
    others stay bitwise equal on CPUs, and within rounding on GPUs. Gradients change only for such rows and for the keys that they see.

    Under autocast, inputs are cast to its dtype as for any other attention.

    Returns:
        Shape and dtype of q. Softmax and accumulation run in float32 (float64 for float64 inputs). GPUs round probabilities and score
        gradients to 16 bits before products, and so do CPUs that multiply bfloat16 themselves; other CPUs compute 16 bits in float32.

    Raises:
        TypeError: an argument is of another type than the signature's, a tensor sparse or nested, or dtypes differ or are unsupported.
        ValueError: a shape or device does not fit the layout, there are no heads or head_dim is 0, or scale is negative or not
            finite; the message gives what it must be and what it was. Values of tensors are not read: slopes may be any numbers.

    Cost: O(T x (window + tile) x H x D) time, O(T) memory. Deterministic: two runs are bitwise equal. The number of CPU threads does not
    matter, except in the PyTorch implementation, which serves where there is no compiler.
    """
    tensors = {"q": q, "k": k, "v": v, "k_sum": k_sum, "alibi_slopes": alibi_slopes}
    x = checked_inputs(tensors, layout, reset, scale, autocast=True)
    out: Tensor = _WindowedAttn.apply(*x) if _recorded() else _forward(*x)[0]
    return out


_SLOPES = Inputs._fields.index("slopes")
# Which of the gradients each input gets; the last, None, where it gets none.
_GRADIENT_OF = [
    Gradients._fields.index(f"d{name}") if f"d{name}" in Gradients._fields else -1 for name in Inputs._fields
]
_forward, _backward = torch.ops.dti.windowed_attn_fwd.default, torch.ops.dti.windowed_attn_bwd.default


def _recorded() -> bool:
    """Whether autograd looks on, in reverse or forward mode; the operators know nothing of it. If it does not, its functions cost the host
    as much as an operator."""
    return torch.is_grad_enabled() or forward_ad._current_level >= 0


class _WindowedAttn(torch.autograd.Function):
    """Ties the forward and backward operators together."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        x = Inputs(*args)
        out, lse = _forward(*x)
        *tensors, scale, mean_span = x
        ctx.save_for_backward(*tensors, out, lse)
        ctx.numbers = scale, mean_span
        return out  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        # Read once: activation checkpointing refuses a second unpacking.
        *tensors, out, lse = ctx.saved_tensors
        x = Inputs(*tensors, *ctx.numbers)
        # The gradient of slopes costs time on CPUs, so it is computed on request only.
        slopes_grad = ctx.needs_input_grad[_SLOPES]
        differentiate = _WindowedAttnGrad.apply if _recorded() else _backward
        grads = differentiate(*x, grad_out, out, lse, slopes_grad)
        grads = *grads, None
        return tuple([None if of is None else grads[i] for i, of in zip(_GRADIENT_OF, x)])


class _WindowedAttnGrad(torch.autograd.Function):
    """The backward operator. Differentiating it again raises and names the way out."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        grads: tuple[Tensor, ...] = _backward(*args)
        return grads

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        raise NotImplementedError(
            "windowed_attn has no second derivative: its backward is a fused kernel. "
            "Use windowed_attn_reference where you need double backward (create_graph=True)."
        )
