"""Batches of prompts to a token budget: in order for scoring, dealt anew every epoch for training."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset

from dti_model.prompts.builder import PromptBuilder, StreamBatch
from dti_model.prompts.ranges import IntArray, Prompts


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
