"""Named workloads of the attention benchmarks: lengths, heads and dtype, drawn once and the same everywhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from benchmarks.measuring import REHEARSING
from benchmarks.shapes import HEADS
from dti_kernels import HiddenStateReset, StreamLayout, default_alibi_slopes

# Targets per prompt by kind of prompt, as rows of training call them.
STREAMING, SLIDING = "streaming_k50", "sliding_window"
KINDS = {STREAMING: 50, SLIDING: 1}
# Mean and deviation of the tokens of an interaction of MovieLens-1M with SmolLM2's tokenizer: windows of about 300 tokens.
SHORT_TOKENS = (15.0, 4.0)
USUAL_TOKENS = (35.0, 8.0)


@dataclass(frozen=True)
class Workload:
    """A packed batch of streaming prompts and the heads that attend over it."""

    name: str  # how rows call it
    num_tokens: int  # context tokens of the batch, about
    k: int | None  # targets per prompt; None: one prompt of the whole batch
    num_heads: int  # H
    num_groups: int  # G
    head_dim: int  # D
    window: int = 20  # n, in interactions
    mean_tokens: float = USUAL_TOKENS[0]  # mean tokens of an interaction, label included
    std_tokens: float = USUAL_TOKENS[1]  # their standard deviation
    reset: bool = False  # whether [SUM] rows read two streams
    dtype: torch.dtype = torch.float32  # of q, k and v

    def layout(self, device: torch.device | str = "cpu", seed: int = 0) -> StreamLayout:
        """Prompts of `window + k` interactions each until the tokens are used up; a last, shorter prompt fills the batch."""
        rng = np.random.default_rng(seed)
        items: list[list[int]] = [[]]
        left = self.num_tokens
        per_prompt = None if self.k is None else self.window + self.k
        while left > 1:
            length = min(max(2, round(rng.normal(self.mean_tokens, self.std_tokens))), left)
            if len(items[-1]) == per_prompt:
                items.append([])
            items[-1].append(length - 1)  # one label token
            left -= length
        labels = [[1] * len(prompt) for prompt in items]
        targets = [len(prompt) if self.k is None else self.k for prompt in items]
        return StreamLayout.build(items, labels, targets, self.window, device=device)


def gpu_workload(
    name: str,
    heads: str,
    num_tokens: int,
    k: int | None,
    *,
    reset: bool = False,
    tokens: tuple[float, float] = USUAL_TOKENS,
) -> Workload:
    """A workload in bfloat16 with the heads of a model; in a rehearsal its shape with few heads, tokens and interactions.

    Args:
        name: how rows call it, also in a rehearsal.
        heads: a key of `HEADS`.
        num_tokens: context tokens of the batch, about.
        k: targets per prompt; None: one prompt of the whole batch.
        reset: whether [SUM] rows read two streams.
        tokens: of an interaction, mean and standard deviation.
    """
    num_heads, num_groups, head_dim = HEADS[heads]
    window = 20
    if REHEARSING:
        num_heads, num_groups, num_tokens, window = num_heads // num_groups, 1, num_tokens // 256, 2
        tokens = tokens[0] / 5, 1.0
    return Workload(
        name, num_tokens, k, num_heads, num_groups, head_dim, window, *tokens, reset, torch.bfloat16
    )


@dataclass(frozen=True, eq=False)
class AttentionInputs:
    """Tensors of one call, made outside any timed region; `leaves()` take gradients."""

    layout: StreamLayout
    q: Tensor
    k: Tensor
    v: Tensor
    k_sum: Tensor
    alibi_slopes: Tensor
    grad_out: Tensor
    reset: HiddenStateReset | None

    @staticmethod
    def of(workload: Workload, device: torch.device | str = "cpu", seed: int = 0) -> AttentionInputs:
        """Random inputs of a workload."""
        layout = workload.layout(device, seed)
        generator = torch.Generator(device).manual_seed(seed)

        def draw(rows: int, heads: int, grad: bool = True) -> Tensor:
            x = torch.randn(rows, heads, workload.head_dim, device=device, generator=generator)
            return x.to(workload.dtype).requires_grad_(grad)

        rows, groups = layout.num_rows, workload.num_groups
        reset = None
        if workload.reset:
            initial = draw(layout.num_context, groups), draw(layout.num_context, groups)
            reset = HiddenStateReset(*initial, alpha_min=0.0, alpha_max=0.5)
        return AttentionInputs(
            layout=layout,
            q=draw(rows, workload.num_heads),
            k=draw(rows, groups),
            v=draw(rows, groups),
            k_sum=draw(rows, groups),
            alibi_slopes=default_alibi_slopes(workload.num_heads, device),
            grad_out=draw(rows, workload.num_heads, grad=False),
            reset=reset,
        )

    def named(self) -> dict[str, Tensor]:
        """Inputs by the names of the operator's arguments."""
        named = {"q": self.q, "k": self.k, "v": self.v, "k_sum": self.k_sum}
        named["alibi_slopes"] = self.alibi_slopes
        if self.reset is not None:
            named |= {"k_initial": self.reset.k_initial, "v_initial": self.reset.v_initial}
        return named

    def leaves(self) -> list[Tensor]:
        """The tensors that take gradients."""
        return [x for x in self.named().values() if x.requires_grad]

    def call(self, attention: Callable[..., Tensor]) -> Tensor:
        """The output, with everything [SUM] rows have; `attention` is `windowed_attn` or anything with its signature."""
        return attention(self.q, self.k, self.v, self.layout, self.k_sum, self.alibi_slopes, self.reset)

    def run(self, attention: Callable[..., Tensor]) -> dict[str, Tensor]:
        """Output and the gradient of every leaf, by name."""
        out = self.call(attention)
        names = [f"d{name}" for name, x in self.named().items() if x.requires_grad]
        return {"out": out.detach()} | dict(
            zip(names, torch.autograd.grad(out, self.leaves(), self.grad_out))
        )

    def as_float64(self) -> AttentionInputs:
        """The same numbers in float64."""

        def cast(x: Tensor) -> Tensor:
            return x.detach().double().requires_grad_(x.requires_grad)

        reset = self.reset
        if reset is not None:
            reset = replace(reset, k_initial=cast(reset.k_initial), v_initial=cast(reset.v_initial))
        q, k, v, k_sum = map(cast, (self.q, self.k, self.v, self.k_sum))
        slopes, grad_out = cast(self.alibi_slopes), cast(self.grad_out)
        return AttentionInputs(self.layout, q, k, v, k_sum, slopes, grad_out, reset)


def useful_flops(layout: StreamLayout, num_heads: int, head_dim: int, backward: bool) -> int:
    """Multiply-adds of visible pairs only, counted twice: 4 H D pairs forward, 2.5 times that for the backward."""
    forward = 4 * num_heads * head_dim * layout.num_visible_pairs()
    return int(forward * 3.5) if backward else forward
