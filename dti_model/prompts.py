"""Streaming prompts: from users' histories to packed batches. One builder for training and for scoring.

A prompt is a range of one user's interactions: up to `window` of pure context, then up to `k` targets. k = 1 is a sliding-window
prompt. A batch puts prompts one after the other without padding: all context tokens, then one [SUM] per target.

    tokens of a prompt = prefix, item text, label text, item text, label text, ..., item text          (the last label has no reader)
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from dti_kernels import StreamLayout
from dti_model.data import LABEL_TEXTS, SUM, DataError, PreparedData, label_tokens

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PromptFormat:
    """Token ids around the item texts.

    Attributes:
        prefix: tokens before the first interaction (a BOS token, where the tokenizer has one: a place for attention to rest;
            then an instruction).
        sum_token: the [SUM] token.
        labels: the token of a negative and of a positive label: label text in the history, answer at the [SUM].
        window: n, preceding interactions that a target may use.
        max_item_tokens: item texts are cut to this many tokens.
    """

    prefix: tuple[int, ...]
    sum_token: int
    labels: tuple[int, int]
    window: int = 20
    max_item_tokens: int = 128

    @staticmethod
    def of(
        tokenizer: PreTrainedTokenizerBase, window: int, max_item_tokens: int = 128, instruction: str = ""
    ) -> PromptFormat:
        """The format of a tokenizer that has [SUM] and a pair of `LABEL_TEXTS` as single tokens.

        Raises:
            ValueError: one of the words is not a single token, or a count is out of range.
        """
        if window < 0 or max_item_tokens < 1:
            raise ValueError(
                f"window must be >= 0 and max_item_tokens >= 1, got {window} and {max_item_tokens}"
            )
        sums = tokenizer.encode(SUM, add_special_tokens=False)
        if len(sums) != 1:
            raise ValueError(f"{SUM!r} must be one token of the tokenizer, but is {len(sums)}")
        prefix = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        if instruction:
            prefix += tokenizer.encode(instruction, add_special_tokens=False)
        labels = label_tokens(tokenizer)
        if labels is None:
            raise ValueError(
                f"the tokenizer has no label words: of the pairs {', '.join(map(repr, LABEL_TEXTS))} none is two single tokens"
            )
        return PromptFormat(tuple(prefix), sums[0], labels, window, max_item_tokens)


@dataclass(frozen=True)
class Prompts:
    """Ranges of interaction rows, one prompt each: context `[first, first_target)`, targets `[first_target, stop)`."""

    first: IntArray
    first_target: IntArray
    stop: IntArray

    @staticmethod
    def streaming(data: PreparedData, rows: IntArray, window: int, k: int | None) -> Prompts:
        """Cut target rows into prompts of at most `k` targets of one user (None: as many as follow each other).

        Args:
            data: the histories.
            rows: `(S,)` interaction rows that are targets, in any order.
            window: interactions of context before the first target, fewer where the history begins.
            k: targets per prompt, >= 1; 1 gives sliding-window prompts.

        Raises:
            ValueError: k < 1.
        """
        if k is not None and k < 1:
            raise ValueError(f"k must be >= 1 targets per prompt, got {k}")
        rows = np.sort(np.asarray(rows, np.int64))
        in_run, _ = _runs(data, rows)
        return Prompts._beginning_at(data, rows, in_run == 0 if k is None else in_run % k == 0, window)

    @staticmethod
    def sliding_windows(data: PreparedData, rows: IntArray, window: int) -> Prompts:
        """Prompts that give every target what a k = 1 prompt gives it, in fewer tokens.

        A user's first `window + 1` interactions lie in each other's windows: targets among them share one prompt, in which
        nothing is seen that a prompt of their own would not show. Later targets get a prompt each.
        Arguments as in `streaming`.
        """
        rows = np.sort(np.asarray(rows, np.int64))
        in_run, place = _runs(data, rows)
        return Prompts._beginning_at(data, rows, (in_run == 0) | (place > window), window)

    @staticmethod
    def _beginning_at(
        data: PreparedData, rows: IntArray, begins: npt.NDArray[np.bool_], window: int
    ) -> Prompts:
        """Prompts over ascending target rows, cut where `begins` is true."""
        first_index = np.flatnonzero(begins)
        # A prompt's last target is the one before the next prompt's first. The slice serves no rows at all: no prompts then.
        last_index = np.append(first_index[1:], len(rows))[: len(first_index)] - 1
        first_target = rows[first_index]
        # Rows of all users lie in one array: the window must not reach back into the user before.
        history = data.history_offsets[data.users_of(first_target)]
        return Prompts(np.maximum(history, first_target - window), first_target, rows[last_index] + 1)

    def __len__(self) -> int:
        return len(self.first)

    def __getitem__(self, index: IntArray) -> Prompts:
        return Prompts(self.first[index], self.first_target[index], self.stop[index])

    @property
    def num_targets(self) -> IntArray:
        """`(P,)` targets of each prompt."""
        return self.stop - self.first_target


def _runs(data: PreparedData, rows: IntArray) -> tuple[IntArray, IntArray]:
    """Per ascending target row: its place in its run of neighbouring rows of one user, and in its user's history."""
    user = data.users_of(rows)
    new_run = np.ones(len(rows), bool)
    # Neighbouring rows are of two users where one's history ends.
    new_run[1:] = (np.diff(rows) != 1) | (np.diff(user) != 0)
    run_first = np.flatnonzero(new_run)
    in_run = np.arange(len(rows)) - run_first[np.cumsum(new_run) - 1]
    return in_run, rows - data.history_offsets[user]


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


def consecutive_batches(num_rows: IntArray, token_budget: int) -> Iterator[IntArray]:
    """Indices of prompts in order, as many per batch as fit the budget; for scoring."""
    begin, total = 0, 0
    for i, rows in enumerate(num_rows.tolist()):
        if i > begin and total + rows > token_budget:
            yield np.arange(begin, i)
            begin, total = i, 0
        total += rows
    if begin < len(num_rows):
        yield np.arange(begin, len(num_rows))


class PackedPrompts(Dataset[StreamBatch]):
    """Training batches: all prompts once per epoch, users mixed, packed to a token budget without padding.

    The number of batches is the same in every epoch. An epoch deals prompts, longest first and otherwise at random, to the batch
    that is emptiest so far, so all batches are about equally full and none exceeds the budget.
    """

    def __init__(
        self,
        builder: PromptBuilder,
        prompts: Prompts,
        token_budget: int,
        seed: int,
        batch_multiple: int = 1,
    ) -> None:
        """Plan the first epoch.

        Args:
            builder: makes the batches.
            prompts: what to train on, at least one.
            token_budget: rows of a batch at most, context and [SUM].
            seed: of the shuffles.
            batch_multiple: the number of batches is a multiple of this (devices x accumulation steps).

        Raises:
            ValueError: no prompts, or the longest prompt does not fit the budget.
        """
        if not len(prompts):
            raise ValueError("there are no prompts to train on: the training split has no targets")
        self.builder, self.prompts, self.seed = builder, prompts, seed
        self.token_budget = token_budget
        self.num_rows = builder.num_rows(prompts)
        longest = int(self.num_rows.max())
        if longest > token_budget:
            raise ValueError(
                f"the longest prompt has {longest} tokens, more than the token budget of {token_budget}: "
                f"raise the budget to at least {longest}, or lower k"
            )
        num_batches = -(-int(self.num_rows.sum()) // token_budget)
        num_batches += -num_batches % batch_multiple
        while num_batches <= len(prompts) and deal(self.num_rows, num_batches)[1] > token_budget:
            num_batches += batch_multiple
        if num_batches > len(prompts):
            raise ValueError(
                f"{len(prompts)} prompts cannot fill {num_batches} batches: lower the number of devices or accumulation steps"
            )
        self.num_batches = num_batches
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Shuffle for an epoch; the same seed and epoch give the same batches."""
        rng = np.random.default_rng([self.seed, epoch])
        for spread in (0.5, 0.2, 0.0):
            order = np.exp(spread * rng.standard_normal(len(self.num_rows)))
            plan, fullest = deal(self.num_rows, self.num_batches, order, rng)
            if fullest <= self.token_budget:
                break
        self.plan = [plan[i] for i in rng.permutation(self.num_batches)]

    def __len__(self) -> int:
        return self.num_batches

    def __getitem__(self, index: int) -> StreamBatch:
        return self.builder.batch(self.prompts[self.plan[index]])


def deal(
    sizes: IntArray,
    num_batches: int,
    noise: npt.NDArray[np.float64] | None = None,
    rng: np.random.Generator | None = None,
) -> tuple[Sequence[IntArray], int]:
    """Deal prompts, by falling size times noise, each to the emptiest batch; also the size of the fullest batch.

    Without noise the result's sizes do not depend on ties, so a number of batches that fits once fits in every epoch.
    """
    shuffle = np.arange(len(sizes)) if rng is None else rng.permutation(len(sizes))
    weight = sizes[shuffle] * (1.0 if noise is None else noise[shuffle])
    heap = [(0, batch) for batch in range(num_batches)]
    batches: list[list[int]] = [[] for _ in range(num_batches)]
    for i in shuffle[np.argsort(-weight, kind="stable")].tolist():
        filled, batch = heap[0]
        batches[batch].append(i)
        heapq.heapreplace(heap, (filled + int(sizes[i]), batch))
    plan = [np.asarray(batch, np.int64) for batch in batches]
    return plan, max(filled for filled, _ in heap)
