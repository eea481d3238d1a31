"""The small tokenizer trained at prepare time, and the tokens that stand around item texts.

The tokenizer is a byte-level BPE on the item texts: any text can be encoded, nothing is unknown. `[BOS]`,
`[SUM]`, `yes` and `no` are single tokens, ids 0 to 3, for prompts: no item text gets them (`text_encoder.py`).

Whole titles may be tokens too. A model then has an embedding for a film, as recommenders have for ids, and prompts are shorter. Other
titles are spelled in pieces as ever.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Split
from tokenizers.pre_tokenizers import Sequence as Pieces
from tokenizers.trainers import BpeTrainer

BOS, SUM, YES, NO = "[BOS]", "[SUM]", "yes", "no"
# Negative and positive label text. The first pair of which both are single tokens is taken: as words of running text after an item
# text, then as this project's own tokenizers and those of SentencePiece (Llama 2) write them, then with capitals.
LABEL_TEXTS = ((f" {NO}", f" {YES}"), (NO, YES), (" No", " Yes"), ("No", "Yes"))
NUM_BYTES = 256
MAX_VOCAB_SIZE = 2**20  # several times the largest in use; the trainer allocates for so many before it starts
# A piece is a word with the punctuation and spaces before it.
PIECE = r"\W*[\w']+"
# The title of an item text. Contexts begin with a semicolon and have none; a profile that begins with a whole title gets its token.
TITLE = r"\A[^;]+"


def check_vocab_size(vocab_size: int) -> None:
    """Raise a ValueError unless a tokenizer of `vocab_size` entries can be trained."""
    low = NUM_BYTES + 4
    if not low <= vocab_size <= MAX_VOCAB_SIZE:
        raise ValueError(
            f"vocab_size must be at least {low} (all bytes and 4 tokens) and at most {MAX_VOCAB_SIZE:,}, but is {vocab_size}"
        )


def train_tokenizer(texts: list[str], vocab_size: int, titles: Sequence[str] = ()) -> Tokenizer:
    """Byte-level BPE with at most `vocab_size` entries and one more for each of `titles`; the same texts give the same tokenizer."""
    check_vocab_size(vocab_size)
    tokenizer = Tokenizer(BPE())
    pieces = Split(Regex(PIECE), "isolated")
    tokenizer.pre_tokenizer = Pieces([pieces, ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = ByteLevelDecoder()
    added = [AddedToken(BOS, special=True), AddedToken(SUM, special=True)]
    added += [AddedToken(word, single_word=True, special=False, normalized=False) for word in (YES, NO)]
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=1,
        special_tokens=added,
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    if not titles:
        tokenizer.train_from_iterator(texts, trainer)
        return tokenizer
    # As they will be cut: what follows a title begins a piece.
    cut = (part for text in texts for part in (title_of(text), text[len(title_of(text)) :]) if part)
    tokenizer.train_from_iterator(cut, trainer)
    return _with_titles(tokenizer, titles)


def title_of(text: str) -> str:
    """The part of an item text that a token of its own may stand for."""
    return text.partition(";")[0]


def _with_titles(tokenizer: Tokenizer, titles: Sequence[str]) -> Tokenizer:
    """The same tokenizer, where titles are pieces, and those that are entries are not merged but looked up."""
    parts = json.loads(tokenizer.to_str())
    vocab, spell = parts["model"]["vocab"], ByteLevel(add_prefix_space=False, use_regex=False)
    for title in titles:
        ((entry, _),) = spell.pre_tokenize_str(title)
        vocab.setdefault(entry, len(vocab))
    parts["model"]["ignore_merges"] = True
    whole = Tokenizer.from_str(json.dumps(parts))
    pieces = Split(Regex(f"{TITLE}|{PIECE}"), "isolated")
    whole.pre_tokenizer = Pieces([pieces, spell])
    return whole


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the two files that `transformers.PreTrainedTokenizerFast.from_pretrained(folder)` reads."""
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "extra_special_tokens": [SUM],
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def plain_backend(tokenizer: Any) -> Tokenizer:
    """A copy of a tokenizer's `tokenizers` backend, of its `plain_parts`; raises what they raise."""
    return Tokenizer.from_str(json.dumps(plain_parts(tokenizer)))


def plain_parts(tokenizer: Any) -> dict[str, Any]:
    """The parts, as tokenizer.json has them, of a tokenizer reduced to what decides the ids of a plain text.

    Padding and truncation are a caller's passing settings; post-processor and decoder have no say in the ids.

    Raises:
        TypeError: `tokenizer` is neither a `tokenizers.Tokenizer` nor a fast transformers tokenizer.
    """
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not isinstance(backend, Tokenizer):
        raise TypeError(
            f"tokenizer must be a tokenizers.Tokenizer or a fast tokenizer of transformers, but is "
            f"{type(tokenizer).__name__}; load it with AutoTokenizer.from_pretrained(..., use_fast=True)"
        )
    parts: dict[str, Any] = json.loads(backend.to_str())
    return parts | dict.fromkeys(("padding", "truncation", "post_processor", "decoder"))


def label_tokens(tokenizer: Any) -> tuple[int, int] | None:
    """The tokens of a negative and of a positive label; None: the tokenizer has no pair of `LABEL_TEXTS` as single tokens."""
    for pair in LABEL_TEXTS:
        found = (tokenizer.encode(text, add_special_tokens=False) for text in pair)
        no, yes = (getattr(one, "ids", one) for one in found)  # `tokenizers` wraps them
        if len(no) == len(yes) == 1 and no != yes:
            return no[0], yes[0]
    return None
