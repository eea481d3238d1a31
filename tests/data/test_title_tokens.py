"""Titles of frequent items are tokens: whole, only they, and of no other text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from dti_model.data import PreparedData, TextEncoder
from dti_model.data.tokens import title_of
from tests.data.text_logs import GENRES, text_data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    return text_data(tmp_path_factory.mktemp("titles"), title_tokens=5, context_text="{device}")


def test_titles_of_the_most_frequent_items_are_one_token(data: PreparedData) -> None:
    """Counted without validation and test; other titles take several tokens, and what follows a title is cut alike behind all."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(data.tokenizer_dir)
    encoder = TextEncoder(tokenizer)
    counts = np.bincount(data.item[data.split < 2], minlength=data.num_items)
    frequent = set(np.argsort(-counts, kind="stable")[:5].tolist())
    behind: dict[str, set[tuple[int, ...]]] = {}
    for item, text in enumerate(data.item_texts):
        title = title_of(text)
        ids = encoder.encode(text)
        assert tokenizer.decode(ids) == text
        assert (len(encoder.encode(title)) == 1) == (item in frequent)
        behind.setdefault(text[len(title) :], set()).add(tuple(ids[len(encoder.encode(title)) :]))
    assert [len(ways) for ways in behind.values()] == [1] * len(GENRES)
    assert encoder.encode("; phone") == [tokenizer.convert_tokens_to_ids("Ġphone".replace("Ġ", ";Ġ"))]


def test_titles_are_no_tokens_inside_other_texts(data: PreparedData) -> None:
    encoder = TextEncoder(PreTrainedTokenizerFast.from_pretrained(data.tokenizer_dir))
    title = title_of(data.item_texts[int(np.bincount(data.item[data.split < 2]).argmax())])
    (token,) = encoder.encode(title)
    assert token not in encoder.encode(f"A {title}; Drama")
    assert token not in encoder.encode(f"Other; {title}")
    assert encoder.encode(f"{title}; Drama")[0] == token


def test_none_is_the_tokenizer_as_it_was(tmp_path: Path) -> None:
    one, other = (text_data(tmp_path / name, title_tokens=n) for name, n in (("a", 0), ("b", 3)))
    plain, titled = ((data.tokenizer_dir / "tokenizer.json").read_text() for data in (one, other))
    assert '"ignore_merges": false' in plain
    assert plain != titled
    assert titled == (text_data(tmp_path / "c", title_tokens=3).tokenizer_dir / "tokenizer.json").read_text()
    with pytest.raises(ValueError, match="title_tokens must be at least 0"):
        text_data(tmp_path / "d", title_tokens=-1)
