"""Files beside those that were written and checked: libraries that load a folder find them by their names."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from dti_model.data import DataError, PreparedData, prepare
from dti_model.files import DamagedFileError
from dti_model.model.export import export_run
from dti_model.model.run import Run
from dti_model.scorer import Scorer
from tests.data.movielens_files import some_ratings, write_1m
from tests.model.test_export import RESET, run_folder

OTHER_UNKNOWN = json.dumps({"unk_token": "Title"})


@pytest.fixture(scope="module")
def run(small_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_folder(tmp_path_factory.mktemp("added") / "run", small_folder, RESET)


def add_adapter(folder: Path) -> None:
    """Files that further training of an export leaves in the same folder; transformers put it on top of the model."""
    model: Any = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder),
        LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False),
    )
    model.save_pretrained(folder / "tuned")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.move(folder / "tuned" / name, folder / name)
    shutil.rmtree(folder / "tuned")


ADD: dict[str, Callable[[Path], object]] = {
    "adapter_config.json": add_adapter,
    "added_tokens.json": lambda folder: (folder / "added_tokens.json").write_text('{"<new>": 400}'),
    "model.safetensors.index.json": lambda folder: (folder / "model.safetensors.index.json").write_text("{}"),
    "more.safetensors": lambda folder: shutil.copy(folder / "model.safetensors", folder / "more.safetensors"),
    "special_tokens_map.json": lambda folder: (folder / "special_tokens_map.json").write_text(OTHER_UNKNOWN),
}


@pytest.mark.parametrize("name", ADD)
def test_what_is_added_to_a_model_is_not_loaded(run: Path, tmp_path: Path, name: str) -> None:
    """An adapter, or other special tokens, beside a model whose own files are whole: other scores with exit status 0."""
    broken = shutil.copytree(run, tmp_path / "run")
    ADD[name](broken / "model")
    message = f"{re.escape(name)} was added after the folder was written.* Move it elsewhere"
    with pytest.raises(DamagedFileError, match=message):
        Run.load(broken)
    with pytest.raises(DamagedFileError, match=message):
        export_run(broken, tmp_path / "other", library_only=True)
    out = tmp_path / "export"
    export_run(run, out, library_only=True)
    ADD[name](out)
    with pytest.raises(DamagedFileError, match=message):
        Scorer.from_export(out, device="cpu")


def test_what_nothing_loads_may_lie_there(run: Path, tmp_path: Path) -> None:
    """A licence, notes, pictures, what git and indexers leave."""
    mine = shutil.copytree(run, tmp_path / "run")
    out = tmp_path / "export"
    export_run(run, out, library_only=True)
    for folder in (mine / "model", out):
        for name in (
            "LICENSE",
            "notes.txt",
            "metrics.json",
            "training_args.bin",
            "clicks.gguf",
            ".gitattributes",
        ):
            (folder / name).write_text("mine")
    Run.load(mine)
    Scorer.from_export(out, device="cpu")


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    prepare(
        "ml-1m", tmp_path / "data", write_1m(tmp_path / "raw", some_ratings()), subset=True, vocab_size=400
    )
    return tmp_path / "data"


@pytest.mark.parametrize("name", ["special_tokens_map.json", "added_tokens.json"])
def test_what_is_added_to_a_tokenizer_is_not_loaded(prepared: Path, name: str) -> None:
    """Other special tokens than the fingerprint of the data says."""
    ADD[name](prepared / "tokenizer")
    with pytest.raises(DataError, match=f"{re.escape(name)} was added after the folder was written"):
        PreparedData.open(prepared)


def test_a_tokenizer_that_is_exchanged_before_it_is_loaded(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The data of one folder with the tokenizer of another that took its place meanwhile."""
    config = Run.load(run_folder(tmp_path / "run", prepared, RESET)).config
    raw = tmp_path / "raw"
    load = PreTrainedTokenizerFast.from_pretrained

    def exchanged(folder: Path, **options: Any) -> Any:
        prepare("ml-1m", prepared, raw, subset=True, vocab_size=300)
        return load(folder, **options)

    monkeypatch.setattr(PreTrainedTokenizerFast, "from_pretrained", exchanged)
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        Run.start(config)
