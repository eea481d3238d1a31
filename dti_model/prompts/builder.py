"""From prompts to one packed batch. One builder for training and for scoring."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dti_kernels import StreamLayout
from dti_model.data import DataError, PreparedData
from dti_model.prompts.format import PromptFormat
from dti_model.prompts.ranges import IntArray, Prompts


@dataclass(frozen=True, eq=False)
class StreamBatch:
    """One packed batch.

    Attributes:
        input_ids: `(T,)` int64, context tokens in layout order, then S [SUM] tokens.
        layout: rows and spans.
        labels: `(S,)` int64, 0 or 1.
        targets: `(S,)` int64 interaction rows, in [SUM] order.
    """

    input_ids: Tensor
    layout: StreamLayout
    labels: Tensor
    targets: Tensor

    def to(self, device: torch.device | str) -> StreamBatch:
        """The same batch on another device."""
        to_host = torch.device(device).type == "cpu"  # whose next line may read what has not come yet
        tensors = self.input_ids, self.labels, self.targets
        input_ids, labels, targets = (x.to(device, non_blocking=not to_host) for x in tensors)
        return StreamBatch(input_ids, self.layout.to(device), labels, targets)

    def pin_memory(self) -> StreamBatch:
        """The same batch in memory that a GPU reads itself, for which a DataLoader asks: then the host does not wait for `to`."""
        pinned = (x.pin_memory() for x in (self.input_ids, self.labels, self.targets))
        input_ids, labels, targets = pinned
        return StreamBatch(input_ids, self.layout.pin_memory(), labels, targets)


class PromptBuilder:
    """Turns prompts into batches: token ids of the items are looked up, never tokenised again."""

    def __init__(
        self, data: PreparedData, tokenizer: PreTrainedTokenizerBase, prompt_format: PromptFormat
    ) -> None:
        self.data, self.format = data, prompt_format
        self.token_offsets, self.token_ids = data.token_ids(tokenizer)
        lengths = np.minimum(np.diff(self.token_offsets), prompt_format.max_item_tokens)
        if (lengths < 1).any():
            item = int(np.flatnonzero(lengths < 1)[0])
            raise DataError(f"item {data.item_ids[item]!r} has an empty text: give every item a text")
        self.item_lengths = lengths
        row_tokens = lengths[data.item] + 1  # one label token
        # Running sum, so that a range of interactions has its number of tokens by one difference.
        self._row_tokens = np.concatenate([[0], np.cumsum(row_tokens)])

    def num_rows(self, prompts: Prompts) -> IntArray:
        """`(P,)` rows of each prompt in a batch, context and [SUM]."""
        # -1: nobody reads the last interaction's label.
        context = self._row_tokens[prompts.stop] - self._row_tokens[prompts.first] - 1
        total: IntArray = len(self.format.prefix) + context + prompts.num_targets
        return total

    def batch(self, prompts: Prompts) -> StreamBatch:
        """Pack prompts, in their order, into one batch on the CPU."""
        prefix = np.asarray(self.format.prefix, np.int64)
        labels_of = np.asarray(self.format.labels, np.int64)
        lengths = prompts.stop - prompts.first
        # I interactions of all prompts; one that is context of two prompts is there twice.
        rows = _ranges(prompts.first, lengths)
        items = self.data.item[rows]
        item_lengths = self.item_lengths[items]
        label_lengths = np.ones(len(rows), np.int64)
        ends = np.cumsum(lengths)
        label_lengths[ends - 1] = 0  # the last label of a prompt has no reader
        split_at = ends[:-1]
        layout = StreamLayout.build(
            np.split(item_lengths, split_at),
            np.split(label_lengths, split_at),
            prompts.num_targets,
            self.format.window,
            prefix_lengths=[len(prefix)] * len(prompts),
        )
        input_ids = np.empty(layout.num_rows, np.int64)
        # First token of every interaction: tokens of those before it, and one prefix for its prompt and each before that.
        starts = np.cumsum(item_lengths + label_lengths) - item_lengths - label_lengths
        starts += len(prefix) * (1 + np.repeat(np.arange(len(prompts)), lengths))
        # Both sides list every token of every item in order: its place in the batch, and its place in the cached ids.
        input_ids[_ranges(starts, item_lengths)] = self.token_ids[
            _ranges(self.token_offsets[items], item_lengths)
        ]
        # A label stands right behind its item's text.
        labelled = label_lengths == 1
        input_ids[(starts + item_lengths)[labelled]] = labels_of[self.data.label[rows[labelled]]]
        # Token by token: the i-th of every prompt's prefix at once, counted back from the prompt's first interaction.
        for i, token in enumerate(prefix):
            input_ids[starts[ends - lengths] - len(prefix) + i] = token
        input_ids[layout.num_context :] = self.format.sum_token
        targets = _ranges(prompts.first_target, prompts.num_targets)
        labels = torch.from_numpy(self.data.label[targets].astype(np.int64))
        return StreamBatch(torch.from_numpy(input_ids), layout, labels, torch.from_numpy(targets))


def _ranges(first: IntArray, lengths: IntArray) -> IntArray:
    """`first[i], first[i] + 1, ...` for `lengths[i]` numbers, one range after the other."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    # Counting on from 0, range i begins at ends[i] - lengths[i]: shifted by what is missing to first[i].
    return np.arange(total) + np.repeat(first - ends + lengths, lengths)
