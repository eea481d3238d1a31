"""A trained run as a plain model folder: what serving needs and nothing of this project's own.

model.safetensors, config.json, tokenizer    for AutoModelForCausalLM and AutoTokenizer
dti.json                                      what [SUM] rows get, and the tokens around item texts: DTIConfig and PromptFormat
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from dti_model.config import TrainConfig
from dti_model.lora import load_adapter, merge
from dti_model.pretrained import load_causal_lm
from dti_model.prompts import PromptFormat
from dti_model.run import MODEL_FOLDER, write_json


def export_run(run: Path, out: Path) -> None:
    """Merge a run's adapter into its base model, or copy its model, into a folder that appears only when complete.

    Weights have the run's `model.dtype`. The base of a quantised run is loaded unquantised: its scores then differ from the run's
    by what quantisation cost.

    Args:
        run: folder made by `dti train`.
        out: folder to make; must not exist, or be empty.

    Raises:
        FileNotFoundError: `run` is no run folder, or its training has not ended.
        FileExistsError: `out` is not empty.
        PretrainedModelError: the base model cannot be loaded.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is not empty: choose another --out, or delete it")
    config = TrainConfig.load(run)
    source = run / MODEL_FOLDER
    if not (source / "tokenizer.json").is_file():
        raise FileNotFoundError(
            f"{source} holds no model: the run has not ended. Give `dti train` the same settings again to go on"
        )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(source)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
        made = Path(temporary) / "model"
        if config.model.uses_lora:
            base = load_causal_lm(replace(config.model, quantize=0, liger=False), tokenizer)
            merge(load_adapter(base, source)).save_pretrained(made)
            tokenizer.save_pretrained(made)
        else:
            shutil.copytree(source, made)
        prompt = PromptFormat.of(tokenizer, config.window, config.max_item_tokens, config.model.instruction)
        write_json(made / "dti.json", {"dti": asdict(config.dti), "prompt": asdict(prompt)})
        made.replace(out)
