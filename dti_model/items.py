"""Items as a caller names them, as token ids.

    "50" or 50                                  the item of this id in the prepared data
    {"title": "Brazil (1985)", "genres": [...]} fields of an item that may be new, put into text as the data set's own items were
    {"text": "Brazil (1985); Sci-Fi"}           finished item text

Texts are cut to the model's `max_item_tokens`, as in training. An id and a text are never guessed apart: "1984" is an id.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from dti_model.data import DataError
from dti_model.data.movielens import movie_text
from dti_model.data.texts import MISSING_TITLE, Template, template_text
from dti_model.data.tokens import plain_backend
from dti_model.prompts import IntArray, PromptBuilder

Item = str | int | Mapping[str, Any]


class ItemError(ValueError):
    """An item, a label or a user that cannot be read; the message says why and what would do."""


def _movie(fields: Mapping[str, Any]) -> str:
    unknown = fields.keys() - {"title", "genres"}
    title, genres = fields.get("title"), fields.get("genres", [])
    if unknown or not isinstance(title, str):
        raise ItemError(f"a movie has the fields title and genres, or the one field text; got {dict(fields)}")
    if not isinstance(genres, Sequence) or isinstance(genres, str):
        raise ItemError(f"genres must be a list of names, got {genres!r}")
    return movie_text(title, [str(genre) for genre in genres])


class ItemTokens:
    """Token ids of items, by id or by fields."""

    def __init__(self, builder: PromptBuilder, tokenizer: Any) -> None:
        self._builder, self._data = builder, builder.data
        self._source = self._data.stats["source"]
        self._backend = plain_backend(tokenizer)

    @cached_property
    def _index(self) -> dict[str, int]:
        return {item_id: index for index, item_id in enumerate(self._data.item_ids)}

    def tokens(self, item: Item) -> IntArray:
        """`(n,)` int64, 1 <= n <= max_item_tokens.

        Raises:
            ItemError: the prepared data has no such item, the fields are not those of its items, or the text is empty.
        """
        if isinstance(item, Mapping):
            return self._encoded(self._rendered(item))
        index = self._index_of(item)
        offset = int(self._builder.token_offsets[index])
        ids = self._builder.token_ids[offset : offset + int(self._builder.item_lengths[index])]
        return ids.astype(np.int64)

    def text(self, item: Item) -> str:
        """The item text, uncut; raises what `tokens` raises, and lets an empty text pass."""
        return (
            self._rendered(item) if isinstance(item, Mapping) else self._data.item_texts[self._index_of(item)]
        )

    def _index_of(self, item: Item) -> int:
        if isinstance(item, bool) or not isinstance(item, (str, int, np.integer)):
            raise ItemError(
                f'an item is an id, its fields or {{"text": ...}}, got {item!r} of {type(item).__name__}'
            )
        index = self._index.get(str(item))
        if index is None:
            raise ItemError(
                f"no item with id {item!r} in {self._data.path}: an item that is not there is given by its fields, "
                'or as {"text": ...}'
            )
        return index

    def _rendered(self, fields: Mapping[str, Any]) -> str:
        """The item text of fields, as the data set's loader would make it."""
        if fields.keys() == {"text"} and isinstance(fields["text"], str):
            return fields["text"]
        if "text" not in self._source:
            return _movie(fields) or MISSING_TITLE
        try:
            return template_text(Template(self._source["text"]), fields, self._source["max_chars"])
        except DataError as error:
            raise ItemError(str(error)) from error

    def _encoded(self, text: str) -> IntArray:
        ids = self._backend.encode(text, add_special_tokens=False).ids
        if not ids:
            raise ItemError(f"an item text must not be empty, got {text!r}")
        return np.asarray(ids[: self._builder.format.max_item_tokens], np.int64)
