"""Which targets are train, validation and test: by shares of time, by dates, or as a column of the log says.

shares   8 : 1 : 1 of the targets in the order of time, over all users or within each
dates    before `val_from`, before `test_from`, and the others
column   the words train, val (valid, validation, dev) and test; an empty value is context only
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import numpy.typing as npt

from dti_model.data.errors import DataError
from dti_model.data.split import SPLIT_CODES, SplitKind, assign_split, code_of_word, split_at, without_early
from dti_model.data.times import Clock, Moment, parsed_moment

if TYPE_CHECKING:
    from dti_model.data.index import Indexed
    from dti_model.data.sources import RawData, Source

_Codes = npt.NDArray[np.int8]


@dataclass(frozen=True)
class SplitRule:
    """What `prepare` was asked for; a source with a column of splits is its own rule.

    Attributes:
        kind: shares of the targets; None: "global", unless something else divides them.
        val_from, test_from: where validation and test begin: dates, date-times (UTC unless they say otherwise) or time stamps.
    """

    kind: SplitKind | None = None
    val_from: Moment | None = None
    test_from: Moment | None = None

    def check(self, source: Source) -> None:
        """Raise a ValueError where the rule, or it and the source, contradict themselves."""
        if self.kind is not None and self.kind not in get_args(SplitKind):
            raise ValueError(f"split must be one of {', '.join(get_args(SplitKind))}, but is {self.kind!r}")
        given = [name for name in ("val_from", "test_from") if getattr(self, name) is not None]
        if len(given) == 1:
            missing = "test_from (--test-from)" if given == ["val_from"] else "val_from (--val-from)"
            raise ValueError(
                f"{given[0]} needs {missing} beside it: validation begins at the one and test at the other"
            )
        rules = {
            "split (--split)": self.kind is not None,
            "val_from with test_from": bool(given),
            "split_column": getattr(source, "split_column", None) is not None,
        }
        chosen = [name for name, is_given in rules.items() if is_given]
        if len(chosen) > 1:
            raise ValueError(f"{' and '.join(chosen)} each divide the targets: keep one of them")
        if given:
            self._moments()

    def assigned(
        self, raw: RawData, data: Indexed, by_time: npt.NDArray[np.int64], min_context: int
    ) -> tuple[_Codes, dict[str, Any]]:
        """The split code of every row, and what stats.json says of the rule.

        Raises:
            DataError: dates cannot be compared with the time stamps, or a named split has no target.
        """
        if raw.split_column is not None:
            return _by_column(raw, raw.split_column, data, min_context)
        if self.val_from is not None:
            return self._by_dates(raw, data, min_context)
        kind = self.kind or "global"
        return assign_split(data.offsets, by_time, kind, min_context), {"split": kind}

    def _moments(self) -> list[Any]:
        moments: list[Any] = []
        for name in ("val_from", "test_from"):
            moments.append(parsed_moment(getattr(self, name), name))
        if type(moments[0]) is type(moments[1]) and not moments[0] < moments[1]:
            raise self._not_after()
        return moments

    def _not_after(self) -> ValueError:
        return ValueError(
            f"test_from must be later than val_from, but {self.test_from} is not later than {self.val_from}"
        )

    def _by_dates(self, raw: RawData, data: Indexed, min_context: int) -> tuple[_Codes, dict[str, Any]]:
        first, last = int(data.timestamp.min()), int(data.timestamp.max())
        clock = Clock(raw.timestamp_unit, first, last, str(raw.interactions_path))
        val_from, test_from = map(clock.stamp, self._moments())
        if val_from >= test_from:
            raise self._not_after()
        split = without_early(split_at(data.timestamp, val_from, test_from), data.offsets, min_context)
        if missing := _without_targets(split):
            raise DataError(
                f"{raw.interactions_path}: no target is {' or '.join(missing)}. Validation begins at {clock.shown(val_from)} and test at "
                f"{clock.shown(test_from)}, and interactions are from {clock.shown(first)} to {clock.shown(last)}. Choose val_from and "
                f"test_from between (a target needs {min_context} earlier interactions of its user)"
            )
        return split, {"split": "date", "split_rule": {"val_from": val_from, "test_from": test_from}}


def _by_column(raw: RawData, column: str, data: Indexed, min_context: int) -> tuple[_Codes, dict[str, Any]]:
    values, words = data.extra[column]
    named = np.array([code_of_word(word) for word in words], np.int8)[values]
    split = without_early(named, data.offsets, min_context)
    early = {name: int(((named == code) & (split != code)).sum()) for name, code in SPLIT_CODES.items()}
    if missing := _without_targets(split):
        taken = [f"{early[name]:,} {name}" for name in missing if early[name]]
        why = f" (min_context = {min_context} took {', '.join(taken)} away)" if taken else ""
        raise DataError(
            f"{raw.interactions_path}: no target is {' or '.join(missing)} by column {column}{why}. It must name all three of "
            f"{', '.join(SPLIT_CODES)}; min_context = 0 (--min-context 0) keeps all that it names"
        )
    return split, {"split": "column", "split_rule": {"column": column, "without_context": early}}


def _without_targets(split: _Codes) -> list[str]:
    return [name for name, code in SPLIT_CODES.items() if not (split == code).any()]
