"""Prompts: every target once, the right context, the right tokens; batches within the budget, the same number every epoch."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from dti_model.data import PreparedData
from dti_model.prompts import (
    PackedPrompts,
    PromptBuilder,
    PromptFormat,
    Prompts,
    consecutive_batches,
    deal,
)


@pytest.fixture
def tokenizer(small_data: PreparedData) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(small_data.tokenizer_dir)


@pytest.fixture
def builder(small_data: PreparedData, tokenizer: PreTrainedTokenizerFast) -> PromptBuilder:
    return PromptBuilder(small_data, tokenizer, PromptFormat.of(tokenizer, window=3))


@pytest.mark.parametrize("split", ["train", "val", "test"])
@pytest.mark.parametrize("k", [1, 2, 5, None])
def test_every_target_is_in_one_prompt_with_its_context(
    small_data: PreparedData, split: str, k: int | None
) -> None:
    rows = small_data.targets(split)
    prompts = Prompts.streaming(small_data, rows, window=3, k=k)
    seen = []
    for first, target, stop in zip(prompts.first, prompts.first_target, prompts.stop):
        user = small_data.users_of(np.arange(first, stop))
        assert (user == user[0]).all()
        assert k is None or stop - target <= k
        assert first == max(small_data.history_offsets[user[0]], target - 3)
        seen.extend(range(target, stop))
    assert sorted(seen) == sorted(rows)


def test_sliding_windows_are_one_prompt_per_target(small_data: PreparedData) -> None:
    rows = small_data.targets("train")
    assert len(Prompts.streaming(small_data, rows, window=3, k=1)) == len(rows)
    with pytest.raises(ValueError, match="k must be >= 1"):
        Prompts.streaming(small_data, rows, window=3, k=0)


def test_tokens_of_a_batch_by_hand(small_data: PreparedData, tokenizer, builder: PromptBuilder) -> None:
    """Prefix, then item text and label text by turns, no last label, [SUM]s behind all contexts; read by a plain loop."""
    prompts = Prompts.streaming(small_data, small_data.targets("train"), window=3, k=4)[np.array([2, 0])]
    batch = builder.batch(prompts)
    expected: list[int] = []
    for first, stop in zip(prompts.first, prompts.stop):
        expected.append(tokenizer.bos_token_id)
        for row in range(first, stop):
            expected += tokenizer.encode(
                small_data.item_texts[small_data.item[row]], add_special_tokens=False
            )
            if row < stop - 1:
                expected += tokenizer.encode("yes" if small_data.label[row] else "no")
    num_sums = int((prompts.stop - prompts.first_target).sum())
    expected += tokenizer.encode("[SUM]") * num_sums
    assert batch.input_ids.tolist() == expected
    assert batch.layout.num_sum == num_sums
    assert batch.labels.tolist() == small_data.label[batch.targets].tolist()
    assert builder.num_rows(prompts).sum() == len(expected)


def test_long_item_texts_are_cut(small_data: PreparedData, tokenizer) -> None:
    short = PromptBuilder(small_data, tokenizer, PromptFormat.of(tokenizer, window=3, max_item_tokens=2))
    prompts = Prompts.streaming(small_data, small_data.targets("train"), window=3, k=4)
    assert (short.num_rows(prompts) == 1 + 3 * (prompts.stop - prompts.first) - 1 + prompts.num_targets).all()
    assert short.batch(prompts).layout.num_rows == short.num_rows(prompts).sum()


def test_words_that_are_not_one_token_are_refused(tokenizer) -> None:
    with pytest.raises(ValueError, match=r"'\[SUM\]' must be one token of the tokenizer, but is"):
        PromptFormat.of(_without_sum(tokenizer), window=3)


def _without_sum(tokenizer):
    class Plain:
        bos_token_id = 0

        def encode(self, word: str, add_special_tokens: bool) -> list[int]:
            return list(word.encode())

    return Plain()


def test_epochs_shuffle_but_hold_every_target_once_within_the_budget(
    small_data, builder: PromptBuilder
) -> None:
    rows = small_data.targets("train")
    prompts = Prompts.streaming(small_data, rows, window=3, k=4)
    budget = 3 * int(builder.num_rows(prompts).max())
    dataset = PackedPrompts(builder, prompts, budget, seed=0, batch_multiple=2)
    assert len(dataset) % 2 == 0
    orders = []
    for epoch in range(4):
        dataset.set_epoch(epoch)
        batches = [dataset[i] for i in range(len(dataset))]
        assert max(len(batch.input_ids) for batch in batches) <= budget
        order = np.concatenate([batch.targets for batch in batches])
        assert sorted(order) == sorted(rows)
        orders.append(order.tolist())
    assert orders[0] != orders[1]
    dataset.set_epoch(0)
    assert np.concatenate([dataset[i].targets for i in range(len(dataset))]).tolist() == orders[0]


def test_impossible_budgets_say_what_is_needed(small_data, builder: PromptBuilder) -> None:
    prompts = Prompts.streaming(small_data, small_data.targets("train"), window=3, k=4)
    longest = int(builder.num_rows(prompts).max())
    with pytest.raises(ValueError, match=f"raise the budget to at least {longest}"):
        PackedPrompts(builder, prompts, longest - 1, seed=0)
    with pytest.raises(ValueError, match="no prompts to train on"):
        PackedPrompts(builder, prompts[np.array([], int)], 100, seed=0)
    with pytest.raises(ValueError, match="lower the number of devices"):
        PackedPrompts(builder, prompts[np.arange(3)], 10**6, seed=0, batch_multiple=4)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(50, 200), st.integers(0, 2**31))
def test_packing(sizes: list[int], budget: int, seed: int) -> None:
    """Consecutive batches keep the order and the budget; dealing holds every prompt once, whatever the noise."""
    lengths = np.asarray(sizes)
    batches = list(consecutive_batches(lengths, budget))
    assert np.concatenate(batches).tolist() == list(range(len(sizes)))
    assert all(lengths[batch].sum() <= budget for batch in batches)
    rng = np.random.default_rng(seed)
    plan, fullest = deal(lengths, 3, rng.random(len(sizes)) + 0.5, rng)
    assert sorted(np.concatenate(plan).tolist()) == list(range(len(sizes)))
    assert fullest == max(lengths[batch].sum() for batch in plan)
    assert fullest <= lengths.sum() / 3 + lengths.max()
