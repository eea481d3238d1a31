"""Texts of others in errors and on terminals: on one line, without control characters, and short.

Titles, ids, field names and file names come from outside. Raw, they could clear a terminal, recolour the following lines, or fill a log
with megabytes. All that is printed of them, or put into an error, goes through one of these functions.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

MAX_CHARS = 200  # of a text
MAX_VALUE_CHARS = 1000  # of a value with many texts in it, and of a line


class _Short(reprlib.Repr):
    """Of texts the beginning and how long they are; of what is nested or has many entries the first few."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxother = 4, MAX_CHARS
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = 10

    def repr_str(self, x: str, level: int) -> str:
        return repr(x) if len(x) <= MAX_CHARS else f"{x[:MAX_CHARS]!r}... ({len(x):,} characters)"

    def repr_bytes(self, x: bytes, level: int) -> str:
        return repr(x) if len(x) <= MAX_CHARS else f"{x[:MAX_CHARS]!r}... ({len(x):,} bytes)"

    def repr_int(self, x: int, level: int) -> str:
        try:
            text = repr(x)
        except ValueError:  # Python writes no integer of more than 4,300 digits
            return "an integer of thousands of digits"
        return text if len(text) <= MAX_CHARS else f"{text[:MAX_CHARS]}... ({len(text):,} digits)"


_SHORT = _Short()


def shown(value: Any) -> str:
    """A value as Python spells it, texts in quotes.

    Example:
        >>> shown({"title": "\\x1b[2J"})
        "{'title': '\\\\x1b[2J'}"
    """
    return one_line(_SHORT.repr(dict(value) if isinstance(value, Mapping) else value))


def one_line(text: object, max_chars: int = MAX_VALUE_CHARS) -> str:
    """Prose or a file name in which somebody else's text may stand; what is no printable character is escaped as in Python.

    Example:
        >>> one_line("a\\nb.jsonl")
        'a\\\\nb.jsonl'
    """
    whole = str(text)
    part = whole[:max_chars]
    if not part.isprintable():
        part = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in part)
    return part if len(whole) <= max_chars else f"{part}... ({len(whole):,} characters)"
