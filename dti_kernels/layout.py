"""Which rows a packed batch of streaming prompts has, what each row sees, and the inverse.

A batch is one packed sequence without padding: all context tokens of all prompts (`C` rows), then one [SUM] row per
target (`S` rows), `T = C + S`. Every row sees at most two ranges of context keys:

    visible(row, key)  <=>  start[row] <= key < stop[row]   or   prompt_first[row] <= key < prefix_stop[row]

and a [SUM] row also sees itself. `start` and `stop` never decrease along the context rows nor along the [SUM] rows, so
the mask is a few integers per row and the keys of a tile follow from its first and last row: O(T) memory, no block mask.
The inverse is one contiguous range of context rows and one of [SUM] rows per key.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import InitVar, dataclass

import numpy as np
import torch
from torch import Tensor

from dti_kernels.counts import MAX_ROWS, Counts, Lengths, integer

# Columns of `StreamLayout.rows` (one int32 per row of the packed batch).
PROMPT_FIRST, PREFIX_STOP, START, STOP, RESET_ID, POSITION, INTERACTION = range(7)
NUM_ROW_FIELDS = 7
# Columns of `StreamLayout.keys` (one int32 per context token).
ROW_STOP, SUM_START, SUM_STOP, IS_ITEM = range(4)
NUM_KEY_FIELDS = 4

PREFIX_INTERACTION = -1
# A prefix key is never blended towards its initial state: a distance below 0 has ratio 0 in every path.
PREFIX_RESET_ID = MAX_ROWS


@dataclass(frozen=True, eq=False)
class StreamLayout:
    """Rows and spans of a packed batch of streaming prompts.

    Use `StreamLayout.build` or `candidate_layout`; all fields are read-only. One int32 buffer backs every array, so moving a layout to a device is
    one copy. A layout made in another way is checked, which reads its arrays.

    Attributes:
        rows: `(7, T)` int32. Per row: first context row of its prompt, end of the separately visible prefix (equal to
            `prompt_first` where the prefix touches the window or is empty), start and stop of its span, interaction id that
            the reset distance is counted in, position id, interaction id (-1 for prefix rows).
        keys: `(4, C)` int32. Per context key: end of the context rows that see it (they start at the key itself), first and
            end of the [SUM] rows (counted from 0 in the [SUM] block) that see it, and 1 for item text.
        window: how many preceding interactions a target may use.
        reset_window: n of the reset's ratios: the window that the model was trained with. Only a layout of candidates
            (`candidate_layout`), whose window is 0, has another one than `window`.
        mean_span: about how many tokens a context row sees, 256, 512 or 1024: tiles are chosen by it, results do
            not depend on it. Coarse, so that it seldom changes from batch to batch.

    Raises:
        TypeError: `rows` or `keys` is no int32 tensor, or a window no integer.
        ValueError: they have other shapes or lie on two devices, or a row sees what no row of a layout sees; the message names it.
    """

    rows: Tensor
    keys: Tensor
    window: int
    reset_window: int
    mean_span: int = 512
    checked: InitVar[bool] = (
        False  # by whoever made the arrays, so that nobody waits for a device to read them
    )

    def __post_init__(self, checked: bool) -> None:
        if checked:
            return
        check_arrays(self.rows, self.keys)
        for name, least in (("window", 0), ("reset_window", 0), ("mean_span", 1)):
            integer(name, getattr(self, name), least)
        if type(self.rows) is Tensor and not self.rows.is_meta:
            check_spans(self.rows, self.keys)

    @staticmethod
    def build(
        item_lengths: Sequence[Lengths],
        label_lengths: Sequence[Lengths],
        num_targets: Lengths,
        window: int,
        prefix_lengths: Lengths | None = None,
        device: torch.device | str | None = None,
    ) -> StreamLayout:
        """Lay out prompts given as token counts.

        Args:
            item_lengths: per prompt, the tokens of each interaction's item text, each >= 1.
            label_lengths: per prompt, the tokens of each interaction's label text, each >= 0.
            num_targets: per prompt, how many of its last interactions are targets (more than it has: all of them).
            window: n, in interactions, >= 0.
            prefix_lengths: per prompt, tokens before the first interaction; default 0 for every prompt.
            device: where the layout lives; default CPU.

        Returns:
            The layout. Token order inside a prompt: prefix, then item text and label text of each interaction.

        Raises:
            TypeError: a count is no integer, or an argument no sequence of them; the message names the place.
            ValueError: a count is negative, an item text is empty, there are 2**30 rows or more, or the arguments disagree in
                length; the message names the prompt and the interaction.

        Cost: O(T) on the host and one copy to the device that does not wait for it.

        Example: one prompt of three interactions (2 + 1, 1 + 1 and 2 + 1 tokens), the last two are targets, window 1. Context
        rows are 0..7; the [SUM] rows are 8 (of interaction 1) and 9 (of interaction 2) and see [0, 4) and [3, 7).

        >>> layout = StreamLayout.build([[2, 1, 2]], [[1, 1, 1]], [2], window=1)
        >>> layout.num_context, layout.num_sum
        (8, 2)
        >>> layout.start.tolist(), layout.stop.tolist()
        ([0, 0, 0, 0, 0, 3, 3, 3, 0, 3], [1, 2, 3, 4, 5, 6, 7, 8, 4, 7])
        """
        counts = Counts.check(item_lengths, label_lengths, window, prefix_lengths).with_targets(num_targets)
        rows, keys = _spans(counts)
        return StreamLayout.of_arrays(rows, keys, counts.window, counts.window, device)

    @staticmethod
    def of_arrays(
        rows: np.ndarray,
        keys: np.ndarray,
        window: int,
        reset_window: int,
        device: torch.device | str | None,
    ) -> StreamLayout:
        """A layout of finished arrays, copied to the device: what the constructors end in."""
        arrays = _to_device(rows, keys, device)
        return StreamLayout(*arrays, window, reset_window, _mean_span(rows, keys), checked=True)

    @property
    def num_context(self) -> int:
        """`C`, context rows."""
        return self.keys.shape[1]

    @property
    def num_sum(self) -> int:
        """`S`, [SUM] rows, one per target."""
        return self.rows.shape[1] - self.keys.shape[1]

    @property
    def num_rows(self) -> int:
        """`T = C + S`."""
        return self.rows.shape[1]

    @property
    def device(self) -> torch.device:
        """The device of the arrays."""
        return self.rows.device

    @property
    def start(self) -> Tensor:
        """`(T,)` int32, first context row of each row's span."""
        return self.rows[START]

    @property
    def stop(self) -> Tensor:
        """`(T,)` int32, end of each row's span."""
        return self.rows[STOP]

    @property
    def prompt_first(self) -> Tensor:
        """`(T,)` int32, first context row of each row's prompt."""
        return self.rows[PROMPT_FIRST]

    @property
    def prefix_stop(self) -> Tensor:
        """`(T,)` int32, end of the prefix that a row sees beside its span."""
        return self.rows[PREFIX_STOP]

    @property
    def position_ids(self) -> Tensor:
        """`(T,)` int32, position inside the prompt; a [SUM] row has the number of context tokens before it."""
        return self.rows[POSITION]

    @property
    def interaction(self) -> Tensor:
        """`(T,)` int32, interaction inside the prompt, -1 for prefix rows."""
        return self.rows[INTERACTION]

    @property
    def reset_id(self) -> Tensor:
        """`(T,)` int32, what the reset distance `reset_id[row] - reset_id[key]` is counted in."""
        return self.rows[RESET_ID]

    def num_visible_pairs(self) -> int:
        """Visible (row, key) pairs, a [SUM]'s own key included: the useful area of the attention matrix. Reads the device."""
        spans = self.stop.long() - self.start + self.prefix_stop - self.prompt_first
        return int(spans.sum()) + self.num_sum

    def to(self, device: torch.device | str) -> StreamLayout:
        """The same layout on another device; the host does not wait for a copy from memory that is pinned."""
        if torch.device(device) == self.device:
            return self
        to_host = torch.device(device).type == "cpu"  # whose next line may read what has not come yet
        return self._of(*(x.to(device, non_blocking=not to_host) for x in (self.rows, self.keys)))

    def pin_memory(self) -> StreamLayout:
        """The same layout in memory that a GPU reads itself; on the CPU, where there is a GPU."""
        return self._of(self.rows.pin_memory(), self.keys.pin_memory())

    def _of(self, rows: Tensor, keys: Tensor) -> StreamLayout:
        """The same layout, its arrays elsewhere."""
        return StreamLayout(rows, keys, self.window, self.reset_window, self.mean_span, checked=True)

    def dense_visibility(self) -> Tensor:
        """`(T, C)` bool, True where a row sees a context key, from first principles.

        The specification that the span arrays are tested against; O(T x C) memory, for tests and pictures only. It reads
        prompts, interactions and text kinds, never `start` and `stop`.
        """
        num_context = self.num_context
        key = torch.arange(num_context, device=self.device)
        row = torch.arange(self.num_rows, device=self.device)[:, None]
        t_row, t_key = self.interaction[:, None], self.interaction[None, :num_context]
        same_prompt = self.prompt_first[:, None] == self.prompt_first[None, :num_context]
        prefix = t_key == PREFIX_INTERACTION
        in_window = t_key >= t_row - self.window
        context_sees = (key <= row) & (prefix | in_window)
        own_item = (t_key == t_row) & (self.keys[IS_ITEM] == 1)
        sum_sees = prefix | (in_window & (t_key < t_row)) | own_item
        return same_prompt & torch.where(row < num_context, context_sees, sum_sees)


def check_arrays(rows: Tensor, keys: Tensor) -> None:
    """Raise TypeError or ValueError unless `rows` and `keys` are arrays of a layout by dtype, shape and device. Reads no values."""
    for name, array, num_fields in (("rows", rows, NUM_ROW_FIELDS), ("keys", keys, NUM_KEY_FIELDS)):
        if not isinstance(array, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(array).__name__}")
        if array.dtype != torch.int32:
            raise TypeError(f"{name} must be of torch.int32, got {array.dtype}")
        if array.ndim != 2 or array.shape[0] != num_fields:
            raise ValueError(f"{name} must have shape ({num_fields}, length), got {tuple(array.shape)}")
    if rows.device != keys.device:
        raise ValueError(f"rows and keys must be on one device, got {rows.device} and {keys.device}")
    if rows.shape[1] < keys.shape[1]:
        raise ValueError(
            f"rows must be at least as many as keys ({keys.shape[1]}): context rows, then [SUM] rows, got {rows.shape[1]}"
        )


def check_spans(rows: Tensor, keys: Tensor) -> None:
    """Raise ValueError, with the first wrong row or key, unless what rows see and who sees a key lies inside the batch.

    Implementations rely on it: they would read memory elsewhere. `is_layout` in cpu/native/segments.h checks rows likewise.
    """
    num_rows, num_context = rows.shape[1], keys.shape[1]
    first, prefix, start, stop, reset_id = rows[: RESET_ID + 1].cpu().numpy()
    right = (first >= 0) & (first <= prefix) & (prefix <= start) & (start < stop) & (stop <= num_context)
    right &= (reset_id >= 0) & (reset_id <= PREFIX_RESET_ID)
    right[:num_context] &= stop[:num_context] == np.arange(1, num_context + 1)
    # Of two neighbours: spans never go back, a later prompt begins behind what the last row sees, and a prompt has one prefix, which
    # rows see as the beginning of their span until it lies apart.
    joined = (prefix[:-1] == first[:-1]) & (start[:-1] == first[:-1])
    same = (prefix[1:] == first[1:]) | (prefix[1:] == prefix[:-1]) | joined
    follows = np.where(first[1:] == first[:-1], same, first[1:] >= stop[:-1])
    follows &= (start[1:] >= start[:-1]) & (stop[1:] >= stop[:-1])
    follows[num_context - 1 : num_context] = True  # the first [SUM] row
    right[1:] &= follows
    if not right.all():
        row = int(np.flatnonzero(~right)[0])
        seen = f"prefix [{first[row]}, {prefix[row]}), span [{start[row]}, {stop[row]}), reset id {reset_id[row]}"
        raise ValueError(
            f"rows[:, {row}] is of no layout of {num_context} context keys: {seen}. Use StreamLayout.build or candidate_layout"
        )
    row_stop, sum_start, sum_stop, is_item = keys.cpu().numpy()
    right = (row_stop > np.arange(num_context)) & (row_stop <= num_context) & (sum_start >= 0)
    right &= (sum_start <= sum_stop) & (sum_stop <= num_rows - num_context) & (is_item >> 1 == 0)
    if not right.all():
        key = int(np.flatnonzero(~right)[0])
        raise ValueError(
            f"keys[:, {key}] is of no layout of {num_context} context and {num_rows - num_context} [SUM] rows: seen up to row "
            f"{row_stop[key]} and by [SUM] rows [{sum_start[key]}, {sum_stop[key]}). Use StreamLayout.build or candidate_layout"
        )


def _spans(counts: Counts) -> tuple[np.ndarray, np.ndarray]:
    """`rows (7, T)` and `keys (4, C)` of checked counts.

    Works on segments (per prompt: prefix, then item text and label text of each interaction) and repeats their values over
    their tokens, so that the cost per token is a handful of copies.
    """
    num_prompts, num_inter = len(counts.interactions), len(counts.item)
    prompt_of = np.repeat(np.arange(num_prompts), counts.interactions)  # (I,)
    inter_end = np.cumsum(counts.interactions)
    inter_first = inter_end - counts.interactions  # (P,) first interaction of each prompt
    t = np.arange(num_inter) - inter_first[prompt_of]  # (I,) interaction inside its prompt
    reach = min(counts.window, num_inter)
    # Segment order: one prefix segment per prompt, two segments per interaction.
    prefix_seg = np.arange(num_prompts) + 2 * inter_first
    item_seg = prompt_of + 1 + 2 * np.arange(num_inter)
    seg_len = np.empty(num_prompts + 2 * num_inter, np.int64)
    seg_len[prefix_seg], seg_len[item_seg], seg_len[item_seg + 1] = counts.prefix, counts.item, counts.label
    seg_begin = np.append(0, np.cumsum(seg_len))
    num_context = int(seg_begin[-1])
    prompt_first = seg_begin[prefix_seg]  # (P,)

    # The rows of an interaction see their window and, where it lies apart, the prefix.
    oldest = np.arange(num_inter) - np.minimum(t, reach)
    touches = t <= reach  # the window reaches the first interaction: prefix and span are one range
    first = prompt_first[prompt_of]
    start = np.where(touches, first, seg_begin[item_seg[oldest]])
    prefix_stop = np.where(touches, first, first + counts.prefix[prompt_of])

    # The inverse: an interaction's tokens are seen up to the end of interaction i + n of the same prompt.
    newest = np.minimum(np.arange(num_inter) + reach, inter_end[prompt_of] - 1)
    is_target = t >= (counts.interactions - counts.targets)[prompt_of]
    targets_before = np.append(0, np.cumsum(is_target))  # (I + 1,) [SUM] rows of earlier interactions
    seen_to = (seg_begin[item_seg + 1] + counts.label)[newest]

    def per_token(prefix: np.ndarray | int, item: np.ndarray | int, label: np.ndarray | int) -> np.ndarray:
        value = np.empty(len(seg_len), np.int32)
        value[prefix_seg], value[item_seg], value[item_seg + 1] = prefix, item, label
        return np.repeat(value, seg_len)

    tokens, target = np.arange(num_context, dtype=np.int32), np.flatnonzero(is_target)
    sum_stop = seg_begin[item_seg + 1][target]
    first_of_token = per_token(prompt_first, first, first)
    rows = np.empty((NUM_ROW_FIELDS, num_context + len(target)), np.int32)
    for field, context, sums in (
        (PROMPT_FIRST, first_of_token, first[target]),
        (PREFIX_STOP, per_token(prompt_first, prefix_stop, prefix_stop), prefix_stop[target]),
        (START, per_token(prompt_first, start, start), start[target]),
        (STOP, tokens + 1, sum_stop),
        (RESET_ID, per_token(PREFIX_RESET_ID, t, t), t[target]),
        (POSITION, tokens - first_of_token, sum_stop - first[target]),
        (INTERACTION, per_token(PREFIX_INTERACTION, t, t), t[target]),
    ):
        rows[field, :num_context], rows[field, num_context:] = context, sums
    keys = [
        per_token(np.append(prompt_first[1:], num_context), seen_to, seen_to),
        per_token(targets_before[inter_first], targets_before[:-1], targets_before[1:]),
        per_token(targets_before[inter_end], targets_before[newest + 1], targets_before[newest + 1]),
        per_token(0, 1, 0),
    ]
    return rows, np.stack(keys)


def _mean_span(rows: np.ndarray, keys: np.ndarray) -> int:
    """Mean number of keys that context rows see, to the nearest of 256, 512 and 1024."""
    num_context = keys.shape[1]
    total = rows[: STOP + 1, :num_context].sum(1, dtype=np.int64)
    visible = int(total[STOP] - total[START] + total[PREFIX_STOP] - total[PROMPT_FIRST])
    mean = visible / max(num_context, 1)
    return 256 if mean < 362 else 512 if mean < 724 else 1024


def _to_device(
    rows: np.ndarray, keys: np.ndarray, device: torch.device | str | None
) -> tuple[Tensor, Tensor]:
    """Both arrays through one buffer: pinned and asynchronous where there is a device to copy to."""
    buffer = torch.from_numpy(np.concatenate([rows.ravel(), keys.ravel()]))
    if device is not None and torch.device(device).type != "cpu":
        buffer = buffer.pin_memory() if torch.cuda.is_available() else buffer
        buffer = buffer.to(device, non_blocking=True)
    return buffer[: rows.size].view(rows.shape), buffer[rows.size :].view(keys.shape)
