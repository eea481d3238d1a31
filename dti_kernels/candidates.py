"""The layout of scoring: many candidate items of one history in one pass.

A prompt is `prefix, history, candidate, candidate, ...`. The prefix and the whole history are visible to everybody (they are the
prefix of the mask), a candidate sees them and itself (window 0), and its positions start where the history ends, as if it were
alone. So every candidate's [SUM] computes what it would compute in a sliding-window prompt of its own:

    position          of a candidate token: tokens of prefix and history, plus its place inside the candidate
    ALiBi distance    (stop - start) + (prefix_stop - key): the history lies right before each candidate
    reset distance    history interaction i of h has id i, candidates have id h

It holds because all of the history lies inside the window of each of its interactions: at most `window` of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from dti_kernels.counts import (
    Counts,
    Lengths,
    check_counts,
    check_num_prompts,
    check_num_rows,
    nested_counts_of,
)
from dti_kernels.layout import (
    INTERACTION,
    NUM_ROW_FIELDS,
    POSITION,
    PREFIX_INTERACTION,
    PREFIX_RESET_ID,
    PREFIX_STOP,
    PROMPT_FIRST,
    RESET_ID,
    START,
    STOP,
    StreamLayout,
)


def candidate_layout(
    item_lengths: Sequence[Lengths],
    label_lengths: Sequence[Lengths],
    candidate_lengths: Sequence[Lengths],
    window: int,
    prefix_lengths: Lengths | None = None,
    device: torch.device | str | None = None,
) -> StreamLayout:
    """Lay out histories with their candidates, given as token counts.

    Args:
        item_lengths: per prompt, the tokens of each history interaction's item text, each >= 1.
        label_lengths: per prompt, the tokens of each history interaction's label text, each >= 0.
        candidate_lengths: per prompt, the tokens of each candidate, each >= 1; every candidate gets a [SUM].
        window: n, what the model was trained with; the longest history, and the n of the reset's ratios.
        prefix_lengths: per prompt, tokens before the history; default 0 for every prompt.
        device: where the layout lives; default CPU.

    Returns:
        The layout, with `window` 0 and `reset_window` n. Token order inside a prompt: prefix, item text and label text of each
        interaction, candidates. In `interaction`, prefix and history are -1 and candidates count from 0.

    Raises:
        TypeError: a count is no integer, or an argument no sequence of them; the message names the place.
        ValueError: a count is negative, a text is empty, a history is longer than the window, there are 2**30 rows or more, or
            the arguments disagree in length; the message names the place.

    Cost: O(T) on the host. Attention over it: O(T x (longest history + candidate)).

    Example: a history of one interaction (2 + 1 tokens), two candidates of 2 and 1 tokens.

    >>> layout = candidate_layout([[2]], [[1]], [[2, 1]], window=20)
    >>> layout.position_ids.tolist()
    [0, 1, 2, 3, 4, 3, 5, 4]
    >>> layout.start.tolist(), layout.stop.tolist()
    ([0, 0, 0, 3, 3, 5, 3, 5], [1, 2, 3, 4, 5, 6, 5, 6])
    """
    counts = Counts.check(item_lengths, label_lengths, window, prefix_lengths)
    num_candidates, lengths = _check_candidates(counts, candidate_lengths)
    rows, keys = _spans(counts, num_candidates, lengths)
    return StreamLayout.of_arrays(rows, keys, window=0, reset_window=counts.window, device=device)


def _check_candidates(counts: Counts, candidate_lengths: Sequence[Lengths]) -> tuple[np.ndarray, np.ndarray]:
    """`(P,)` candidates of each prompt and `(M,)` tokens of all candidates."""
    lengths, num_candidates = nested_counts_of("candidate_lengths", candidate_lengths)
    check_num_prompts("candidate_lengths", num_candidates, len(counts.interactions))
    too_long = np.flatnonzero(counts.interactions > counts.window)
    if too_long.size:
        raise ValueError(
            f"item_lengths[{int(too_long[0])}] must have at most window = {counts.window} interactions, "
            f"got {int(counts.interactions[too_long[0]])}: keep the last {counts.window}"
        )
    check_counts("candidate_lengths", lengths, num_candidates, 1)
    check_num_rows(counts.num_rows + int(lengths.sum()) + len(lengths))
    return num_candidates, lengths


def _spans(counts: Counts, num_candidates: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`rows (7, T)` and `keys (4, C)`. Segments of a prompt: prefix, history interactions, candidates."""
    num_prompts = len(num_candidates)
    per_prompt = 1 + counts.interactions + num_candidates
    prefix_seg = np.cumsum(per_prompt) - per_prompt
    prompt = np.repeat(np.arange(num_prompts), per_prompt)  # (segments,) prompt of each
    place = np.arange(len(prompt)) - prefix_seg[prompt] - 1  # -1: prefix; then interactions, then candidates
    is_candidate = place >= counts.interactions[prompt]
    seg_len = np.empty(len(prompt), np.int64)
    seg_len[prefix_seg], seg_len[is_candidate] = counts.prefix, lengths
    seg_len[(place >= 0) & ~is_candidate] = counts.item + counts.label
    seg_stop = np.cumsum(seg_len)
    seg_first = seg_stop - seg_len
    first = seg_first[prefix_seg]  # (P,) first token of each prompt
    num_context = int(seg_len.sum())
    stop = np.append(first[1:], num_context)
    candidate_tokens = np.bincount(prompt[is_candidate], lengths, num_prompts).astype(np.int64)
    shared_stop = stop - candidate_tokens  # (P,) end of the history

    start = np.where(is_candidate, seg_first, first[prompt])
    position_0 = np.where(is_candidate, seg_first - (shared_stop - first)[prompt], first[prompt])
    reset_id = np.minimum(place, counts.interactions[prompt])
    by_segment = {
        PROMPT_FIRST: first[prompt],
        PREFIX_STOP: np.where(is_candidate, shared_stop[prompt], first[prompt]),
        START: start,
        RESET_ID: np.where(place < 0, PREFIX_RESET_ID, reset_id),
        INTERACTION: np.where(is_candidate, place - counts.interactions[prompt], PREFIX_INTERACTION),
    }
    tokens = np.arange(num_context)
    rows = np.empty((NUM_ROW_FIELDS, num_context + len(lengths)), np.int32)
    of_context, of_sums = rows[:, :num_context], rows[:, num_context:]
    for field, values in by_segment.items():
        of_context[field], of_sums[field] = np.repeat(values, seg_len), values[is_candidate]
    of_context[STOP], of_sums[STOP] = tokens + 1, seg_stop[is_candidate]
    of_context[POSITION] = tokens - np.repeat(position_0, seg_len)
    of_sums[POSITION] = (seg_stop - position_0)[is_candidate]

    sum_stop = np.cumsum(num_candidates)[prompt]
    own_sum = np.cumsum(is_candidate) - 1
    keys = np.stack(
        [
            np.where(is_candidate, seg_stop, stop[prompt]),
            np.where(is_candidate, own_sum, sum_stop - num_candidates[prompt]),
            np.where(is_candidate, own_sum + 1, sum_stop),
            is_candidate,
        ]
    )
    return rows, np.repeat(keys, seg_len, axis=1).astype(np.int32)
