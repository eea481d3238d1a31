"""Baselines of `windowed_attn` on GPUs. Each provider prepares what it may prepare once and returns a call.

None of them does all that ours does: no provider has ALiBi on some rows only, nor a second key stream for [SUM] rows. They run
one key stream under the equal mask, or, where they cannot express it, a cheaper wrong mask as a lower bound on time.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.attention.workloads import AttentionInputs
from benchmarks.measuring import REHEARSING
from dti_kernels import StreamLayout, windowed_attn

Call = Callable[[AttentionInputs], Tensor]
OURS, DENSE = "windowed_attn", "sdpa_dense_mask"
# What names of providers end with that compute in bfloat16 where others compute in float32.
BF16 = "_bf16"
# Rows beyond which a T x T mask (and the scores that some backends materialise) is not tried.
DENSE_LIMIT = 20_000
# The fastest dense causal attention that PyTorch brings for Hopper; a CPU has the plain one only.
_CAUSAL_BACKEND = SDPBackend.MATH if REHEARSING else SDPBackend.CUDNN_ATTENTION


MODES = ("forward", "backward", "forward+backward")
# Compilers and caches settle in these many calls.
WARMUP = 1 if REHEARSING else 2


class Unavailable(Exception):
    """This provider cannot run here; the message says why."""


def by_mode(call: Call, x: AttentionInputs) -> dict[str, Callable[[], Any]]:
    """The timed function of a call for each of `MODES`; nothing runs before it is called, so that each mode fails by itself."""
    leaves = x.leaves()
    graph: list[Tensor] = []  # the output that backwards alone begin at

    def forward() -> Tensor:
        with torch.no_grad():
            return call(x)

    def differentiate(out: Tensor, retain: bool) -> None:
        torch.autograd.grad(out, leaves, x.grad_out, allow_unused=True, retain_graph=retain)

    def backward() -> None:
        if not graph:
            graph.append(call(x))
        differentiate(graph[0], retain=True)

    return {
        "forward": forward,
        "backward": backward,
        "forward+backward": lambda: differentiate(call(x), retain=False),
    }


def settle(call: Callable[[], Any]) -> None:
    """Call often enough that nothing compiles any more, and wait for the device."""
    for _ in range(WARMUP):
        call()
    torch.cuda.synchronize()


def windowed(x: AttentionInputs) -> Call:
    """Ours, with everything [SUM] rows have."""
    return lambda y: y.call(windowed_attn)


def sdpa_dense_mask(x: AttentionInputs) -> Call:
    """SDPA under the equal dense mask, built outside the timing.

    On a CPU the mask is what is added to the scores, in their dtype: a boolean one is turned into that in every call, a tenth of its time.
    """
    if x.layout.num_rows > DENSE_LIMIT:
        raise Unavailable(f"dense mask of {x.layout.num_rows} rows")
    num_context, num_sum = x.layout.num_context, x.layout.num_sum
    visible = torch.zeros(x.layout.num_rows, x.layout.num_rows, dtype=torch.bool, device=x.q.device)
    visible[:, :num_context] = x.layout.dense_visibility()
    visible[num_context:, num_context:] = torch.eye(num_sum, dtype=torch.bool, device=x.q.device)
    if x.q.device.type != "cpu":
        return lambda y: sdpa(y, attn_mask=visible)
    added = torch.zeros(visible.shape, dtype=x.q.dtype).masked_fill_(~visible, float("-inf"))
    return lambda y: sdpa(y, attn_mask=added)


def sdpa_causal(x: AttentionInputs) -> Call:
    """SDPA by cuDNN, dense causal over all rows: what one pays without any window."""

    def run(y: AttentionInputs, grouped: bool) -> Tensor:
        with sdpa_kernel(_CAUSAL_BACKEND):
            return sdpa(y, grouped, is_causal=True)

    try:
        with torch.no_grad():
            run(x, True)
    except RuntimeError:
        # No such backend, or none that takes grouped heads: the second is asked by the caller's first call.
        return lambda y: run(y, False)
    return lambda y: run(y, True)


def sdpa(y: AttentionInputs, grouped: bool = False, **mask: Any) -> Tensor:
    """PyTorch's attention of q, k and v as one sequence."""
    q, k, v = y.q, y.k, y.v
    if not grouped:
        # The fast backends that take a mask do not take grouped heads: keys are expanded here, as their users do.
        k, v = (z.repeat_interleave(q.shape[1] // k.shape[1], 1) for z in (k, v))
    q, k, v = (z.transpose(0, 1)[None] for z in (q, k, v))
    return scaled_dot_product_attention(q, k, v, enable_gqa=grouped, **mask)[0].transpose(0, 1)


def flex(x: AttentionInputs) -> Call:
    """FlexAttention as PyTorch configures it, under the equal mask; its block mask is built outside the timing."""
    return flex_with(x, {}, (128, 128))


def flex_with(x: AttentionInputs, options: dict[str, Any], block_size: tuple[int, int]) -> Call:
    """FlexAttention with kernel options and a block mask of these rows and keys.

    Args:
        x: whose layout the block mask is made of.
        options: `kernel_options` of `flex_attention`; none: PyTorch's own.
        block_size: rows and keys of a block of the mask.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    num_rows = x.layout.num_rows
    # Not compiled: nothing of it is timed, and every block size and layout would be another compilation.
    block_mask = create_block_mask(
        mask_mod(x.layout), None, None, num_rows, num_rows, device=str(x.layout.device), BLOCK_SIZE=block_size
    )
    return lambda y: _flex(y, block_mask, options)


def flex_with_mask_construction(x: AttentionInputs) -> Call:
    """FlexAttention that builds its block mask, once per call: what a new packing costs."""

    def run(y: AttentionInputs) -> Tensor:
        num_rows, device = y.layout.num_rows, str(y.layout.device)
        block_mask = _compiled_flex()[1](mask_mod(y.layout), None, None, num_rows, num_rows, device=device)
        return _flex(y, block_mask, {})

    return run


@cache
def _compiled_flex() -> tuple[Callable[..., Any], Callable[..., Any]]:
    from torch.nn.attention import flex_attention as module
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if REHEARSING:
        module._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = True  # it traces even where nobody compiles it
        return flex_attention, create_block_mask
    # One compilation for all lengths: FlexAttention is given what we claim for ourselves.
    return torch.compile(flex_attention, dynamic=True), torch.compile(create_block_mask, dynamic=True)


def mask_mod(layout: StreamLayout) -> Callable[..., Tensor]:
    """The rule of visibility as FlexAttention wants it, over T rows and T keys.

    Whatever differs between layouts is a tensor: a number in a closure would be a compilation for every layout.
    """
    start, stop, first, prefix_stop = layout.start, layout.stop, layout.prompt_first, layout.prefix_stop
    num_rows, num_context = layout.num_rows, layout.num_context
    rows = torch.arange(num_rows, dtype=start.dtype, device=layout.device)
    own = torch.where(rows >= num_context, rows, start)  # a context row sees its start anyway

    def visible(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return ((key >= start[row]) & (key < stop[row])) | (key == own[row])

    def visible_with_prefix(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        in_prefix = (key >= first[row]) & (key < prefix_stop[row])
        return visible(batch, head, row, key) | in_prefix

    # Without prefixes the rule is two comparisons shorter: the baseline does not pay for what nobody needs.
    return visible_with_prefix if bool((prefix_stop > first).any()) else visible


def _flex(y: AttentionInputs, block_mask: Any, options: dict[str, Any]) -> Tensor:
    given = [z.detach() for z in (y.q, y.k, y.v)] if REHEARSING else [y.q, y.k, y.v]
    q, k, v = (z.transpose(0, 1)[None] for z in given)
    out: Tensor = _compiled_flex()[0](
        q, k, v, block_mask=block_mask, enable_gqa=True, kernel_options=options or None
    )
    out = out[0].transpose(0, 1)
    # On a CPU it has no backward: a rehearsal's output depends on q in name only.
    return out + 0 * y.q if REHEARSING else out


def _varlen_bounds(layout: StreamLayout) -> tuple[Tensor, int, int]:
    """`(prompts + 1,)` int32 first rows, the longest prompt, and a scalar window: the mean span.

    [SUM] rows are appended to the last prompt: they cost something, and see something.
    """
    first = layout.prompt_first[: layout.num_context].unique()
    bounds = torch.cat([first, first.new_tensor([layout.num_rows])]).int()
    return bounds, int(bounds.diff().max()), int((layout.stop - layout.start).float().mean())


def varlen_scalar_window(x: AttentionInputs) -> Call:
    """PyTorch's own `varlen_attn` (FlashAttention 2) with a scalar window of the mean span: a wrong mask, a lower bound on time."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        raise Unavailable(f"torch {torch.__version__} has no varlen_attn") from error
    parameters = inspect.signature(varlen_attn).parameters
    if "window_size" not in parameters:
        raise Unavailable(f"varlen_attn of torch {torch.__version__} has no window_size")
    # Its first releases pass grouped heads on without asking; later ones want it said.
    grouped: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in parameters else {}
    bounds, longest, window = _varlen_bounds(x.layout)

    def run(y: AttentionInputs) -> Tensor:
        given = (y.q, y.k, y.v, bounds, bounds, longest, longest)
        out = varlen_attn(*given, window_size=(window, 0), **grouped)
        assert isinstance(out, Tensor)  # no auxiliary output is asked for
        return out

    return run


def flash_scalar_window(x: AttentionInputs) -> Call:
    """The same by the flash-attn package, where somebody has it."""
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError as error:
        raise Unavailable("flash_attn is not installed") from error
    bounds, longest, window = _varlen_bounds(x.layout)

    def run(y: AttentionInputs) -> Tensor:
        out: Tensor = flash_attn_varlen_func(
            y.q, y.k, y.v, bounds, bounds, longest, longest, causal=True, window_size=(window, 0)
        )
        return out

    return run


# The tuned FlexAttention is not among them: it is another call for every mode (`benchmarks/attention/flex_tuned.py`).
GPU_PROVIDERS: dict[str, Callable[[AttentionInputs], Call]] = {
    OURS: windowed,
    "flex": flex,
    "flex_with_mask_construction": flex_with_mask_construction,
    DENSE: sdpa_dense_mask,
    "sdpa_causal": sdpa_causal,
    "varlen_scalar_window": varlen_scalar_window,
    "flash_scalar_window": flash_scalar_window,
}
