"""Encoded histories of many users in bounded memory: the least recently used leave first.

cache = StateCache(scorer, max_bytes=2 << 30)
state = cache.get(user) or cache.put(user, scorer.encode(history))
cache.append(user, item, label)                                         # what the user did next
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from typing import Any

from dti_model.scorer.items import Item
from dti_model.scorer.requests import HistoryState
from dti_model.scorer.scorer import Scorer

# Appends of one user wait for each other, those of other users seldom do: a lock is shared by one user in this many.
_NUM_LOCKS = 256


class StateCache:
    """States by user, safe to use from several threads.

    Attributes:
        scorer: the one that makes the states.
        max_bytes: limit of the bytes of all kept states together.
    """

    def __init__(self, scorer: Scorer, max_bytes: int) -> None:
        """An empty cache.

        Raises:
            ValueError: `max_bytes` is below 1.
        """
        if max_bytes < 1:
            raise ValueError(f"max_bytes must be >= 1, got {max_bytes}")
        self.scorer, self.max_bytes = scorer, max_bytes
        self._states: OrderedDict[Hashable, HistoryState] = OrderedDict()
        self._num_bytes = 0
        self._lock = threading.Lock()
        self._user_locks = [threading.Lock() for _ in range(_NUM_LOCKS)]

    @property
    def num_bytes(self) -> int:
        """Bytes of the kept states."""
        return self._num_bytes

    def __len__(self) -> int:
        """Users with a kept state."""
        return len(self._states)

    def get(self, user: Hashable) -> HistoryState | None:
        """The state of a user, now the most recently used; None where none is kept."""
        with self._lock:
            if user in self._states:
                self._states.move_to_end(user)
            return self._states.get(user)

    def put(self, user: Hashable, state: HistoryState) -> HistoryState:
        """Keep a state, and drop others as needed; one larger than the whole cache is not kept. Returns the state."""
        with self._lock:
            self._drop(user)
            self._states[user] = state
            self._num_bytes += state.num_bytes
            while self._num_bytes > self.max_bytes:
                self._drop(next(iter(self._states)))
        return state

    def append(
        self, user: Hashable, item: Item, label: int, context: Mapping[str, Any] | None = None
    ) -> HistoryState | None:
        """`Scorer.append` on a kept state. None: no state is kept; encode the user's history, with this interaction in it."""
        with self._user_locks[hash(user) % _NUM_LOCKS]:
            state = self.get(user)
            return None if state is None else self.put(user, self.scorer.append(state, item, label, context))

    def _drop(self, user: Hashable) -> None:
        state = self._states.pop(user, None)
        self._num_bytes -= 0 if state is None else state.num_bytes
