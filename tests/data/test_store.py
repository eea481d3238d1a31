"""Prepared folders: opening, memory mapping, damage, token ids."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from dti_model.data import DataError, PreparedData, prepare, store
from dti_model.data.text_encoder import TextEncoder
from dti_model.data.tokens import train_tokenizer
from dti_model.files import write_sealed
from tests.data.movielens_files import some_ratings, write_1m


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    prepare("ml-1m", tmp_path / "data", write_1m(tmp_path / "raw", some_ratings()), subset=True)
    return tmp_path / "data"


def test_columns_are_views_of_the_mapped_file(folder: Path) -> None:
    before = pa.total_allocated_bytes()
    data = PreparedData.open(folder)
    assert pa.total_allocated_bytes() == before
    for name in ("item", "label", "timestamp", "rating", "split", "order"):
        column = getattr(data, name)
        assert column.dtype == pa.array([], store.COLUMNS[name]).to_numpy().dtype
        assert not column.flags.owndata
        assert not column.flags.writeable
    assert data.history_offsets.dtype == np.int64


def test_unknown_split_name(folder: Path) -> None:
    with pytest.raises(DataError, match="split must be one of train, val, test, but is 'dev'"):
        PreparedData.open(folder).targets("dev")


def test_missing_and_foreign_folders(folder: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere: no such folder\. Make it with: dti prepare"):
        PreparedData.open(folder / "nowhere")
    with pytest.raises(DataError, match=r"raw: not a prepared folder"):
        PreparedData.open(folder.parent / "raw")


def test_other_format_version(folder: Path) -> None:
    stats = json.loads((folder / "stats.json").read_text())
    (folder / "stats.json").write_text(json.dumps({**stats, "format_version": 99}))
    with pytest.raises(DataError, match="format version 99, this program reads 2"):
        PreparedData.open(folder)


@pytest.mark.parametrize(
    "name", ["interactions.arrow", "users.arrow", "items.arrow", "tokenizer/tokenizer.json"]
)
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_damaged_file_is_named(folder: Path, name: str, damage: str) -> None:
    path = folder / name
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        path.unlink()
    with pytest.raises(DataError, match=rf"{name}: the file (has .* instead of|is missing)"):
        PreparedData.open(folder)


def test_damage_that_keeps_the_size_is_named(folder: Path) -> None:
    path = folder / "interactions.arrow"
    path.write_bytes(b"\0" * path.stat().st_size)
    with pytest.raises(DataError, match=r"interactions\.arrow is damaged: .* dti prepare"):
        PreparedData.open(folder)


@pytest.mark.parametrize("content", ["{", "[]", '{"format_version": 1}'])
def test_damaged_stats(folder: Path, content: str) -> None:
    (folder / "stats.json").write_text(content)
    with pytest.raises(DataError, match=r"stats\.json: "):
        PreparedData.open(folder)


def test_counts_that_disagree_with_the_files(folder: Path) -> None:
    stats = PreparedData.open(folder).stats
    write_sealed(folder / "stats.json", {**stats, "users": 11})
    with pytest.raises(DataError, match="the files hold"):
        PreparedData.open(folder)


def test_trained_tokenizer(folder: Path) -> None:
    """`yes`, `no`, `[BOS]`, `[SUM]` are one token each where prompts are made, and `no` does not cut a longer word."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(PreparedData.open(folder).tokenizer_dir)
    assert tokenizer.convert_tokens_to_ids(["[BOS]", "[SUM]", "yes", "no"]) == [0, 1, 2, 3]
    assert tokenizer.bos_token_id == 0
    assert tokenizer.encode("yes") == [2]
    assert tokenizer.encode("no") == [3]
    assert 3 not in tokenizer.encode("Casino nobody")
    text = "Misérables, Les (1995); ☃ yes\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_training_a_tokenizer_is_deterministic(folder: Path) -> None:
    texts = PreparedData.open(folder).item_texts
    assert train_tokenizer(texts, 400).to_str() == train_tokenizer(texts, 400).to_str()


def test_token_ids_are_the_tokenizers(folder: Path) -> None:
    data = PreparedData.open(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(data.tokenizer_dir)
    offsets, ids = data.token_ids(tokenizer)
    assert (offsets.dtype, ids.dtype) == (np.int64, np.int32)
    assert offsets.shape == (data.num_items + 1,)
    for item, text in enumerate(data.item_texts):
        wanted = tokenizer.encode(text, add_special_tokens=False)
        assert ids[offsets[item] : offsets[item + 1]].tolist() == wanted
    assert data.stats["tokenizer"]["mean_item_tokens"] == pytest.approx(ids.size / data.num_items)


def test_token_ids_are_made_once_per_tokenizer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = PreparedData.open(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(data.tokenizer_dir)
    first = data.token_ids(tokenizer)
    monkeypatch.setattr(TextEncoder, "encode_all", None)  # a second encoding would fail
    tokenizer.backend_tokenizer.enable_padding(length=100)
    tokenizer.backend_tokenizer.enable_truncation(2)
    second = PreparedData.open(folder).token_ids(tokenizer)
    assert all(np.array_equal(a, b) for a, b in zip(first, second))
    assert not second[1].flags.owndata
    monkeypatch.undo()
    other = data.token_ids(train_tokenizer(data.item_texts, 270))
    assert other[1].size > first[1].size
    assert len(list((folder / "tokens").iterdir())) == 2  # the first one was made by prepare


def test_failed_encoding_leaves_no_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = PreparedData.open(folder)
    tokenizer = train_tokenizer(data.item_texts, 270)
    monkeypatch.setattr(pa.RecordBatchFileWriter, "write_table", _fail)
    with pytest.raises(DataError, match="cannot write the token cache"):
        data.token_ids(tokenizer)
    assert len(list((folder / "tokens").iterdir())) == 1


def test_tokenizer_without_fast_backend(folder: Path) -> None:
    with pytest.raises(TypeError, match="must be a tokenizers.Tokenizer or a fast tokenizer"):
        PreparedData.open(folder).token_ids("bert")


def test_tokenizer_that_drops_a_text(folder: Path) -> None:
    with pytest.raises(DataError, match="makes no token of item text"):
        PreparedData.open(folder).token_ids(Tokenizer(BPE()))


def _fail(*_: object) -> None:
    raise OSError(28, "No space left on device")
