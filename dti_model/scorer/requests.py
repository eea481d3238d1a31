"""Requests in token ids, encoded histories, and the packed pass that several requests become."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dti_kernels import candidate_layout
from dti_model.model import LayerKeys, PackedPass
from dti_model.prompts import IntArray, PromptFormat

Tokens = tuple[IntArray, ...]  # of a history: of every interaction the item's tokens, then the label's one


@dataclass(frozen=True, eq=False)
class HistoryState:
    """An encoded history: what later passes read of it. Made by `Scorer.encode` and `Scorer.append`, never changed.

    Attributes:
        origin: `encoded` from a history, `extended` by one interaction without computing the others again, or `re-encoded`: the
            oldest interaction left the window, and the others' states had read it, so they were computed anew.
        interactions: token ids of the last n interactions.
        layers: keys and values of their rows, by layer.
        owner: the scorer that made the state and can read it.
    """

    origin: Literal["encoded", "extended", "re-encoded"]
    interactions: Tokens
    layers: tuple[LayerKeys, ...]
    owner: object

    @property
    def num_bytes(self) -> int:
        """Bytes of the keys and values of all layers."""
        return sum(layer.num_bytes for layer in self.layers)

    @property
    def num_interactions(self) -> int:
        """Number of interactions it holds: the last n of the history."""
        return len(self.interactions)


@dataclass(frozen=True, eq=False)
class Request:
    """A checked request in token ids, made by `Scorer.request`; `state` is the history's, where it is encoded already."""

    history: Tokens
    candidates: Sequence[IntArray]
    state: HistoryState | None


def packed_pass(parts: Sequence[Request], prompt: PromptFormat) -> PackedPass:
    """The pass of several requests."""
    prefix = np.asarray(prompt.prefix, np.int64)
    layout = candidate_layout(
        [[len(tokens) - 1 for tokens in part.history] for part in parts],
        [[1] * len(part.history) for part in parts],
        [[len(tokens) for tokens in part.candidates] for part in parts],
        prompt.window,
        prefix_lengths=[len(prefix)] * len(parts),
    )
    sums = np.full(layout.num_sum, prompt.sum_token)
    ids = [(prefix, *part.history, *part.candidates) for part in parts]
    input_ids = np.concatenate([tokens for of_part in ids for tokens in of_part] + [sums])
    known = np.zeros(len(input_ids), bool)  # rows whose keys a state holds
    start = 0
    for part, of_part in zip(parts, ids):
        known[start : start + sum(map(len, of_part[: 1 + len(part.history)]))] = part.state is not None
        start += sum(map(len, of_part))
    states = [part.state.layers for part in parts if part.state is not None]
    return PackedPass(input_ids, layout, known, states)
