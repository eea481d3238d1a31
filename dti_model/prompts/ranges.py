"""Which interactions a prompt is made of: ranges of one user's rows, context and targets."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dti_model.data import PreparedData, ranges

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Prompts:
    """Ranges of interaction rows, one prompt each: context `[first, context_stop)`, targets `[first_target, stop)`.

    The context ends where the targets begin, unless rows in between are left out (`strict`).
    """

    first: IntArray
    first_target: IntArray
    stop: IntArray
    context_stop: IntArray

    @staticmethod
    def of(first: IntArray, first_target: IntArray, stop: IntArray) -> Prompts:
        """Prompts whose context reaches to their first target."""
        return Prompts(first, first_target, stop, first_target)

    @staticmethod
    def streaming(data: PreparedData, rows: IntArray, window: int, k: int | None) -> Prompts:
        """Cut target rows into prompts of at most `k` targets of one user (None: as many as follow each other).

        Args:
            data: the histories.
            rows: `(S,)` interaction rows that are targets, in any order.
            window: interactions of context before the first target, fewer where the history begins.
            k: targets per prompt, >= 1; 1 gives sliding-window prompts.

        Raises:
            ValueError: k < 1.
        """
        if k is not None and k < 1:
            raise ValueError(f"k must be >= 1 targets per prompt, got {k}")
        rows = np.sort(np.asarray(rows, np.int64))
        in_run, _ = _runs(data, rows)
        return Prompts._beginning_at(data, rows, in_run == 0 if k is None else in_run % k == 0, window)

    @staticmethod
    def sliding_windows(data: PreparedData, rows: IntArray, window: int) -> Prompts:
        """Prompts that give every target what a k = 1 prompt gives it, in fewer tokens.

        A user's first `window + 1` interactions lie in each other's windows: targets among them share one prompt, in which
        nothing is seen that a prompt of their own would not show. Later targets get a prompt each.
        Arguments as in `streaming`.
        """
        rows = np.sort(np.asarray(rows, np.int64))
        in_run, place = _runs(data, rows)
        return Prompts._beginning_at(data, rows, (in_run == 0) | (place > window), window)

    @staticmethod
    def strict(data: PreparedData, rows: IntArray, window: int) -> Prompts:
        """A prompt for each target, whose context is strictly older: nothing of the target's own time stamp.

        A log may hold what a user did in one second in any order, and labels of one second were not known to each other.
        Arguments as in `streaming`.
        """
        rows = np.sort(np.asarray(rows, np.int64))
        history = data.history_offsets[data.users_of(rows)]
        stop = first_of_time(data, rows)
        return Prompts(np.maximum(history, stop - window), rows, rows + 1, stop)

    @staticmethod
    def _beginning_at(
        data: PreparedData, rows: IntArray, begins: npt.NDArray[np.bool_], window: int
    ) -> Prompts:
        """Prompts over ascending target rows, cut where `begins` is true."""
        first_index = np.flatnonzero(begins)
        # A prompt's last target is the one before the next prompt's first. The slice serves no rows at all: no prompts then.
        last_index = np.append(first_index[1:], len(rows))[: len(first_index)] - 1
        first_target = rows[first_index]
        # Rows of all users lie in one array: the window must not reach back into the user before.
        history = data.history_offsets[data.users_of(first_target)]
        return Prompts.of(np.maximum(history, first_target - window), first_target, rows[last_index] + 1)

    def __len__(self) -> int:
        return len(self.first)

    def __getitem__(self, index: IntArray) -> Prompts:
        return Prompts(
            self.first[index], self.first_target[index], self.stop[index], self.context_stop[index]
        )

    @property
    def num_interactions(self) -> IntArray:
        """`(P,)` interactions of each prompt, context and targets."""
        return self.context_stop - self.first + self.num_targets

    def rows(self) -> IntArray:
        """The interactions of all prompts, one prompt after the other; one that is context of two prompts is there twice."""
        firsts = np.stack([self.first, self.first_target], 1).ravel()
        return ranges(firsts, np.stack([self.context_stop - self.first, self.num_targets], 1).ravel())

    @property
    def num_targets(self) -> IntArray:
        """`(P,)` targets of each prompt."""
        return self.stop - self.first_target


def _runs(data: PreparedData, rows: IntArray) -> tuple[IntArray, IntArray]:
    """Per ascending target row: its place in its run of neighbouring rows of one user, and in its user's history."""
    user = data.users_of(rows)
    new_run = np.ones(len(rows), bool)
    # Neighbouring rows are of two users where one's history ends.
    new_run[1:] = (np.diff(rows) != 1) | (np.diff(user) != 0)
    run_first = np.flatnonzero(new_run)
    in_run = np.arange(len(rows)) - run_first[np.cumsum(new_run) - 1]
    return in_run, rows - data.history_offsets[user]


def first_of_time(data: PreparedData, rows: IntArray) -> IntArray:
    """The first interaction of its user that shares its time stamp, per row; it is the row itself where none before it does."""
    time, starts = data.timestamp, np.zeros(len(data.timestamp), np.int64)
    new = np.ones(len(time), bool)
    new[1:] = time[1:] != time[:-1]
    new[data.history_offsets[:-1]] = True
    starts[new] = np.flatnonzero(new)
    return np.asarray(np.maximum.accumulate(starts)[rows])
