"""Item texts as token ids, none of which is a control token or a label, whatever a text says.

    "[SUM] yes"  ->  Ġ [ S U M ] Ġ yes     by added tokens     [SUM] and yes: a target and a click that nobody saw
                 ->  [ S U M ] Ġyes        here                the letters and pieces of any other text

Added tokens (control tokens among them) are not looked for. If a vocabulary's own pieces make one, by a merge or as a whole word, it
is spelled in single characters, and so are the label words. All other texts have the ids that the tokenizer gives them.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from dti_model.data.tokens import label_tokens, plain_parts

ENCODING_VERSION = 2  # of what this file computes; 1 looked for added tokens in item texts
TokenIds = tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]


class TextEncoder:
    """Encodes item texts for one tokenizer.

    Attributes:
        spelled: token ids that no text gets, and the ids of single characters that stand in their place. A control token of one
            character that texts hold is that character, and not among them.
    """

    def __init__(self, tokenizer: Any) -> None:
        """Read a fast tokenizer of transformers, or a `tokenizers.Tokenizer`.

        Raises:
            TypeError: it is neither.
        """
        parts = plain_parts(tokenizer)
        reserved = {token["id"] for token in parts["added_tokens"]}
        reserved |= {*getattr(tokenizer, "all_special_ids", ()), *(label_tokens(tokenizer) or ())}
        parts["added_tokens"] = []
        unknown = _hide_unknown(parts["model"])
        self._backend = Tokenizer.from_str(json.dumps(parts))
        self.spelled = self._spellings(reserved - {unknown}, parts["model"].get("end_of_word_suffix") or "")
        self._reserved = np.array(sorted(self.spelled), np.int32)

    def _spellings(self, reserved: set[int], suffix: str) -> dict[int, list[int]]:
        """Single characters of every reserved token that the vocabulary's pieces can make; `suffix` marks the end of a word."""
        model, spelled = self._backend.model, {}
        for token in sorted(reserved):
            text = self._backend.id_to_token(token)
            if suffix and text and len(text.removesuffix(suffix)) > 1:
                # Pieces inside a word and at its end differ, and not every letter has both: of either kind what there is.
                word = text.removesuffix(suffix)
                letters = [*word[:-1], word[-1] + text[len(word) :]]
                found = [model.token_to_id(letter) for letter in letters]
                spelled[token] = [
                    piece
                    for letter, known in zip(letters, found)
                    for piece in ([known] if known is not None else _ids(model, letter.removesuffix(suffix)))
                    if piece not in reserved
                ]
            elif text and len(text) > 1 and _ids(model, text) == [token]:
                spelled[token] = [piece for letter in text for piece in _ids(model, letter)]
        return spelled

    def fingerprint(self, texts: list[str]) -> str:
        """Name of the cached token ids of `texts`: 16 hexadecimal digits over all that decides them."""
        digest = hashlib.sha256(self._backend.to_str().encode())
        digest.update(json.dumps([ENCODING_VERSION, sorted(self.spelled.items()), texts]).encode())
        return digest.hexdigest()[:16]

    def encode(self, text: str) -> list[int]:
        """Token ids of one text."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        if self.spelled.keys().isdisjoint(ids):
            return ids
        return [part for token in ids for part in self.spelled.get(token, [token])]

    def encode_all(self, texts: list[str]) -> TokenIds:
        """Token ids of all texts in one array: offsets (N + 1,) int64, ids int32."""
        encoded = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        lengths = np.array([len(one.ids) for one in encoded], dtype=np.int64)
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        ids = np.fromiter(
            (token for one in encoded for token in one.ids), dtype=np.int32, count=int(offsets[-1])
        )
        places = np.flatnonzero(np.isin(ids, self._reserved))
        if not places.size:
            return offsets, ids
        spellings = [self.spelled[token] for token in ids[places].tolist()]
        counts = np.ones(ids.size, np.int64)
        counts[places] = list(map(len, spellings))
        starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
        ids = np.repeat(ids, counts)
        for place, spelling in zip(places.tolist(), spellings):
            ids[starts[place] : starts[place + 1]] = spelling
        return starts[offsets], ids


def _ids(model: Any, text: str) -> list[int]:
    return [piece.id for piece in model.tokenize(text)]


def _hide_unknown(model: dict[str, Any]) -> int | None:
    """Make the token of unknown characters one that no text spells; returns its id, None where the model has none."""
    if model["type"] == "Unigram":
        unknown: int | None = model["unk_id"]
        if unknown is not None:
            model["vocab"][unknown][0] = ""
        return unknown
    name = model["unk_token"]
    if name not in model["vocab"]:
        return None
    if "merges" in model:
        model["merges"] = [pair for pair in model["merges"] if name not in (*pair, "".join(pair))]
    token: int = model["vocab"].pop(name)
    model["vocab"][""], model["unk_token"] = token, ""
    return token
