"""Passes of random ids through random models, for the tests of CUDA graphs on CPUs and on GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from benchmarks.scoring import Rerun
from benchmarks.shapes import shape
from benchmarks.synthetic import random_model
from dti_kernels import candidate_layout
from dti_model.config import DTIConfig, LoraSettings
from dti_model.model import GraphedPasses, LayerKeys, PackedPass, Passes, add_lora, apply_dti

WINDOW, VOCABULARY, LABELS = 4, 97, (5, 3)
Part = tuple[list[int], list[int]]  # tokens of each interaction of a history, and of each candidate
ONE: list[Part] = [([4, 7, 3], [5, 2, 6, 4, 4])]
OTHER: list[Part] = [([6, 5, 2], [3, 3, 7, 5])]  # in the bucket of `ONE`
TWO: list[Part] = [([4, 7, 3], [5, 2, 6]), ([2, 2], [4, 4]), ([], [3])]


def a_model(
    config: DTIConfig,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    heads: tuple[int, int, int] = (4, 2, 16),
) -> Any:
    """Three layers of weights so large that rows listen to each other."""
    num_heads, num_groups, head_dim = heads
    width = num_heads * head_dim
    model = random_model(shape(3, width, num_heads, num_groups, 96, VOCABULARY), dtype, device)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(32 / width**0.5)
    return apply_dti(model, config).eval()


def a_pass(parts: Sequence[Part], seed: int, states: dict[int, list[LayerKeys]] | None = None) -> PackedPass:
    """A pass with ids of a seed; parts of the same lengths and seed have the same ids.

    Args:
        parts: histories and candidates.
        seed: of the ids.
        states: keys of the history of some parts, by their place.
    """
    layout = candidate_layout(
        [[tokens - 1 for tokens in history] for history, _ in parts],
        [[1] * len(history) for history, _ in parts],
        [candidates for _, candidates in parts],
        WINDOW,
        prefix_lengths=[1] * len(parts),
    )
    rng = np.random.default_rng(seed)
    ids, known = [], []
    for place, (history, candidates) in enumerate(parts):
        shared = 1 + sum(history)
        ids += [rng.integers(VOCABULARY, size=shared), rng.integers(VOCABULARY, size=sum(candidates))]
        known += [np.full(shared, place in (states or {})), np.zeros(sum(candidates), bool)]
    ids.append(np.full(layout.num_sum, VOCABULARY - 1))
    known.append(np.zeros(layout.num_sum, bool))
    found = [state for _, state in sorted((states or {}).items())]
    return PackedPass(np.concatenate(ids), layout, np.concatenate(known), found)


def history_of(part: Part, seed: int, passes: Passes) -> list[LayerKeys]:
    """The keys of the history of a pass of one part, with the ids that it has in `a_pass`."""
    return passes.compute(a_pass([(part[0], [])], seed), records=True)[1]


def with_lora(model: Any, size: float = 0.1) -> Any:
    """The model with updates of a size, so that they are no zeros."""
    model = add_lora(model, LoraSettings(rank=2), VOCABULARY - 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "tokens_delta" in name:
                parameter.add_(size * torch.randn_like(parameter))
    return model.eval()


def same_bits(found: tuple[torch.Tensor, list[LayerKeys]], expected: tuple[Any, list[LayerKeys]]) -> bool:
    both = [[one[0], *(x for layer in one[1] for x in layer if x is not None)] for one in (found, expected)]
    return len(both[0]) == len(both[1]) and all(map(torch.equal, *both))


def requests(kind: str, passes: Passes) -> list[tuple[PackedPass, bool]]:
    """Three of one bucket, of other ids and lengths, and of one kind; and whether keys are wanted."""
    if kind == "one pass":
        return [(a_pass(parts, seed), False) for seed, parts in enumerate((ONE, OTHER, ONE))]
    if kind == "several users":
        return [(a_pass(parts, seed), False) for seed, parts in enumerate((TWO, TWO[::-1], TWO))]
    if kind == "history":
        return [(a_pass([(parts[0][0], [])], seed), True) for seed, parts in enumerate((ONE, OTHER, ONE))]
    if kind == "append":
        found = []
        for seed, (parts, new) in enumerate(((ONE, 4), (OTHER, 2), (ONE, 3))):
            state = {0: history_of(parts[0], seed, passes)}
            found.append((a_pass([(parts[0][0], [new])], seed, state), True))
        return found
    assert kind == "states"
    found = []
    for seed, places in enumerate(((0, 1), (1, 2), (0, 1))):
        parts = TWO if seed != 1 else TWO[::-1]
        states = {place: history_of(parts[place], 10 * seed + place, passes) for place in places}
        found.append((a_pass(parts, seed, states), False))
    return found


KINDS = ("one pass", "several users", "history", "append", "states")


def poison(passes: GraphedPasses, number: float = torch.nan) -> None:
    """What a request has left in buffers is of no use to the next one."""
    for graph in passes._graphs.values():
        buffers = graph.buffers
        buffers.numbers.fill_(1 << 29)
        for layer in buffers.layers:
            for x in layer:
                if x is not None:
                    x.fill_(number)


RESET = DTIConfig(alpha_min=0.1, alpha_max=0.9, alpha_own=0.05, reset_layers=(1, 2))


class Watched(Rerun):
    """Remembers itself."""

    made: list[Watched]

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.made.append(self)


def graphed(model: Any, config: DTIConfig = RESET, most_graphs: int = 32) -> GraphedPasses:
    return GraphedPasses(model, config, LABELS, "fp32", Watched, most_graphs)


def uncaptured(model: Any, config: DTIConfig = RESET) -> GraphedPasses:
    """Padded in the same way, from new buffers every time."""
    passes = graphed(model, config)
    passes._failed = True
    return passes
