"""Items as a caller names them, as token ids.

    "50" or 50                                  the item of this id in the prepared data
    {"title": "Brazil (1985)", "genres": [...]} fields of an item that may be new, put into text by the data set's template
    {"text": "Brazil (1985); Sci-Fi"}           finished item text

Texts are cut to the model's `max_item_tokens`, as in training, and before that to `CHARS_PER_TOKEN` characters for each.
An id and a text are never guessed apart: "1984" is an id.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np

from dti_model.data import (
    FINISHED,
    MAX_CHARS,
    TEMPLATE,
    DataError,
    OneLineError,
    Template,
    TextEncoder,
    counted_categories,
    template_text,
)
from dti_model.prompts import IntArray, PromptBuilder
from dti_model.shown import shown

# A text is cut to so many characters a token before it is encoded: some tokenizers need minutes for a megabyte.
CHARS_PER_TOKEN = 32

_MOST_CHARS = 1 << 16  # of a text that categories are looked for in

Item = str | int | Mapping[str, Any]


class ItemError(OneLineError):
    """An item, a label or a user cannot be read; the message says why and names the way out."""


def user_text(user: Any) -> str:
    """A user's id as text.

    Raises:
        ItemError: it is no id.
    """
    if isinstance(user, bool) or not isinstance(user, (str, int, float, np.integer)):
        raise ItemError(f"a user is an id, got {shown(user)} of {type(user).__name__}")
    return _id_text(user)


def _id_text(value: Any) -> str:
    try:
        return str(value)
    except ValueError:
        raise ItemError(f"an id is not so long, got {shown(value)}") from None


def check_text(text: str) -> None:
    """Raise an ItemError for half a surrogate pair: JSON can spell it, but no tokenizer or file takes it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ItemError(f"half a surrogate pair, which is no character, in the text {shown(text)}") from error


def check_texts(fields: Mapping[str, Any]) -> None:
    """`check_text` for the names of fields, and for values that are texts or lists of them."""
    for name, value in fields.items():
        for text in (name, *(value if isinstance(value, (list, tuple)) else (value,))):
            if isinstance(text, str):
                check_text(text)


class ItemTokens:
    """Token ids of items, by fields, and by id where there is prepared data.

    Attributes:
        encoder: of texts, with the model's tokenizer.
    """

    def __init__(
        self,
        tokenizer: Any,
        max_item_tokens: int,
        item_text: Mapping[str, Any] | None,
        builder: PromptBuilder | None,
    ) -> None:
        """Read items with a tokenizer.

        Args:
            tokenizer: of the model.
            max_item_tokens: texts are cut to this many tokens.
            item_text: the rule of the item texts, see `PreparedData.text_rule`; None: items are finished texts.
            builder: prepared data with the tokens of its items; None: there are no ids.
        """
        self._builder, self._max_item_tokens = builder, max_item_tokens
        self._item_text = item_text
        self.encoder = TextEncoder(tokenizer)

    @cached_property
    def _index(self) -> dict[str, int]:
        ids = [] if self._builder is None else self._builder.data.item_ids
        return {item_id: index for index, item_id in enumerate(ids)}

    @cached_property
    def _template(self) -> Template | None:
        return None if self._item_text is None else Template(self._item_text.get("text", TEMPLATE))

    def tokens(self, item: Item) -> IntArray:
        """`(n,)` int64, 1 <= n <= max_item_tokens.

        Raises:
            ItemError: the prepared data has no such item, the fields are not those of its items, or the text is empty.
        """
        if isinstance(item, Mapping):
            return self._encoded(self._rendered(item))
        builder, index = self._place_of(item)
        return builder.items.text(index)

    def index_of(self, item: Item) -> int | None:
        """Index of an item in the prepared data; None: it is given by its fields or text. Raises what `tokens` raises."""
        return None if isinstance(item, Mapping) else self._place_of(item)[1]

    def text(self, item: Item) -> str:
        """The item text, uncut; raises what `tokens` raises, and lets an empty text pass."""
        if isinstance(item, Mapping):
            return self._rendered(item)
        builder, index = self._place_of(item)
        return builder.data.item_texts[index]

    def categories(self, item: Item) -> list[str]:
        """The categories of an item that count; raises what `text` raises."""
        return counted_categories(self.text(item)[:_MOST_CHARS])

    def _place_of(self, item: Item) -> tuple[PromptBuilder, int]:
        """The prepared data, and which of its items this is."""
        if isinstance(item, bool) or not isinstance(item, (str, int, np.integer)):
            raise ItemError(
                f'an item is an id, its fields or {{"text": ...}}, got {shown(item)} of {type(item).__name__}'
            )
        if self._builder is None:
            raise ItemError(
                f"no item with id {shown(item)}: there is no prepared data here. Give the item by its fields or as "
                '{"text": ...}, or load the model with data='
            )
        index = self._index.get(_id_text(item))
        if index is None:
            raise ItemError(
                f"no item with id {shown(item)} in {self._builder.data.path}: an item that is not there is given by its fields, "
                'or as {"text": ...}'
            )
        return self._builder, index

    def _rendered(self, fields: Mapping[str, Any]) -> str:
        """The item text of fields, by the data set's template."""
        check_texts(fields)
        if fields.keys() == {FINISHED}:
            return self._finished(fields[FINISHED])
        if self._item_text is None or self._template is None:
            raise ItemError(
                f'how fields become a text is not known here: give {{"text": ...}}, got {shown(fields)}'
            )
        try:
            return template_text(self._template, fields, self._item_text.get("max_chars", MAX_CHARS))
        except DataError as error:
            raise ItemError(str(error)) from error

    def _finished(self, text: Any) -> str:
        if self._template is not None and FINISHED in self._template.columns:  # prepared by version 0.1.0
            raise ItemError(
                f'{{"{FINISHED}": ...}} is a finished text and also a column of the item texts here (text template '
                f"{self._template.template!r}). Give another field with it to mean the column, or prepare the data again with the "
                "column renamed"
            )
        if not isinstance(text, str):
            raise ItemError(f"a finished text must be a text, got {shown(text)}")
        return text

    def _encoded(self, text: str) -> IntArray:
        ids = self.encoder.encode(text[: self._max_item_tokens * CHARS_PER_TOKEN])
        if not ids:
            raise ItemError(f"an item text must not be empty, got {shown(text)}")
        return np.asarray(ids[: self._max_item_tokens], np.int64)
