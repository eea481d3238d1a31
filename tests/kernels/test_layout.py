"""Layouts: spans against the rule from first principles, the inverse, worked examples and errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

from dti_kernels import StreamLayout
from dti_kernels.layout import ROW_STOP, SUM_START, SUM_STOP
from tests.cases import CASES, Case
from tests.kernels.test_cpu_parity import random_cases


def visible_by_spans(layout: StreamLayout) -> torch.Tensor:
    key = torch.arange(layout.num_context)
    in_span = (key >= layout.start[:, None]) & (key < layout.stop[:, None])
    return in_span | ((key >= layout.prompt_first[:, None]) & (key < layout.prefix_stop[:, None]))


def check(layout: StreamLayout) -> None:
    num_context = layout.num_context
    visible = layout.dense_visibility()
    assert torch.equal(visible_by_spans(layout), visible)
    assert layout.num_visible_pairs() == int(visible.sum()) + layout.num_sum
    for rows in (slice(0, num_context), slice(num_context, None)):
        for spans in (layout.start[rows], layout.stop[rows]):
            assert (spans.diff() >= 0).all()
    row = torch.arange(num_context)[:, None]
    by_inverse = (row >= torch.arange(num_context)) & (row < layout.keys[ROW_STOP])
    assert torch.equal(by_inverse, visible[:num_context])
    row = torch.arange(layout.num_sum)[:, None]
    by_inverse = (row >= layout.keys[SUM_START]) & (row < layout.keys[SUM_STOP])
    assert torch.equal(by_inverse, visible[num_context:])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_spans_and_inverse(case: Case) -> None:
    check(case.layout())


@settings(max_examples=150, deadline=None, derandomize=True)
@given(random_cases())
def test_spans_and_inverse_on_random_prompts(case: Case) -> None:
    check(case.layout())


def test_the_rule_by_hand() -> None:
    """Two interactions of (2 item + 1 label) tokens after a prefix of 1, then one of 1 item token; window 1."""
    layout = StreamLayout.build([[2, 2, 1]], [[1, 1, 0]], [2], window=1, prefix_lengths=[1])
    #        prefix  i0 item  label  i1 item  label  i2 item
    expected = [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 1, 1, 0],
        [1, 0, 0, 0, 1, 1, 1, 1],
        [1, 1, 1, 1, 1, 1, 0, 0],  # [SUM] of i1: its item text, never its label
        [1, 0, 0, 0, 1, 1, 1, 1],  # [SUM] of i2
    ]
    assert layout.dense_visibility().int().tolist() == expected
    assert layout.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 6, 8]
    assert layout.interaction.tolist() == [-1, 0, 0, 0, 1, 1, 1, 2, 1, 2]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"item_lengths": [[2, 0]]}, r"item_lengths\[0\]\[1\] must be >= 1, got 0"),
        ({"label_lengths": [[1, -1]]}, r"label_lengths\[0\]\[1\] must be >= 0, got -1"),
        ({"label_lengths": [[1]]}, r"prompt 0: item_lengths has 2 interactions, label_lengths 1"),
        ({"num_targets": [-1]}, r"num_targets\[0\] must be >= 0, got -1"),
        ({"num_targets": []}, r"num_targets must have one entry per prompt \(1\), got 0"),
        ({"window": -1}, r"window must be an integer >= 0"),
        ({"window": 2.5}, r"window must be an integer >= 0"),
        ({"prefix_lengths": [-2]}, r"prefix_lengths\[0\] must be >= 0, got -2"),
        ({"prefix_lengths": [1, 1]}, r"prefix_lengths must have one entry per prompt"),
    ],
)
def test_bad_counts_name_the_place(kwargs: dict, message: str) -> None:
    good = {"item_lengths": [[2, 2]], "label_lengths": [[1, 1]], "num_targets": [1], "window": 2}
    with pytest.raises(ValueError, match=message):
        StreamLayout.build(**(good | kwargs))


def test_an_empty_batch_is_a_layout() -> None:
    layout = StreamLayout.build([], [], [], window=3)
    assert (layout.num_context, layout.num_sum) == (0, 0)
