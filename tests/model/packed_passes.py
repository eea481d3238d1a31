"""Passes of random ids through random models, for the tests of CUDA graphs on CPUs and on GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from benchmarks.shapes import shape
from benchmarks.synthetic import random_model
from dti_kernels import candidate_layout
from dti_model.config import DTIConfig
from dti_model.model import LayerKeys, PackedPass, Passes, apply_dti

WINDOW, VOCABULARY, LABELS = 4, 97, (5, 3)
Part = tuple[list[int], list[int]]  # tokens of each interaction of a history, and of each candidate


def a_model(
    config: DTIConfig, dtype: torch.dtype = torch.float32, device: str = "cpu", head_dim: int = 16
) -> Any:
    """Three layers of weights so large that rows listen to each other."""
    model = random_model(
        shape(3, 4 * head_dim, 4, 2, 96, VOCABULARY) | {"head_dim": head_dim}, dtype, device
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    return apply_dti(model, config).eval()


def a_pass(
    parts: Sequence[Part], seed: int, states: dict[int, list[LayerKeys]] | None = None
) -> PackedPass:
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
