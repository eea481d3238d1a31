"""Data, and a pretrained model, for benchmarks where there is none: no network, no files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from benchmarks.shapes import Shape, shape
from dti_model.data import PreparedData
from dti_model.model import fast_tokenizer_from


def made_up_data(folder: Path) -> Path:
    """A prepared folder without a network: 400 users with 60 ratings of 600 movies, texts of MovieLens' lengths."""
    from dti_model.data import prepare  # needs polars, which measuring on data that are there does not

    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefghiklmnoprstuvw"), rng.integers(3, 9))) for _ in range(400)]
    raw = folder / "raw"
    raw.mkdir(parents=True)
    titles = [" ".join(rng.choice(words, rng.integers(2, 6))) for _ in range(600)]
    (raw / "movies.dat").write_text(
        "".join(f"{i}::{title} (1995)::Drama|Comedy\n" for i, title in enumerate(titles, 1))
    )
    lines = [
        f"{user}::{item}::{rng.integers(1, 6)}::{time}\n"
        for user in range(1, 401)
        for time, item in enumerate(rng.permutation(600)[:60] + 1, 1000 * user)
    ]
    (raw / "ratings.dat").write_text("".join(lines))
    prepare("ml-1m", folder / "data", raw, subset=True)
    return folder / "data"


def random_model(
    shape: Shape, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
) -> PreTrainedModel:
    """A Llama of random weights in `dtype`. As in one that is loaded, rotary frequencies stay float32: rounded, positions would be wrong."""
    torch.manual_seed(seed)
    config = LlamaConfig(max_position_embeddings=1 << 20, use_cache=False, **shape)
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model


def made_up_model(folder: Path, data: Path) -> Path:
    """A folder with a tiny Llama of random weights and the tokenizer of a prepared folder, as transformers writes them."""
    tokenizer = fast_tokenizer_from(PreparedData.open(data).tokenizer_dir)
    random_model(shape(2, 32, 2, 1, 64, len(tokenizer), tied=True)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
