"""From prompts to one packed batch. One builder for training and for scoring."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dti_kernels import StreamLayout
from dti_model.data import DataError, PreparedData, TokenIds, ranges
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


class _Texts(NamedTuple):
    """Token ids of texts in one array: text i is `ids[first[i] : first[i] + length[i]]`."""

    first: IntArray
    length: IntArray
    ids: npt.NDArray[np.int64] | npt.NDArray[np.int32]

    @staticmethod
    def of(tokens: TokenIds, most: int | None = None) -> _Texts:
        """Of the data layer's offsets and ids; texts are cut to `most` tokens."""
        offsets, ids = tokens
        length = np.diff(offsets)
        return _Texts(offsets[:-1], length if most is None else np.minimum(length, most), ids)

    def text(self, index: int) -> IntArray:
        """The ids of one text."""
        first = int(self.first[index])
        ids: IntArray = self.ids[first : first + int(self.length[index])].astype(np.int64)
        return ids

    def put(self, input_ids: IntArray, starts: IntArray, index: IntArray) -> IntArray:
        """Write text `index[j]` at `starts[j]`; gives the places behind them."""
        length = self.length[index]
        # Both sides list every token of every text in order: its place in the batch, and its place in the cached ids.
        input_ids[ranges(starts, length)] = self.ids[ranges(self.first[index], length)]
        return starts + length


class PromptBuilder:
    """Turns prompts into batches: token ids of the texts are looked up, never tokenised again.

    Attributes:
        data: the histories.
        format: tokens around item texts.
        items: token ids of the items, cut.
        contexts, profiles: of the parts of contexts and profiles, by their codes; None: there are none.
    """

    def __init__(
        self, data: PreparedData, tokenizer: PreTrainedTokenizerBase, prompt_format: PromptFormat
    ) -> None:
        self.data, self.format = data, prompt_format
        self.items = _Texts.of(data.token_ids(tokenizer), prompt_format.max_item_tokens)
        if (self.items.length < 1).any():
            item = int(np.flatnonzero(self.items.length < 1)[0])
            raise DataError(f"item {data.item_ids[item]!r} has an empty text: give every item a text")
        contexts, profiles = data.contexts, data.profiles
        self.contexts = self.profiles = None
        if contexts is not None:
            self.contexts = _Texts.of(data.tokens_of(tokenizer, [*map(context_text, contexts.texts)]))
        if profiles is not None:
            self.profiles = _Texts.of(data.tokens_of(tokenizer, [*map(profile_text, profiles.texts)]))
        self._before, self._cue = (
            _Texts(np.zeros(1, np.int64), np.array([len(tokens)]), np.array(tokens, np.int64))
            for tokens in (prompt_format.before, prompt_format.cue)
        )
        # Running sum, so that a range of interactions has its number of tokens by one difference.
        self._row_tokens = np.zeros(len(data.item) + 1, np.int64)
        lengths = self._row_tokens[1:]
        lengths += len(prompt_format.before) + len(prompt_format.cue) + prompt_format.label_length
        lengths += self.items.length[data.item]
        if contexts is not None and self.contexts is not None:
            for codes in contexts.codes:
                lengths += self.contexts.length[codes]
        np.cumsum(lengths, out=lengths)

    def prefix_lengths(self, prompts: Prompts) -> IntArray:
        """`(P,)` tokens before the first interaction of each prompt."""
        lengths = np.full(len(prompts), len(self.format.prefix), np.int64)
        if self.profiles is not None:
            for index in self._profile_index(prompts):
                lengths += self.profiles.length[index]
        return lengths

    def _profile_index(self, prompts: Prompts) -> list[IntArray]:
        """Per part of a profile, the text of each prompt's user."""
        if self.data.profiles is None:
            return []
        users = self.data.users_of(prompts.first_target)
        return [codes[users].astype(np.int64) for codes in self.data.profiles.codes]

    def _texts_of(self, rows: IntArray) -> list[tuple[_Texts, IntArray]]:
        """What the item part of interactions is made of, in order, and which text of each kind every interaction has."""
        none = np.zeros(len(rows), np.int64)
        texts = [(self.items, self.data.item[rows].astype(np.int64))]
        if self.data.contexts is not None and self.contexts is not None:
            texts += [(self.contexts, codes[rows].astype(np.int64)) for codes in self.data.contexts.codes]
        if self.format.before:
            texts = [(self._before, none), *texts]
        return [*texts, (self._cue, none)] if self.format.cue else texts

    def num_rows(self, prompts: Prompts) -> IntArray:
        """`(P,)` rows of each prompt in a batch, context and [SUM]."""
        context = self._row_tokens[prompts.context_stop] - self._row_tokens[prompts.first]
        targets = self._row_tokens[prompts.stop] - self._row_tokens[prompts.first_target]
        # Nobody reads the last interaction's label.
        total: IntArray = context + targets - self.format.label_length + prompts.num_targets
        return self.prefix_lengths(prompts) + total

    def batch(self, prompts: Prompts) -> StreamBatch:
        """Pack prompts, in their order, into one batch on the CPU."""
        labels_of = np.asarray(self.format.labels, np.int64)
        lengths = prompts.num_interactions
        rows = prompts.rows()
        texts = self._texts_of(rows)
        item_lengths = np.sum([of.length[index] for of, index in texts], axis=0)
        label_lengths = np.full(len(rows), self.format.label_length)
        ends = np.cumsum(lengths)
        label_lengths[ends - 1] = 0  # the last label of a prompt has no reader
        split_at = ends[:-1]
        prefix_lengths = self.prefix_lengths(prompts)
        layout = StreamLayout.build(
            np.split(item_lengths, split_at),
            np.split(label_lengths, split_at),
            prompts.num_targets,
            self.format.window,
            prefix_lengths=prefix_lengths,
        )
        input_ids = np.empty(layout.num_rows, np.int64)
        # First token of every interaction: tokens of those before it, and the prefixes of its prompt and each before that.
        starts = np.cumsum(item_lengths + label_lengths) - item_lengths - label_lengths
        starts += np.repeat(np.cumsum(prefix_lengths), lengths)
        self._put_prefixes(input_ids, starts[ends - lengths] - prefix_lengths, prompts)
        places = starts
        for of, index in texts:
            places = of.put(input_ids, places, index)
        # A label stands right behind its item's text, then what separates it from the next item.
        labelled = label_lengths > 0
        input_ids[places[labelled]] = labels_of[self.data.label[rows[labelled]]]
        for i, token in enumerate(self.format.separator, 1):
            input_ids[places[labelled] + i] = token
        input_ids[layout.num_context :] = self.format.sum_token
        targets = ranges(prompts.first_target, prompts.num_targets)
        labels = torch.from_numpy(self.data.label[targets].astype(np.int64))
        return StreamBatch(torch.from_numpy(input_ids), layout, labels, torch.from_numpy(targets))

    def _put_prefixes(self, input_ids: IntArray, starts: IntArray, prompts: Prompts) -> None:
        """Write the prefix of every prompt: token by token, the i-th of all prompts at once; then the users' profiles."""
        for i, token in enumerate(self.format.prefix):
            input_ids[starts + i] = token
        if self.profiles is not None:
            places = starts + len(self.format.prefix)
            for index in self._profile_index(prompts):
                places = self.profiles.put(input_ids, places, index)


def context_text(text: str) -> str:
    """One part of an interaction's context, as it stands behind the item text."""
    return f"; {text}" if text else ""


def profile_text(text: str) -> str:
    """One part of a user's profile, as it stands before the first interaction."""
    return f"{text};" if text else ""
