"""Blocks of neighbouring rows and the keys that they see: how the CPU implementation walks a layout, and its visibility as bias.

A row sees the columns from `low` to `high` of its block's keys, and a few vectorised operators write that as a bias. Where it sees a
prefix beside its span (instructions, or the history of candidates), only the columns of prefixes are compared key by key.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dti_kernels.layout import PREFIX_STOP, PROMPT_FIRST, START, STOP

# Bias of a key that a row does not see, per key that it lies outside: beyond any score. The largest has 31 bits more.
HIDDEN = {torch.float32: 2.0**96, torch.float64: 2.0**900}
# Several blocks in a chunk copy their keys; a block of more keys is a chunk of its own, whose keys are a slice. A cut prompt of more
# rows is walked in blocks: as one call, its bias is a square.
WIDE = 1024


class Ends(NamedTuple):
    """First and last visible column of rows, `(rows x R, 1)`, counted in the keys of their block, and the columns. All are times
    HIDDEN: how far a column lies outside is the bias that hides it, and differences of multiples of a power of two are exact."""

    low: Tensor
    high: Tensor
    columns: Tensor

    @staticmethod
    def of(
        start: Tensor, stop: Tensor, block: int, per_group: int, num_keys: int, dtype: torch.dtype
    ) -> Ends:
        base = start[::block].repeat_interleave(block)[: len(start)]

        def scaled(x: Tensor) -> Tensor:
            return x.to(dtype).mul_(HIDDEN[dtype])

        low, high = (scaled(x - base).repeat_interleave(per_group)[:, None] for x in (start, stop - 1))
        return Ends(low, high, scaled(torch.arange(num_keys)))

    def of_blocks(self, first: int, num_blocks: int, size: int) -> Ends:
        """Those of `num_blocks` blocks of `size` rows times R from row times R `first` on, `(B, M R, 1)`."""
        rows = slice(first, first + num_blocks * size)
        return Ends(
            self.low[rows].view(num_blocks, size, 1), self.high[rows].view(num_blocks, size, 1), self.columns
        )


@dataclass(frozen=True, eq=False)
class Chunk:
    """`B` blocks of `M` neighbouring rows from row `first` on, block b against its `N` keys.

    Keys of a block: the prefix of its first row's prompt where that lies apart, then the span from the first row's start to the
    last row's stop. The prefix of any later prompt in the block lies inside that span.
    """

    first: int
    num_blocks: int
    block: int
    spans: list[tuple[int, int, int, int]]  # per block: prefix first and stop, span first and stop
    num_prefix: int  # keys of the prefix part
    num_keys: int  # N
    all_prefix: bool  # every row sees all keys of the prefix part
    inner_prefixes: list[
        tuple[int, int, int]
    ]  # block, and columns of its span with prefixes seen beside spans
    ends: Ends
    all_first: int  # of the span's columns, [all_first, all_stop) are visible to every row of their block
    all_stop: int
    num_context: int

    @cached_property
    def keys(self) -> Tensor:
        """`(B, N)`: prefix and span of every block, each part filled up with C, which nobody sees."""
        prefix_first, prefix_stop, key_first, key_stop = torch.tensor(self.spans, dtype=torch.int32).T[
            ..., None
        ]
        prefix_keys = prefix_first + torch.arange(self.num_prefix, dtype=torch.int32)
        span_keys = key_first + torch.arange(self.num_keys - self.num_prefix, dtype=torch.int32)
        prefix_keys.masked_fill_(prefix_keys >= prefix_stop, self.num_context)
        span_keys.masked_fill_(span_keys >= key_stop, self.num_context)
        return torch.cat([prefix_keys, span_keys], 1)

    @cached_property
    def read_keys(self) -> Tensor:
        """`(B, N)`: keys, with some row in the place of those that nobody sees."""
        return self.keys.clamp_max(self.num_context - 1)

    @property
    def rows(self) -> slice:
        return slice(self.first, self.first + self.num_blocks * self.block)

    def query_rows(self, num_skipped: int) -> slice:
        """Where the rows are in tensors that leave out the first `num_skipped` rows."""
        return slice(self.rows.start - num_skipped, self.rows.stop - num_skipped)

    def row_field(self, rows: Tensor, field: int) -> Tensor:
        """`(B, M, 1)` of a row field."""
        return rows[field, self.rows].view(self.num_blocks, self.block, 1)

    def blocks(self, x: Tensor) -> Tensor:
        """`(G, B M, R, D)` to `(G B, M R, D)`."""
        return x.reshape(x.shape[0] * self.num_blocks, self.block * x.shape[2], x.shape[3])

    def by_block(self, x: Tensor) -> Tensor:
        """Rows of the chunk, `(G, B M, R, D)`, to `(B, G, M R, D)`; a view where R = 1."""
        split: Tensor = x.unflatten(1, (self.num_blocks, self.block))
        return split.transpose(0, 1).flatten(2, 3)

    def from_block(self, x: Tensor, per_group: int) -> Tensor:
        """`(B, G, M R, D)` back to `(G, B M, R, D)`."""
        split: Tensor = x.unflatten(2, (self.block, per_group))
        return split.transpose(0, 1).flatten(1, 2)

    def gather(self, x: Tensor) -> Tensor:
        """`(G, T or C, D)` to the keys of every block, `(B, G, N, D)`; a view of one block's slice."""
        if self._is_slice:
            return x[None, :, self.spans[0][2] : self.spans[0][3]]
        rows = F.embedding(self.read_keys.view(-1), x.transpose(0, 1).flatten(1)).view(
            *self.keys.shape, x.shape[0], x.shape[2]
        )
        return rows.transpose(1, 2)

    def gather_by_group(self, x: Tensor) -> Tensor:
        """The same as `(G B, N, D)`."""
        return self.gather(x).transpose(0, 1).flatten(0, 1)

    @cached_property
    def _places(self) -> tuple[slice, Tensor, Tensor]:
        """The rows that hold the keys of all blocks, and per row the places in `keys` where it stands: their positions, row after
        row, and where each row's begin."""
        keys = self.keys.view(-1).long()
        positions = torch.argsort(keys, stable=True)[: int((keys < self.num_context).sum())]
        first = int(keys[positions[0]])
        counts = torch.bincount(keys[positions] - first)
        return slice(first, first + len(counts)), positions, counts.cumsum(0) - counts

    def add_to_keys(self, x: Tensor, values: Tensor) -> None:
        """Add `(B, G, N, D)` to the keys in `x (G, T or C, D)`, a key's blocks in order."""
        if self._is_slice:
            x[:, self.spans[0][2] : self.spans[0][3]] += values[0]
            return
        rows, positions, offsets = self._places
        flat = values.transpose(1, 2).reshape(self.keys.numel(), -1)
        # Unlike index_add_, a sum per row: in a fixed order and on all threads.
        added = torch.embedding_bag(flat, positions, offsets, mode=0)[0]
        x[:, rows] += added.view(-1, x.shape[0], x.shape[2]).transpose(0, 1)

    def add_to_keys_by_group(self, x: Tensor, values: Tensor) -> None:
        """The same from `(G B, N, D)`."""
        self.add_to_keys(x, values.unflatten(0, (-1, self.num_blocks)).transpose(0, 1))

    @property
    def _is_slice(self) -> bool:
        return self.num_blocks == 1 and not self.num_prefix

    def num_scores(self, per_group: int) -> int:
        """Of one key head."""
        return self.num_blocks * self.block * per_group * self.num_keys

    def bias(self, rows: Tensor, per_group: int, memory: Tensor) -> Tensor:
        """`(B, 1, M R, N)`: 0 where a row sees a key, at most -HIDDEN where it does not; a view of `memory`."""
        bias = memory[: self.num_scores(per_group)].view(self.num_blocks, -1, self.num_keys)
        low, high, columns = self.ends
        of_prefix, of_span = bias[..., : self.num_prefix], bias[..., self.num_prefix :]
        if self.all_prefix:
            of_prefix.zero_()
        else:
            seen = self._sees_prefix(rows, self.keys[:, None, : self.num_prefix], slice(None))
            of_prefix.unflatten(1, (self.block, per_group)).copy_(~seen[:, :, None]).mul_(-HIDDEN[bias.dtype])
        left, right = self.all_first, self.all_stop
        columns = columns[: of_span.shape[2]]
        if left <= right:  # columns between them hide from nobody
            torch.sub(columns[:left], low, out=of_span[..., :left]).clamp_max_(0)
            of_span[..., left:right].zero_()
            torch.sub(high, columns[right:], out=of_span[..., right:]).clamp_max_(0)
        else:
            torch.minimum(torch.sub(columns, low, out=of_span), high - columns, out=of_span).clamp_max_(0)
        for block, first, stop in self.inner_prefixes:
            begin = self.spans[block][2]
            keys = torch.arange(begin + first, begin + stop, dtype=torch.int32)
            seen = self._sees_prefix(rows, keys, slice(block, block + 1))
            inner = of_span[block, :, first:stop].unflatten(0, (self.block, per_group))
            inner.masked_fill_(seen[0, :, None], 0)
        return bias[:, None]

    def _sees_prefix(self, rows: Tensor, keys: Tensor, blocks: slice) -> Tensor:
        """`(B, M, n)`: which rows of some blocks see which keys as a prefix beside their span."""
        first, stop = (self.row_field(rows, field)[blocks] for field in (PROMPT_FIRST, PREFIX_STOP))
        return (keys >= first) & (keys < stop)

    def blend_(self, x: Tensor, other: Tensor, ratio: Tensor) -> None:
        """Turn `x (G B, M R, N)` into `(1 - ratio) x + ratio other`, `ratio (B, M, N)`."""
        self._by_head(x).lerp_(self._by_head(other), ratio[:, :, None])

    def times_block(self, x: Tensor, per_pair: Tensor) -> Tensor:
        """`(G B, M R, N)` times `(B, M, N)`."""
        return (self._by_head(x) * per_pair[:, :, None]).view_as(x)

    def _by_head(self, x: Tensor) -> Tensor:
        """`(G B, M R, N)` as `(G, B, M, R, N)`."""
        return x.view(-1, self.num_blocks, self.block, x.shape[1] // self.block, x.shape[2])


class RowTable(NamedTuple):
    """Rows of a layout, and what of the inputs decides how they are walked.

    Attributes:
        fields: row fields of the layout.
        num_context: rows that are context tokens.
        per_group: query heads of a key head, R.
        dtype: that scores are computed in.
    """

    fields: Tensor
    num_context: int
    per_group: int
    dtype: torch.dtype

    def chunks(self, first: int, stop: int, block: int, max_pairs: int) -> list[Chunk]:
        """Chunks of the rows `[first, stop)`, in blocks of `block` rows."""
        return list(_chunks(self, first, stop, block, max_pairs))


class Prompt(NamedTuple):
    """Context rows of one prompt that are one causal call against all of its keys.

    Attributes:
        rows: where they are.
        cut: None where every row sees the prompt from its beginning; else the prompt as one block of its rows, one head each.
    """

    rows: slice
    cut: Chunk | None


def whole_prompts(table: RowTable, min_rows: int, block: int) -> list[Prompt]:
    """Prompts of at least `min_rows` rows whose rows see most of the prompt: blocks of `block` rows would meet as many keys."""
    fields = table.fields[:, : table.num_context].numpy()
    _, first, counts = np.unique(fields[PROMPT_FIRST], return_index=True, return_counts=True)
    if not len(first):
        return []
    longest = np.maximum.reduceat(fields[STOP] - fields[START], first)
    uncut = fields[START, first + counts - 1] == first
    chosen = (counts >= min_rows) & (uncut | ((counts <= longest + block) & (counts <= WIDE)))
    by_head = table._replace(per_group=1)
    return [
        Prompt(slice(a, a + n), None if whole else by_head.chunks(a, a + n, n, n * n)[0])
        for a, n, whole in zip(first[chosen].tolist(), counts[chosen].tolist(), uncut[chosen].tolist())
    ]


def _chunks(table: RowTable, first: int, stop: int, block: int, max_pairs: int) -> Iterator[Chunk]:
    """Starts and stops of rows never decrease; a short last block is a chunk of its own."""
    if first == stop:
        return
    heads = range(first, stop, block)
    tails = [min(row + block, stop) - 1 for row in heads]
    head, tail = table.fields[:, list(heads)].tolist(), table.fields[:, tails].tolist()
    spans = list(zip(head[PROMPT_FIRST], head[PREFIX_STOP], head[START], tail[STOP]))
    of_rows, per_group = table.fields[:, first:stop], table.per_group
    longest = max(span[3] - span[2] for span in spans)
    ends = Ends.of(of_rows[START], of_rows[STOP], block, per_group, longest, table.dtype)
    prefixes = _Prefixes.of(of_rows, [row - first for row in heads], [row - first for row in tails])
    begin = 0
    while begin < len(spans):
        end, num_prefix, num_span = begin, 0, 0
        while end < len(spans):
            prefix_first, prefix_stop, key_first, key_stop = spans[end]
            wider = max(num_prefix, prefix_stop - prefix_first), max(num_span, key_stop - key_first)
            is_short = tails[end] - heads[end] + 1 < block
            is_large = (end + 1 - begin) * block * sum(wider) > max_pairs or sum(wider) > WIDE
            if end > begin and (is_large or is_short):
                break
            end, (num_prefix, num_span) = end + 1, wider
        size = tails[begin] - heads[begin] + 1
        yield Chunk(
            first=heads[begin],
            num_blocks=end - begin,
            block=size,
            spans=spans[begin:end],
            num_prefix=num_prefix,
            num_keys=num_prefix + num_span,
            all_prefix=all(seen == num_prefix for seen in prefixes.seen_by_all[begin:end]),
            inner_prefixes=[
                (block - begin, *prefixes.inner[block])
                for block in range(begin, end)
                if block in prefixes.inner
            ],
            ends=ends.of_blocks((heads[begin] - first) * per_group, end - begin, size * per_group),
            all_first=max(seen - span[2] for seen, span in zip(tail[START][begin:end], spans[begin:end])),
            all_stop=min(seen - span[2] for seen, span in zip(head[STOP][begin:end], spans[begin:end])),
            num_context=table.num_context,
        )
        begin = end


class _Prefixes(NamedTuple):
    """What blocks see of prefixes beside the spans of their rows.

    Attributes:
        seen_by_all: per block, tokens of the one prefix that all of its rows see, 0 where no row sees any, -1 otherwise.
        inner: of blocks whose span holds prefixes that rows see beside theirs, the columns that they lie in.
    """

    seen_by_all: list[int]
    inner: dict[int, tuple[int, int]]

    @staticmethod
    def of(rows: Tensor, heads: list[int], tails: list[int]) -> _Prefixes:
        """Of blocks that begin and end with the given rows."""
        first, stop, start = (rows[field].numpy() for field in (PROMPT_FIRST, PREFIX_STOP, START))
        tokens = stop - first
        if not tokens.any():
            return _Prefixes([0] * len(heads), {})
        fewest, most = np.minimum.reduceat(tokens, heads), np.maximum.reduceat(tokens, heads)
        alike = (most == 0) | ((fewest == most) & (first[heads] == first[tails]))
        base = np.repeat(start[heads], np.diff([*heads, len(tokens)]))
        inside = (tokens > 0) & (first >= base)
        begins = np.minimum.reduceat(np.where(inside, first - base, 2**30), heads)
        ends = np.maximum.reduceat(np.where(inside, stop - base, 0), heads)
        inner = {int(b): (int(begins[b]), int(ends[b])) for b in np.flatnonzero(ends)}
        return _Prefixes(np.where(alike, most, -1).tolist(), inner)


class Sizes(NamedTuple):
    """Of blocks in rows, of chunks in (row, key) pairs, the rows from which a prompt can be one call, and what is kept of biases."""

    context_block: int
    context_pairs: int
    sum_block: int
    sum_pairs: int
    prompt_rows: int
    kept_scores: int


@dataclass(frozen=True)
class Plan:
    """How all rows of a layout are walked: prompts that are one call, chunks of the context rows between them, and chunks of the
    [SUM] rows. The first biases are kept for the next layer or pass: at most `kept_scores` numbers in all."""

    prompts: list[Prompt]
    context: list[Chunk]
    sums: list[Chunk]
    kept_scores: int
    kept: dict[Chunk, Tensor]

    @staticmethod
    def of(table: RowTable, num_skipped: int, sizes: Sizes) -> Plan:
        """The plan of queries that leave out the first `num_skipped` rows: none, or all context rows."""
        prompts = [] if num_skipped else whole_prompts(table, sizes.prompt_rows, sizes.context_block)
        context: list[Chunk] = []
        first, stop = num_skipped, table.num_context
        for rows in [*(prompt.rows for prompt in prompts), slice(stop, stop)]:
            context += table.chunks(first, rows.start, sizes.context_block, sizes.context_pairs)
            first = rows.stop
        block = min(sizes.sum_block, _sum_block(table.fields[:, stop:]))
        sums = table.chunks(stop, table.fields.shape[1], block, sizes.sum_pairs)
        return Plan(prompts, context, sums, sizes.kept_scores, {})

    def bias(self, chunk: Chunk, rows: Tensor, per_group: int, buffer: list[Tensor]) -> Tensor:
        """The bias of one of the chunks; one that is not kept lies in the buffer, since fresh megabytes cost their page faults."""
        if chunk in self.kept:
            return self.kept[chunk]
        needed = chunk.num_scores(per_group)
        if needed + sum(bias.numel() for bias in self.kept.values()) <= self.kept_scores:
            self.kept[chunk] = chunk.bias(rows, per_group, buffer[0].new_empty(needed))
            return self.kept[chunk]
        if needed > buffer[0].numel():
            buffer[0] = buffer[0].new_empty(needed)
        return chunk.bias(rows, per_group, buffer[0])


def _sum_block(sums: Tensor) -> int:
    """[SUM] rows that see about as many keys apart as together: few where they lie far apart, as with one target per prompt."""
    if not sums.shape[1]:
        return 1
    spans, prefixes = sums[STOP].long() - sums[START], sums[PREFIX_STOP].long() - sums[PROMPT_FIRST]
    seen, apart = int((spans + prefixes).sum()), int(sums[STOP, -1] - sums[STOP, 0])
    return max(1, seen // max(apart, 1))
