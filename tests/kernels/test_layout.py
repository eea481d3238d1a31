"""Layouts: spans against the rule from first principles, the inverse, worked examples and errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dti_kernels import StreamLayout, candidate_layout, padded_layout
from dti_kernels.layout import ROW_STOP, SUM_START, SUM_STOP, check_spans
from dti_kernels.reference import alibi_distance
from tests.cases import CASES, Case, random_cases


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


@settings(max_examples=100, deadline=None, derandomize=True)
@given(random_cases(), st.data())
def test_candidates_see_what_a_prompt_of_their_own_shows_them(case: Case, data: st.DataObject) -> None:
    """Per candidate: keys, positions, ALiBi distances and reset distances of its [SUM] are those of its k = 1 prompt."""
    counts = st.lists(st.integers(1, 4), max_size=4)
    candidates = data.draw(st.lists(counts, min_size=len(case.item_lengths), max_size=len(case.item_lengths)))
    window = 9
    many = candidate_layout(
        case.item_lengths, case.label_lengths, candidates, window, prefix_lengths=case.prefix_lengths
    )
    check(many)
    assert (many.window, many.reset_window) == (0, window)
    distance, visible = alibi_distance(many), many.dense_visibility()[many.num_context :]
    rows = iter(range(many.num_sum))
    for prompt, lengths in enumerate(candidates):
        items, labels = case.item_lengths[prompt], case.label_lengths[prompt]
        for length in lengths:
            row = next(rows)
            alone = StreamLayout.build(
                [[*items, length]], [[*labels, 0]], [1], window, [case.prefix_lengths[prompt]]
            )
            seen, num_context = visible[row], many.num_context
            assert distance[row, seen].tolist() == alibi_distance(alone)[0].tolist()
            assert many.position_ids[:num_context][seen].tolist() == alone.position_ids[:-1].tolist()
            assert many.position_ids[num_context + row] == alone.position_ids[-1]
            many_steps = many.reset_id[num_context + row] - many.reset_id[:num_context][seen]
            alone_steps = alone.reset_id[-1] - alone.reset_id[:-1]
            assert many_steps.clamp_min(0).tolist() == alone_steps.clamp_min(0).tolist()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"candidate_lengths": [[1], [2, 0]]}, r"candidate_lengths\[1\]\[1\] must be >= 1, got 0"),
        ({"candidate_lengths": [[1]]}, r"candidate_lengths must have one entry per prompt \(2\), got 1"),
        ({"window": 1}, r"item_lengths\[1\] must have at most window = 1 interactions, got 2"),
        ({"item_lengths": [[1], [0, 1]]}, r"item_lengths\[1\]\[0\] must be >= 1, got 0"),
    ],
)
def test_bad_candidates_name_the_place(kwargs: dict, message: str) -> None:
    good = {"item_lengths": [[2], [3, 1]], "label_lengths": [[1], [1, 1]], "candidate_lengths": [[1], [2, 2]]}
    with pytest.raises(ValueError, match=message):
        candidate_layout(**({"window": 2} | good | kwargs))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(random_cases(), st.integers(1, 9), st.integers(0, 5))
def test_rows_of_padding_are_a_layout_and_change_no_other_row(
    case: Case, more_context: int, more_sums: int
) -> None:
    old = case.layout()
    num_context, num_sum = old.num_context + more_context, old.num_sum + more_sums
    new = padded_layout(old, num_context, num_sum)
    check_spans(new.rows, new.keys)
    check(new)
    assert (new.num_context, new.num_sum) == (num_context, num_sum)
    assert (new.window, new.reset_window, new.mean_span) == (old.window, old.reset_window, old.mean_span)
    kept = [*range(old.num_context), *range(num_context, num_context + old.num_sum)]
    assert torch.equal(new.rows[:, kept], old.rows)
    assert torch.equal(new.keys[:, : old.num_context], old.keys)
    # Nobody who was there sees or is seen by who has come, and a row of padding sees one key: tiles of them are short.
    seen = visible_by_spans(new)
    padding = [row for row in range(new.num_rows) if row not in kept]
    assert not seen[kept][:, old.num_context :].any()
    assert (seen[padding].sum(1) == 1).all()
    assert not seen[padding][:, : old.num_context].any()


def test_padding_needs_a_context_row() -> None:
    layout = candidate_layout([[2]], [[1]], [[2, 1]], window=20)
    for numbers, name in (
        ((6, 2), "num_context must be more than the layout's 6, got 6"),
        ((7, 1), "num_sum"),
    ):
        with pytest.raises(ValueError, match=name):
            padded_layout(layout, *numbers)
