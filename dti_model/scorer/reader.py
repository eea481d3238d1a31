"""What a caller says of a user, a history and candidates, as token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from decimal import Decimal
from numbers import Real
from typing import Any

import numpy as np

from dti_model.model import ClickModel
from dti_model.prompts import IntArray
from dti_model.scorer.contexts import TIMESTAMP, ContextTokens, Facts, ProfileTokens
from dti_model.scorer.items import Item, ItemError, ItemTokens, user_text
from dti_model.scorer.requests import HistoryState, Request, Tokens
from dti_model.shown import shown

# (item, label), and the context of the interaction where interactions have one.
Interaction = tuple[Item, int] | tuple[Item, int, Mapping[str, Any]]
History = Sequence[Interaction]
Candidate = Item | Mapping[str, Any]  # {"item": ..., "context": ...} too

_NOTHING = np.empty(0, np.int64)


class RequestReader:
    """Reads requests for one model. Its errors are `ItemError`s that name the place."""

    def __init__(self, model: ClickModel) -> None:
        self._model, self._format = model, model.prompt
        limit = model.prompt.max_item_tokens
        self.items = ItemTokens(model.tokenizer, limit, model.item_text, model.builder)
        context, profile, encoder = model.context_rule, model.profile_rule, self.items.encoder
        self._contexts = None if context is None else ContextTokens(context, encoder, model.data)
        self._profiles = None if profile is None else ProfileTokens(profile, encoder, model.data)
        users = [] if model.data is None else model.data.user_ids
        self._users = {user: index for index, user in enumerate(users)}

    def request(
        self,
        history: History | HistoryState,
        candidates: Sequence[Candidate],
        user: str | int | None,
        profile: Mapping[str, Any] | None,
        context: Mapping[str, Any] | None,
    ) -> Request:
        """The arguments of `Scorer.request`, but for whose the state is."""
        if isinstance(candidates, (str, bytes, Mapping)) or not isinstance(candidates, Sequence):
            raise ItemError(f"candidates must be a list of items, got {shown(candidates)}")
        state = None
        if isinstance(history, HistoryState):
            if user is not None or profile is not None:
                raise ItemError("user and profile belong to the history: give them to encode")
            state, tokens, facts, head = history, history.interactions, history.facts, history.profile
        else:
            head = self.profile(user, profile)
            tokens, facts = self.history(history)
        of_candidates = []
        for place, item in enumerate(candidates):
            try:
                of_candidates.append(self._candidate(item, context, facts))
            except ItemError as error:
                raise ItemError(f"candidates[{place}]: {error}") from None
        return Request(tokens, of_candidates, state, head)

    def profile(self, user: str | int | None, profile: Mapping[str, Any] | None) -> IntArray:
        """Token ids of a user's profile: of the fields that are given, else those of the prepared data; a user who is in neither has none."""
        if profile is not None and self._profiles is None:
            raise ItemError(
                f"profile: users of this model have none (its data was prepared without profiles), got {shown(profile)}"
            )
        if self._profiles is None:
            return _NOTHING
        if profile is not None:
            return self._profiles.of_fields(profile)
        return self._profiles.of_user(None if user is None else self._users.get(user_text(user)))

    def history(self, history: History) -> tuple[Tokens, Facts]:
        """Token ids of a history's last n interactions, and what contexts of later ones follow from."""
        if isinstance(history, (str, bytes, Mapping)) or not isinstance(history, Sequence):
            raise ItemError(f"history must be a list of (item, label) pairs, got {shown(history)}")
        first = max(0, len(history) - self._format.window)
        facts, tokens = Facts(), []
        for place, entry in enumerate(history):
            if place < first and self._contexts is None:
                continue
            try:
                item, label, context = _entry(entry)
                if place < first:
                    label, timestamp = _checked_label(label), _time_of(context)
                    facts = facts.after(label, timestamp, *self._of_item(item), in_place=True)
                else:
                    one, facts = self.interaction(item, label, context, facts, in_place=True)
                    tokens.append(one)
            except ItemError as error:
                raise ItemError(f"history[{place}]: {error}") from None
        return tuple(tokens), facts

    def interaction(
        self, item: Item, label: int, context: Any, facts: Facts, in_place: bool = False
    ) -> tuple[IntArray, Facts]:
        """Token ids of one interaction of a history, and what is known after it; `in_place` as in `Facts.after`."""
        categories, expected = self._of_item(item)
        text, timestamp = self._text(item, context, facts, categories)
        label = _checked_label(label)
        answer = (self._format.labels[label], *self._format.separator)
        tokens = np.concatenate([text, np.asarray(answer, np.int64)])
        return tokens, facts.after(label, timestamp, categories, expected, in_place)

    def _categories(self, item: Item) -> Sequence[str]:
        """Categories of an item, where contexts follow from them."""
        if self._contexts is None or not self._contexts.compares_categories:
            return ()
        return self.items.categories(item)

    def _of_item(self, item: Item) -> tuple[Sequence[str], int]:
        """Categories of an item and its expected rate, where contexts follow from them."""
        categories = self._categories(item)
        if not categories or self._contexts is None:
            return (), 0
        return categories, self._contexts.expected_rate(self.items.index_of(item))

    def _candidate(self, item: Candidate, context: Mapping[str, Any] | None, facts: Facts) -> IntArray:
        if self._contexts is not None and isinstance(item, Mapping) and item.keys() == {"item", "context"}:
            own, shared = item["context"], {} if context is None else context
            for one in (own, shared):
                if not isinstance(one, Mapping):
                    raise ItemError(f"context must be fields by name, got {shown(one)}")
            item, context = item["item"], {**shared, **own}
        return self._text(item, context, facts, self._categories(item))[0]

    def _text(
        self, item: Any, context: Any, facts: Facts, categories: Sequence[str]
    ) -> tuple[IntArray, int | None]:
        """Token ids of an item with its context, and the time stamp that the context says."""
        tokens, timestamp = self.items.tokens(item), None
        if self._contexts is not None:
            more, timestamp = self._contexts.tokens(context, facts, self.items.index_of(item), categories)
            tokens = np.concatenate([tokens, more])
        elif context:
            raise ItemError(
                f"context: interactions of this model have none (its data was prepared without context_text), got {shown(context)}"
            )
        before, cue = self._format.before, self._format.cue
        if not before and not cue:
            return tokens, timestamp
        around = np.asarray(before, np.int64), np.asarray(cue, np.int64)
        return np.concatenate([around[0], tokens, around[1]]), timestamp

    def history_of(self, user: str | int) -> list[Any]:
        """See `Scorer.history_of`."""
        data, index = self._model.data, self._users.get(user_text(user))
        if data is None:
            raise ItemError(
                f"no user with id {shown(user)}: there is no prepared data here. Give the history"
            )
        if index is None:
            raise ItemError(f"no user with id {shown(user)} in {data.path}: give the history")
        rows = range(*data.history_offsets[index : index + 2].tolist())
        pairs = [(data.item_ids[data.item[row]], int(data.label[row])) for row in rows]
        if data.contexts is None:
            return pairs
        contexts = data.contexts
        return [
            (*pair, {"text": contexts.of_row(row), TIMESTAMP: int(data.timestamp[row])})
            for pair, row in zip(pairs, rows)
        ]


def _entry(entry: Any) -> tuple[Any, Any, Any]:
    """Item, label and context of an entry of a history."""
    try:
        item, label, *rest = entry
    except (TypeError, ValueError):
        rest = [None, None]
    if len(rest) > 1:
        raise ItemError(f"must be an (item, label) pair, got {shown(entry)}")
    return item, label, rest[0] if rest else None


def _checked_label(label: Any) -> int:
    try:  # 1.0 too, and True: programs write labels so in JSON and Parquet
        is_label = isinstance(label, (Real, Decimal, np.bool_)) and label in (0, 1)
    except ArithmeticError:  # a decimal's signalling NaN compares with nothing
        is_label = False
    if not is_label:
        raise ItemError(f"a label must be 0 or 1, got {shown(label)}")
    return int(label)


def _time_of(context: Any) -> int | None:
    value = context.get(TIMESTAMP) if isinstance(context, Mapping) else None
    return int(value) if isinstance(value, (int, np.integer)) else None
