"""What `windowed_attn` is compared with on GPUs. Each provider prepares what it may prepare once and returns a call.

None of them does all that ours does: no provider has ALiBi on some rows only, nor a second key stream for [SUM] rows. They run
one key stream under the equal mask, or, where they cannot express it, a cheaper wrong mask as a lower bound on time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.workloads import AttentionInputs
from dti_kernels import StreamLayout, windowed_attn

Call = Callable[[AttentionInputs], Tensor]
# Rows beyond which a T x T mask (and the scores that some backends materialise) is not tried.
DENSE_LIMIT = 20_000


class Unavailable(Exception):
    """This provider cannot run here; the message says why."""


def windowed(x: AttentionInputs) -> Call:
    """Ours, with everything [SUM] rows have."""
    return lambda y: windowed_attn(
        y.q, y.k, y.v, y.layout, k_sum=y.k_sum, alibi_slopes=y.alibi_slopes, reset=y.reset
    )


def sdpa_dense_mask(x: AttentionInputs) -> Call:
    """SDPA under the equal dense mask, built outside the timing."""
    if x.layout.num_rows > DENSE_LIMIT:
        raise Unavailable(f"dense mask of {x.layout.num_rows} rows")
    num_context, num_sum = x.layout.num_context, x.layout.num_sum
    visible = torch.zeros(x.layout.num_rows, x.layout.num_rows, dtype=torch.bool, device=x.q.device)
    visible[:, :num_context] = x.layout.dense_visibility()
    visible[num_context:, num_context:] = torch.eye(num_sum, dtype=torch.bool, device=x.q.device)
    return lambda y: _sdpa(y, attn_mask=visible)


def sdpa_causal(x: AttentionInputs) -> Call:
    """SDPA, dense causal over all rows: what one pays without any window."""
    return lambda y: _sdpa(y, is_causal=True)


def _sdpa(y: AttentionInputs, **mask: Any) -> Tensor:
    # The fast backends that take a mask do not take grouped heads: keys are expanded here, as their users do.
    group = y.q.shape[1] // y.k.shape[1]
    q, k, v = y.q, y.k.repeat_interleave(group, 1), y.v.repeat_interleave(group, 1)
    q, k, v = (z.transpose(0, 1)[None] for z in (q, k, v))
    return scaled_dot_product_attention(q, k, v, **mask)[0].transpose(0, 1)


def flex(x: AttentionInputs) -> Call:
    """FlexAttention under the equal mask; its block mask is built outside the timing."""
    block_mask = _block_mask(x.layout)
    return lambda y: _flex(y, block_mask)


def flex_with_mask_construction(x: AttentionInputs) -> Call:
    """FlexAttention that builds its block mask, once per call: what a new packing costs."""
    return lambda y: _flex(y, _block_mask(y.layout))


@cache
def _compiled_flex() -> tuple[Callable[..., Any], Callable[..., Any]]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    # One compilation for all lengths: FlexAttention is given what we claim for ourselves.
    return torch.compile(flex_attention, dynamic=True), torch.compile(create_block_mask, dynamic=True)


def mask_mod(layout: StreamLayout) -> Callable[..., Tensor]:
    """The rule of visibility as FlexAttention wants it, over T rows and T keys."""
    start, stop, first, prefix_stop = layout.start, layout.stop, layout.prompt_first, layout.prefix_stop
    num_context = layout.num_context

    def visible(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        in_span = (key >= start[row]) & (key < stop[row])
        in_prefix = (key >= first[row]) & (key < prefix_stop[row])
        return in_span | in_prefix | ((key == row) & (row >= num_context))

    return visible


def _block_mask(layout: StreamLayout) -> Any:
    num_rows = layout.num_rows
    return _compiled_flex()[1](mask_mod(layout), None, None, num_rows, num_rows, device=str(layout.device))


def _flex(y: AttentionInputs, block_mask: Any) -> Tensor:
    q, k, v = (z.transpose(0, 1)[None] for z in (y.q, y.k, y.v))
    out: Tensor = _compiled_flex()[0](q, k, v, block_mask=block_mask, enable_gqa=True)
    return out[0].transpose(0, 1)


def flash_scalar_window(x: AttentionInputs) -> Call:
    """flash-attention varlen with one scalar window of the mean span: a wrong mask, a lower bound on time."""
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError as error:
        raise Unavailable("flash_attn is not installed") from error
    layout = x.layout
    num_context = layout.num_context
    first = layout.prompt_first[:num_context].unique()
    # [SUM] rows are appended to the last prompt: they cost something, and see something.
    bounds = torch.cat([first, first.new_tensor([layout.num_rows])]).int()
    longest = int(bounds.diff().max())
    window = int((layout.stop - layout.start).float().mean())

    def run(y: AttentionInputs) -> Tensor:
        out: Tensor = flash_attn_varlen_func(
            y.q, y.k, y.v, bounds, bounds, longest, longest, causal=True, window_size=(window, 0)
        )
        return out

    return run


GPU_PROVIDERS: dict[str, Callable[[AttentionInputs], Call]] = {
    "windowed_attn": windowed,
    "flex": flex,
    "flex_with_mask_construction": flex_with_mask_construction,
    "sdpa_dense_mask": sdpa_dense_mask,
    "sdpa_causal": sdpa_causal,
    "flash_scalar_window": flash_scalar_window,
}
