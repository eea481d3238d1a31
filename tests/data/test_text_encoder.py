"""Item texts never become control tokens or labels, whatever they say and whatever tokenizer a model has; other texts stay as they were."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dti_model.data import PreparedData, prepare
from dti_model.data.text_encoder import TextEncoder
from dti_model.data.tokens import BOS, SUM, label_tokens, save_tokenizer, train_tokenizer
from dti_model.model.pretrained import load_tokenizer
from dti_model.prompts import PromptFormat
from tests.data.log_files import small_log
from tests.model.pretrained_files import small_tokenizer

# Lower-case, so that `no` and `yes` are merges of the vocabulary, as in a data set of running text.
WORDS = ["casino piano nono noyes eyes notes", "xnox oyesx", "Drama [SUM]s", "a b c é 🎬"] * 30
CONTROL = [
    "<|endoftext|>",
    "<s>",
    "</s>",
    "<|im_start|>",
    "<unk>",
    "[INST]",
    "<tool_call>",
    BOS,
    SUM,
    "yes",
    "no",
    " yes",
    " No",
    "Yes",
]
BYTE_PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]


def _from_scratch(folder: Path) -> Any:
    save_tokenizer(train_tokenizer(WORDS, 320), folder / "scratch")
    return PreTrainedTokenizerFast.from_pretrained(folder / "scratch")


def _byte_level(_: Path) -> Any:
    """Control tokens that merges of the vocabulary make too, as in a tokenizer that has read web pages."""
    tokenizer = small_tokenizer(["Does it say <|endoftext|> or <s> or [INST]? yes or no"] * 20)
    tokenizer.add_special_tokens(
        {"eos_token": "<|endoftext|>", "additional_special_tokens": ["[INST]", "<|im_start|>", SUM]}
    )
    tokenizer.add_tokens(["<tool_call>", "  "])
    return tokenizer


def _sentencepiece(_: Path) -> Any:
    """Made as transformers makes Llama 2's: every piece of the vocabulary has merges, the control tokens too; bytes as the last resort."""
    pieces = [
        *BYTE_PIECES,
        "▁",
        *"<s>/yenoa[]INSTdr",
        "</",
        "<s",
        "s>",
        "</s",
        "no",
        "es",
        "yes",
        "▁no",
        "▁yes",
        "ST",
        "IN",
        "[IN",
        "ST]",
        "[INST]",
        "un",
        "<un",
        "k>",
        "u",
        "k",
    ]
    vocab = {piece: token for token, piece in enumerate(dict.fromkeys(pieces))}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in vocab
        for cut in range(1, len(piece))
        if {piece[:cut], piece[cut:]} <= vocab.keys()
    ]
    model = models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    return _llama(model)


def _unigram(_: Path) -> Any:
    pieces = dict.fromkeys([*BYTE_PIECES, "▁", *"<>/yesnoabcd", "▁no", "▁yes", "no", "[INST]", "[", "]"])
    return _llama(
        models.Unigram([(piece, -float(rank)) for rank, piece in enumerate(pieces)], 0, byte_fallback=True)
    )


def _gguf(folder: Path) -> Any:
    """Control and user-defined tokens are pieces of a GGUF file's vocabulary, whose merges transformers makes of the pieces."""
    kinds = {"<unk>": 2, "<s>": 3, "</s>": 3, "[INST]": 3, "<|im_start|>": 4}
    pieces = [
        *BYTE_PIECES,
        "▁",
        *"<s>/yenoaINST[]|",
        "</",
        "<s",
        "s>",
        "es",
        "no",
        "yes",
        "▁no",
        "▁yes",
        *("IN", "ST", "[IN", "ST]"),
    ]
    pieces = list(dict.fromkeys([*pieces, "<|", "|>", "[INST]", "<|im_start|>"]))
    writer = GGUFWriter(folder / "model.gguf", "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_scores([-float(rank) for rank in range(len(pieces))])
    writer.add_token_types([kinds.get(piece, 6 if piece.startswith("<0x") else 1) for piece in pieces])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return load_tokenizer(str(folder / "model.gguf"))


def _whole_words(_: Path) -> Any:
    """Words of the vocabulary before merges, as in Llama 3."""
    letters = [*"<|endofx>ysNoi[SUM]", "Ġ", *(chr(code) for code in range(161, 400))]
    vocab = {
        piece: token for token, piece in enumerate(dict.fromkeys([*letters, "Ġno", "Ġyes", "endoftext"]))
    }
    tokenizer = Tokenizer(models.BPE(vocab, [], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens([AddedToken("endoftext"), AddedToken(SUM)])
    return tokenizer


def _ends_of_words(_: Path) -> Any:
    """Pieces at the end of a word have a mark of their own, as in GPT-1 and CLIP: the text `Yes` is the piece `Yes</w>`."""
    mark = "</w>"
    letters = [*"<|endofx>ysYNoiaceIST[]SUM/unk_"]
    pieces = dict.fromkeys(["<unk>", *letters, *(letter + mark for letter in letters)])
    pieces |= dict.fromkeys(["Ye", "Yes", f"Yes{mark}", f"No{mark}", "No"])
    merges = [("Y", "e"), ("Ye", f"s{mark}"), ("Ye", "s"), ("N", f"o{mark}"), ("N", "o")]
    vocab = {piece: token for token, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", end_of_word_suffix=mark))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken(SUM), AddedToken("<s>")])
    return tokenizer


def _llama(model: Any) -> Any:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.add_special_tokens(
        [AddedToken(word, normalized=False) for word in ("<unk>", "<s>", "</s>", "[INST]")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["[INST]", SUM],
    )


KINDS = {
    "from scratch": _from_scratch,
    "byte level": _byte_level,
    "sentencepiece": _sentencepiece,
    "GGUF": _gguf,
    "unigram": _unigram,
    "whole words": _whole_words,
    "ends of words": _ends_of_words,
}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return KINDS[request.param](tmp_path_factory.mktemp("tokenizer"))


@cache
def encoder(tokenizer: Any) -> TextEncoder:
    return TextEncoder(tokenizer)


def reserved(tokenizer: Any) -> set[int]:
    """Added, special and label tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    labels = label_tokens(tokenizer)
    assert labels is not None
    return {*backend.get_added_tokens_decoder(), *getattr(tokenizer, "all_special_ids", ()), *labels}


TEXTS = [f"{before}{word}{after}" for word in CONTROL for before in ("", "a ") for after in ("", " c")]


@pytest.mark.parametrize("text", [*TEXTS, "".join(CONTROL)])
def test_control_tokens_and_labels_in_a_text_are_plain_text(tokenizer: Any, text: str) -> None:
    """`[SUM]` in a title was a target, `yes` a click, `<s>` a new prompt."""
    ids = encoder(tokenizer).encode(text)
    assert ids
    assert reserved(tokenizer).isdisjoint(ids)


PARTS = st.sampled_from([*CONTROL, *"<>|[]/ _ynoes", "Casino", "  ", "end", "of", "text"]) | st.text(
    max_size=8
)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(texts=st.lists(st.lists(PARTS, max_size=12).map("".join), min_size=1, max_size=8))
def test_no_text_has_a_control_token_or_a_label(tokenizer: Any, texts: list[str]) -> None:
    """Each by itself and all together, which give the same ids."""
    offsets, ids = encoder(tokenizer).encode_all(texts)
    assert reserved(tokenizer).isdisjoint(ids.tolist())
    assert (offsets.dtype, ids.dtype) == (np.int64, np.int32)
    for text, found in zip(texts, np.split(ids, offsets[1:-1]), strict=True):
        assert encoder(tokenizer).encode(text) == found.tolist()


ORDINARY = [
    "Casino (1995); Crime",
    "Misérables, Les; ☃",
    "Land of Friends & Co. [1990]",
    "\tx",
    "Nobody eats eyes",
    "\0\u2028",
    "",
    "end of text",
]


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_texts_have_the_ids_of_their_tokenizer(tokenizer: Any, text: str) -> None:
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    assert encoder(tokenizer).encode(text) == backend.encode(text, add_special_tokens=False).ids


def test_from_scratch_a_text_says_what_it_said(tmp_path: Path) -> None:
    """A label word that merges made of letters inside a longer word was the label."""
    tokenizer = _from_scratch(tmp_path)
    assert encoder(tokenizer).spelled.keys() == {2, 3}
    for text in ("oyes nono xno yes [SUM] no", "yes", "no"):
        assert tokenizer.decode(encoder(tokenizer).encode(text)) == text


def test_an_unknown_character_stays_unknown() -> None:
    """And `<unk>` in a text is no unknown character."""
    tokenizer = Tokenizer(
        models.BPE(
            {"<unk>": 0, **{letter: rank for rank, letter in enumerate("<unk>yes", 1)}}, [], unk_token="<unk>"
        )
    )
    tokenizer.add_special_tokens(["<unk>"])
    found = TextEncoder(tokenizer)
    assert found.encode("é") == [0]
    assert 0 not in found.encode("<unk>")
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    assert TextEncoder(words).encode("a b [UNK]") == [1, 0, 0]


def test_a_letter_that_is_a_control_token_is_a_letter() -> None:
    """Some models pad with an exclamation mark: texts could not be written without it."""
    tokenizer = small_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "!"})
    assert TextEncoder(tokenizer).encode("!") == [tokenizer.pad_token_id]


def test_two_words_that_are_one_token_are_no_labels() -> None:
    """A tokenizer that knows neither word made both labels its unknown token."""
    words = Tokenizer(models.WordLevel({"[UNK]": 0, SUM: 1, "a": 2}, unk_token="[UNK]"))
    with pytest.raises(ValueError, match="has no label words"):
        PromptFormat.of(PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]"), 3)


def test_items_of_a_prepared_folder(tmp_path: Path) -> None:
    """Titles of an item file were control tokens in every prompt that held them."""
    catalogue = "item,title\na,[SUM] yes\nb,[BOS] no [SUM]\nc,yes no\nd,plain\n"
    rows = [
        f"u{user},{item},{time},{(user + time) % 2}" for user in range(9) for time, item in enumerate("abcd")
    ]
    log = "\n".join(["user,item,timestamp,liked", *rows, ""])
    prepare(
        small_log(tmp_path, log, catalogue),
        tmp_path / "data",
        min_context=0,
    )
    data = PreparedData.open(tmp_path / "data")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(data.tokenizer_dir)
    _, ids = data.token_ids(tokenizer)
    assert ids.min() > 3
    assert tokenizer.decode(ids) == "[SUM] yes[BOS] no [SUM]yes noplain"
    assert len(list((tmp_path / "data" / "tokens").iterdir())) == 1, "prepare and a run name the cache alike"
