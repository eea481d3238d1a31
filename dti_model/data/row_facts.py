"""The interactions of a data set as contexts are made of them (`contexts.py`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dti_model.data.coded_texts import Codes
from dti_model.data.split import TEST, TRAIN, VAL
from dti_model.data.times import seconds_of

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class RowFacts:
    """Arrays are (I,), rows user after user, each in time order.

    Attributes:
        offsets: (U + 1,) int64, user u owns rows `offsets[u]:offsets[u + 1]`.
        item: index of the item.
        label: 0 or 1.
        timestamp: in `unit`.
        by_time: the rows in the global order.
        split: codes of `split.py`.
        unit: as stats["timestamp_unit"].
        timezone: name of an IANA time zone.
        place: the file or folder, for messages.
        item_texts: of every item, by index.
    """

    offsets: Rows
    item: npt.NDArray[np.int32]
    label: npt.NDArray[np.int8]
    timestamp: Rows
    by_time: Rows
    split: npt.NDArray[np.int8]
    unit: str
    timezone: str
    place: str
    item_texts: Iterable[str] = ()

    def user(self) -> Rows:
        """User index of every row."""
        return np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))

    def seconds(self) -> Rows:
        """Seconds since 1970.

        Raises:
            DataError: the time stamps are no dates.
        """
        seconds: Rows = seconds_of(self.timestamp, self.unit, self.place)
        return seconds

    def codes_as_read(self, codes_among: Callable[[npt.NDArray[np.bool_]], Codes]) -> Codes:
        """Codes of what counts earlier rows: up to a user's last training target, no validation or test target is counted.

        Args:
            codes_among: the codes of all rows, each counting the earlier ones among those of a mask.
        """
        codes = codes_among(np.ones(len(self.item), bool))
        is_scored, trains, stamps = np.isin(self.split, (VAL, TEST)), self.split == TRAIN, self.timestamp
        # Where the split is by time, no validation or test target is earlier than a training target.
        if is_scored.any() and trains.any() and stamps[is_scored].min() < stamps[trains].max():
            user, rows = self.user(), np.arange(len(self.item))
            last = np.full(len(self.offsets) - 1, -1)
            last[user[trains]] = rows[trains]  # of several the last one is kept
            is_read = rows <= last[user]
            codes = np.where(is_read, codes_among(~is_scored), codes).astype(np.int32)
        return codes
