"""The one list of attention cases: every implementation is held to the reference on all of them, output and gradients."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st
from torch import Tensor

from dti_kernels import HiddenStateReset, StreamLayout, candidate_layout


@dataclass(frozen=True)
class Case:
    """Prompts and heads. Lengths are tokens, as in `StreamLayout.build`."""

    name: str
    item_lengths: list[list[int]]
    label_lengths: list[list[int]]
    num_targets: list[int]
    window: int
    prefix_lengths: list[int] | None = None
    num_heads: int = 2
    num_groups: int = 1
    head_dim: int = 16
    separate_k_sum: bool = True
    alibi: bool = True
    fixed_slopes: bool = False  # no gradient of the slopes is asked for, as when they are not trained
    reset: tuple[float, float, float] | None = (0.1, 0.8, 0.7)  # alpha_min, alpha_max, steepness
    candidate_lengths: list[list[int]] | None = None  # interactions are histories; num_targets is not read

    def layout(self, device: torch.device | str | None = None) -> StreamLayout:
        if self.candidate_lengths is not None:
            return candidate_layout(
                self.item_lengths,
                self.label_lengths,
                self.candidate_lengths,
                self.window,
                self.prefix_lengths,
                device=device,
            )
        return StreamLayout.build(
            self.item_lengths,
            self.label_lengths,
            self.num_targets,
            self.window,
            self.prefix_lengths,
            device=device,
        )

    def inputs(self, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> Inputs:
        """Random inputs: the same float64 draws rounded to any dtype, so that dtypes are comparable."""
        generator = torch.Generator().manual_seed(seed)
        layout = self.layout(device)

        def draw(rows: int, heads: int) -> Tensor:
            x = torch.randn(rows, heads, self.head_dim, dtype=torch.float64, generator=generator)
            return x.to(torch.bfloat16).to(device=device, dtype=dtype).requires_grad_()

        num_rows, num_context = layout.num_rows, layout.num_context
        leaves = {"q": draw(num_rows, self.num_heads)}
        leaves |= {name: draw(num_rows, self.num_groups) for name in ("k", "v", "k_sum")}
        leaves |= {name: draw(num_context, self.num_groups) for name in ("k_initial", "v_initial")}
        # Steep: a percent of them must show in 16 bits.
        slopes = 2.0 ** -torch.arange(self.num_heads, dtype=torch.float32, device=device)
        leaves["alibi_slopes"] = slopes.to(torch.promote_types(dtype, torch.float32)).requires_grad_()
        grad_out = draw(num_rows, self.num_heads).detach()
        if not self.separate_k_sum:
            del leaves["k_sum"]
        if not self.alibi:
            del leaves["alibi_slopes"]
        elif self.fixed_slopes:
            leaves["alibi_slopes"].requires_grad_(False)
        if self.reset is None:
            del leaves["k_initial"], leaves["v_initial"]
        return Inputs(layout, leaves, grad_out, self.reset)


@dataclass(frozen=True)
class Inputs:
    """Arguments of one call: `leaves` take gradients, but for slopes that are fixed."""

    layout: StreamLayout
    leaves: dict[str, Tensor]
    grad_out: Tensor
    reset: tuple[float, float, float] | None
    scale: float | None = field(default=None)

    @property
    def reset_settings(self) -> HiddenStateReset | None:
        """The reset with its initial states."""
        if self.reset is None:
            return None
        return HiddenStateReset(self.leaves["k_initial"], self.leaves["v_initial"], *self.reset)

    def call(self, attention) -> Tensor:
        """`attention` is `windowed_attn`, `windowed_attn_reference` or anything with their signature."""
        kwargs = {name: x for name, x in self.leaves.items() if not name.endswith("_initial")}
        return attention(layout=self.layout, scale=self.scale, reset=self.reset_settings, **kwargs)

    def run(self, attention) -> dict[str, Tensor]:
        """Output and the gradient of every leaf that takes one, by name."""
        out = self.call(attention)
        leaves = {name: x for name, x in self.leaves.items() if x.requires_grad}
        # A leaf that nothing reads (k's [SUM] rows beside k_sum, say) may have no gradient: zero is meant.
        grads = torch.autograd.grad(out, list(leaves.values()), self.grad_out, allow_unused=True)
        named = {
            f"d{name}": torch.zeros_like(leaf) if grad is None else grad
            for (name, leaf), grad in zip(leaves.items(), grads)
        }
        return {"out": out.detach()} | named


CASES = [
    Case("one_token", [[1]], [[0]], [1], window=20),
    Case("one_prompt", [[3, 2, 4, 1, 5, 2]], [[1, 1, 2, 1, 1, 0]], [3], window=2),
    Case("sliding_window", [[3, 2, 4, 1, 5]] * 3, [[1, 1, 1, 1, 0]] * 3, [1, 1, 1], window=4),
    Case("prefix", [[3, 2, 4, 1, 5, 2], [2, 2]], [[1] * 6, [1, 0]], [4, 2], window=1, prefix_lengths=[3, 2]),
    Case(
        "prefix_only_first", [[2] * 9, [3] * 7], [[1] * 9, [1] * 7], [9, 5], window=3, prefix_lengths=[4, 0]
    ),
    Case("no_targets", [[3, 2, 4], [5, 1]], [[1, 1, 1], [1, 1]], [0, 0], window=1),
    Case("no_targets_in_one", [[3, 2, 4], [5, 1], [2, 2]], [[1] * 3, [1] * 2, [1] * 2], [1, 0, 2], window=1),
    Case("window_0", [[3, 2, 4, 1]], [[1, 1, 1, 1]], [4], window=0, prefix_lengths=[2]),
    Case("window_over_everything", [[3, 2, 4, 1]], [[1, 0, 1, 1]], [4], window=1000),
    Case("empty_labels", [[3, 2, 4, 1], [7]], [[0, 0, 0, 0], [0]], [4, 1], window=2),
    Case("more_targets_than_history", [[3, 2]], [[1, 1]], [50], window=20),
    Case("prompt_without_interactions", [[], [3, 2]], [[], [1, 1]], [0, 2], window=2, prefix_lengths=[3, 1]),
    Case(
        "interaction_longer_than_a_tile", [[3, 150, 2, 90]], [[1, 1, 1, 1]], [4], window=1, prefix_lengths=[1]
    ),
    Case(
        "k_50", [[4, 3, 5, 2] * 13], [[1] * 52], [50], window=5, prefix_lengths=[1], num_heads=4, num_groups=2
    ),
    Case("gqa_3", [[5, 3, 4] * 4], [[1] * 12], [7], window=3, num_heads=9, num_groups=3),
    Case("gqa_4", [[5, 3, 4] * 4], [[1] * 12], [7], window=3, num_heads=4, num_groups=1, prefix_lengths=[2]),
    Case("gqa_8", [[5, 3, 4] * 3], [[1] * 9], [7], window=3, num_heads=8, num_groups=1),
    Case("mha", [[5, 3, 4] * 4], [[1] * 12], [7], window=3, num_heads=4, num_groups=4),
    Case("odd_head_dim", [[5, 3, 4] * 2], [[1] * 6], [4], window=2, head_dim=24),
    Case("head_dim_64", [[5, 3, 4] * 2], [[1] * 6], [4], window=2, head_dim=64),
    Case("dti_minus", [[5, 3, 4] * 3], [[1] * 9], [6], window=2, alibi=False, reset=None),
    Case("one_key_stream", [[5, 3, 4] * 3], [[1] * 9], [6], window=2, separate_k_sum=False, reset=None),
    Case("alibi_only", [[5, 3, 4] * 3], [[1] * 9], [6], window=2, reset=None, prefix_lengths=[3]),
    Case(
        "fixed_slopes",
        [[5, 3, 4] * 9],
        [[1] * 27],
        [20],
        window=4,
        reset=None,
        prefix_lengths=[3],
        num_heads=4,
        num_groups=2,
        fixed_slopes=True,
    ),
    Case("reset_only", [[5, 3, 4] * 3], [[1] * 9], [6], window=2, alibi=False, prefix_lengths=[3]),
    Case("full_reset", [[5, 3, 4] * 3], [[1] * 9], [6], window=4, reset=(1.0, 1.0, 1.0)),
    Case(
        "many_short_prompts",
        [[1], [2, 1], [1, 1, 1]] * 7,
        [[1], [0, 1], [1, 1, 0]] * 7,
        [1, 1, 2] * 7,
        window=1,
    ),
    Case(
        "several_blocks",
        [[7, 5, 6] * 12, [4] * 30],
        [[1] * 36, [1] * 30],
        [30, 25],
        window=4,
        prefix_lengths=[5, 2],
    ),
    Case(
        "candidates",
        [[3, 2, 4], [], [2], [1, 1]],
        [[1, 1, 1], [], [0], [1, 1]],
        [],
        window=3,
        prefix_lengths=[1, 1, 0, 2],
        candidate_lengths=[[2, 1, 4, 2], [3, 1], [2, 5], []],
    ),
    Case(
        "candidates_without_prefix",
        [[], [4, 2, 3]],
        [[], [1, 1, 2]],
        [],
        window=20,
        candidate_lengths=[[2, 3], [2] * 9],
        num_heads=4,
        num_groups=2,
    ),
    Case(
        "many_candidates",
        [[7, 5, 6, 4] * 2, [9] * 4],
        [[1] * 8, [1] * 4],
        [],
        window=12,
        prefix_lengths=[1, 1],
        candidate_lengths=[[5, 9, 3, 40, 6], [7, 2] * 5],
        num_heads=2,
        num_groups=1,
    ),
]


def named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


@st.composite
def random_cases(draw: st.DrawFn) -> Case:
    """Any prompts: lengths, labels, targets, prefixes, window and head grouping."""
    lengths = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 3)), min_size=0, max_size=9)
    prompts = draw(st.lists(lengths, min_size=1, max_size=5))
    groups, per_group = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 3]))
    reset = draw(st.sampled_from([None, (0.0, 1.0, 0.5)]))
    return Case(
        "random",
        [[item for item, _ in prompt] for prompt in prompts],
        [[label for _, label in prompt] for prompt in prompts],
        draw(st.lists(st.integers(0, 10), min_size=len(prompts), max_size=len(prompts))),
        window=draw(st.integers(0, 6)),
        prefix_lengths=draw(st.lists(st.integers(0, 4), min_size=len(prompts), max_size=len(prompts))),
        num_heads=groups * per_group,
        num_groups=groups,
        head_dim=4,
        alibi=draw(st.booleans()),
        fixed_slopes=draw(st.booleans()),
        reset=reset,
    )
