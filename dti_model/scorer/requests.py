"""Requests in token ids, encoded histories, and the packed pass that several requests become."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dti_kernels import candidate_layout
from dti_model.model import LayerKeys, PackedPass
from dti_model.prompts import IntArray, PromptFormat
from dti_model.scorer.contexts import Facts

Tokens = tuple[
    IntArray, ...
]  # of a history: of every interaction the item's tokens (and its context's), then the label's


@dataclass(frozen=True, eq=False)
class HistoryState:
    """An encoded history: what later passes read of it. Made by `Scorer.encode` and `Scorer.append`, never changed.

    Attributes:
        origin: `encoded` from a history, `extended` by one interaction without computing the others again, or `re-encoded`: the
            oldest interaction left the window, and the others' states had read it, so they were computed anew.
        interactions: token ids of the last n interactions.
        profile: token ids of the user's profile, before them.
        facts: what contexts of later interactions follow from.
        layers: keys and values of their rows, by layer.
        owner: the scorer that made the state and can read it.
    """

    origin: Literal["encoded", "extended", "re-encoded"]
    interactions: Tokens
    profile: IntArray
    facts: Facts
    layers: tuple[LayerKeys, ...]
    owner: object

    @property
    def num_bytes(self) -> int:
        """Bytes of the keys and values of all layers, and about those of what is known by category."""
        return sum(layer.num_bytes for layer in self.layers) + self.facts.num_bytes

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
    profile: IntArray


def packed_pass(parts: Sequence[Request], prompt: PromptFormat) -> PackedPass:
    """The pass of several requests."""
    prefixes = [np.concatenate([np.asarray(prompt.prefix, np.int64), part.profile]) for part in parts]
    label = prompt.label_length
    layout = candidate_layout(
        [[len(tokens) - label for tokens in part.history] for part in parts],
        [[label] * len(part.history) for part in parts],
        [[len(tokens) for tokens in part.candidates] for part in parts],
        prompt.window,
        prefix_lengths=[len(prefix) for prefix in prefixes],
    )
    sums = np.full(layout.num_sum, prompt.sum_token)
    ids = [(prefix, *part.history, *part.candidates) for prefix, part in zip(prefixes, parts)]
    input_ids = np.concatenate([tokens for of_part in ids for tokens in of_part] + [sums])
    known = np.zeros(len(input_ids), bool)  # rows whose keys a state holds
    start = 0
    for part, of_part in zip(parts, ids):
        known[start : start + sum(map(len, of_part[: 1 + len(part.history)]))] = part.state is not None
        start += sum(map(len, of_part))
    states = [part.state.layers for part in parts if part.state is not None]
    return PackedPass(input_ids, layout, known, states)
