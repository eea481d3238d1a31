"""Checks of numbers and token counts: only integers are taken for integers, and no sum of counts overflows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np

Lengths = Sequence[int] | np.ndarray

# Rows of a layout, and with them any count of tokens: row numbers are int32, and a prefix row's reset id lies beyond all others.
MAX_ROWS = 2**30


def integer(name: str, value: Any, least: int, below: int = 2**63) -> int:
    """`value` as an int.

    Raises:
        TypeError: it is no integer; a bool is none.
        ValueError: it is not in [least, below).
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an integer >= {least}, got {shown(value)}")
    if not least <= value < below:
        most = "" if value < least else f" and < {below:,}"
        raise ValueError(f"{name} must be an integer >= {least}{most}, got {shown(value)}")
    return int(value)


def real(name: str, value: float) -> float:
    """`value` as a float, infinite if an int is too large for one. Raises TypeError if it is no number; a bool is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name} must be a number, got {shown(value)}")
    return math.inf if isinstance(value, int) and abs(value) >= 2**1023 else float(value)


def shown(value: Any) -> str:
    """A wrong argument as messages show it: the value if it is short, else its type."""
    if value is None or isinstance(value, (bool, int, float, complex, str, np.generic)):
        try:
            text = repr(value)
        except ValueError:  # an int of thousands of digits
            text = ""
        if 0 < len(text) <= 40:
            return text
    return f"a value of type {type(value).__name__}"


def counts_of(name: str, values: Any) -> np.ndarray:
    """A sequence of integers as `(n,)` int64. An array of floats is refused unless it is empty."""
    return _int64(_sequence(name, values), lambda place: f"{name}[{place}]")


def nested_counts_of(name: str, values: Any) -> tuple[np.ndarray, np.ndarray]:
    """A sequence of sequences of integers: all of them, one after the other, and `(P,)` the length of each."""
    parts = _sequence(name, values, "sequences of integers")
    kinds = set(map(type, parts))
    if not kinds <= {list, tuple}:
        parts = [_sequence(f"{name}[{i}]", part) for i, part in enumerate(parts)]
    sizes = np.fromiter(map(len, parts), np.int64, len(parts))
    if kinds == {np.ndarray} and all(isinstance(part, np.ndarray) for part in parts):
        return np.concatenate(parts), sizes
    flat = list(chain.from_iterable(parts))
    return _int64(flat, lambda place: f"{name}{_indices(sizes, place)}"), sizes


def _indices(sizes: np.ndarray, place: int) -> str:
    stops = np.cumsum(sizes)
    part = int(np.searchsorted(stops, place, side="right"))
    return f"[{part}][{place - int(stops[part] - sizes[part])}]"


def _sequence(name: str, values: Any, of: str = "integers") -> Any:
    """Any sequence unchanged, an array of integers as int64. Raises TypeError for everything else."""
    if type(values) is list or type(values) is tuple:
        return values
    if isinstance(values, np.ndarray) and of == "integers":
        is_masked = isinstance(values, np.ma.MaskedArray)
        if values.ndim != 1 or is_masked or (values.size and values.dtype.kind not in "iu"):
            raise TypeError(
                f"{name} must be a sequence of integers, got a {type(values).__name__} of {values.dtype} of shape {values.shape}"
            )
        # uint64 would wrap: its numbers are looked at one by one.
        return (
            values.tolist() if values.dtype == np.uint64 else np.asarray(values.astype(np.int64, copy=False))
        )
    is_sequence = isinstance(values, Sequence) and not isinstance(values, (str, bytes, bytearray, memoryview))
    if not is_sequence and not (isinstance(values, np.ndarray) and values.ndim):
        raise TypeError(f"{name} must be a sequence of {of}, got {shown(values)}")
    return values


def _int64(values: Any, named: Callable[[int], str]) -> np.ndarray:
    """The integers of a sequence. Every number is checked: NumPy would make an integer of 3.7, of True and of "3"."""
    if isinstance(values, np.ndarray):
        return values
    kinds = set(map(type, values))
    if kinds != {int}:
        wrong = [kind for kind in kinds if kind is bool or not issubclass(kind, (int, np.integer))]
        for place, value in enumerate(values if wrong else ()):
            if type(value) in wrong:
                raise TypeError(f"{named(place)} must be an integer, got {shown(value)}")
    try:
        return np.fromiter(values, np.int64, len(values))
    except OverflowError:
        place, value = next((i, x) for i, x in enumerate(values) if not -(2**63) <= int(x) < 2**63)
        raise ValueError(f"{named(place)} must be an integer of 64 bits, got {shown(value)}") from None


def check_counts(name: str, values: np.ndarray, sizes: np.ndarray | None, least: int) -> None:
    """Raise ValueError, with the place, unless all are in [least, MAX_ROWS). `sizes`: of the parts of a nested sequence."""
    # As unsigned numbers, counts below `least` lie above all others.
    outside = (values - least if least else values).view(np.uint64) >= MAX_ROWS - least
    if outside.any():
        bad = np.flatnonzero(outside)
        place, value = int(bad[0]), int(values[bad[0]])
        indices = f"[{place}]" if sizes is None else _indices(sizes, place)
        bound = f">= {least}" if value < least else f"< {MAX_ROWS:,} tokens"
        raise ValueError(f"{name}{indices} must be {bound}, got {value}")


def check_num_rows(num_rows: int) -> None:
    """Raise ValueError where a layout would have too many rows."""
    if num_rows >= MAX_ROWS:
        raise ValueError(f"a layout holds fewer than 2**30 rows, got {num_rows}: pack smaller batches")


def check_num_prompts(name: str, values: np.ndarray, num_prompts: int) -> None:
    """Raise ValueError unless there is one entry per prompt."""
    if len(values) != num_prompts:
        raise ValueError(f"{name} must have one entry per prompt ({num_prompts}), got {len(values)}")


@dataclass(frozen=True)
class Counts:
    """Checked token counts: interactions of all prompts one after the other, `I` of them in `P` prompts."""

    item: np.ndarray  # (I,)
    label: np.ndarray  # (I,)
    interactions: np.ndarray  # (P,)
    targets: np.ndarray  # (P,), at most `interactions`
    prefix: np.ndarray  # (P,)
    window: int
    num_rows: int

    @staticmethod
    def check(
        item_lengths: Sequence[Lengths],
        label_lengths: Sequence[Lengths],
        window: int,
        prefix_lengths: Lengths | None,
    ) -> Counts:
        """Counts without targets."""
        item, interactions = nested_counts_of("item_lengths", item_lengths)
        label, labels = nested_counts_of("label_lengths", label_lengths)
        prefix = targets = np.zeros(len(interactions), np.int64)
        check_num_prompts("label_lengths", labels, len(interactions))
        if prefix_lengths is not None:
            prefix = counts_of("prefix_lengths", prefix_lengths)
            check_num_prompts("prefix_lengths", prefix, len(interactions))
            check_counts("prefix_lengths", prefix, None, 0)
        different = interactions != labels
        if different.any():
            prompt = int(np.flatnonzero(different)[0])
            raise ValueError(
                f"prompt {prompt}: item_lengths has {interactions[prompt]} interactions, label_lengths {labels[prompt]}"
            )
        check_counts("item_lengths", item, interactions, 1)
        check_counts("label_lengths", label, interactions, 0)
        num_rows = int(item.sum() + label.sum() + prefix.sum())
        check_num_rows(num_rows)
        return Counts(item, label, interactions, targets, prefix, integer("window", window, 0), num_rows)

    def with_targets(self, num_targets: Lengths) -> Counts:
        """The same with targets, at most all interactions of a prompt."""
        targets = counts_of("num_targets", num_targets)
        check_num_prompts("num_targets", targets, len(self.interactions))
        targets = np.minimum(targets, self.interactions)
        check_counts("num_targets", targets, None, 0)
        num_rows = self.num_rows + int(targets.sum())
        check_num_rows(num_rows)
        return replace(self, targets=targets, num_rows=num_rows)
