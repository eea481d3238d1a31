"""Loads the work of others: configurations, weights, adapters, tokenizers. No code in it is run, nothing is unpickled, and only a network
that the user named is asked.

Every call of `from_pretrained` in the project is here, which a test holds it to. Weights come from safetensors alone: a pickle is a
program. Of a folder that brings code of its own (`auto_map`) transformers would silently compute something else, so it is refused.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from dti_model.config import PretrainedModelError
from dti_model.files import read_file

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_ADAPTER_CONFIG, _ADAPTER = "adapter_config.json", "adapter_model.safetensors"
_PICKLE = re.compile(r".*\.(bin|pt|pth|ckpt|pkl|pickle)")
# Left by a training beside the weights of a model.
_NO_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state.*)\.(bin|pt|pth)")
_CONVERT = (
    'it is a pickle, a program that reading runs. Make safetensors of it once, python -c "from transformers import '
    "AutoModelForCausalLM as M; M.from_pretrained('FOLDER', use_safetensors=False).save_pretrained('NEW')\", and name NEW"
)


def may_hold_weights(name: str) -> bool:
    """Whether a file of this name in the folder of a model can be its weights: not its training's arguments, nor the optimizer."""
    return _NO_WEIGHTS.fullmatch(name) is None


def config_from(source: str | Path) -> Any:
    """The configuration of a model: of a folder, or of an id on the hub."""
    check_folder(Path(source))
    config: Any = AutoConfig.from_pretrained(source, trust_remote_code=False)
    # A file may name kernels of the hub, which are programs.
    config._attn_implementation = "sdpa"
    config._experts_implementation = None
    return config


def model_from(source: str | Path, **options: Any) -> PreTrainedModel:
    """A model of safetensors: of a folder, or of an id on the hub.

    Raises:
        PretrainedModelError: a folder with other weights, an adapter or code; weights that lack some.
    """
    folder = Path(source)
    check_folder(folder)
    if folder.is_dir():
        _check_weights(folder)
    config = config_from(source)
    if "attn_implementation" in options:
        config._attn_implementation = options.pop("attn_implementation")
    result: Any = AutoModelForCausalLM.from_pretrained(
        source,
        config=config,
        trust_remote_code=False,
        use_safetensors=True,
        weights_only=True,
        output_loading_info=True,
        **options,
    )
    model: PreTrainedModel = result[0]
    report = result[1]
    # Missing weights would be random numbers.
    missing = sorted(report["missing_keys"])
    if missing:
        raise PretrainedModelError(
            f"{source} holds no weights of {missing[0]}, and lacks {len(missing)} tensors of its architecture in all: get it again"
        )
    return model


def gguf_model_from(folder: str, file: str, dtype: torch.dtype) -> PreTrainedModel:
    """A model of a GGUF file, unpacked to `dtype`, without the marks of a quantised model, which can be neither trained nor saved."""
    unpack: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):  # newer versions can keep the blocks packed
        unpack["quantization_config"] = transformers.GgufConfig(dequantize=True)
    packed = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file, trust_remote_code=False, use_safetensors=True, dtype=dtype, **unpack
    )
    config = type(packed.config)(**packed.config.to_dict())
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model: PreTrainedModel = type(packed).from_pretrained(
        None,
        config=config,
        state_dict=packed.state_dict(),
        use_safetensors=True,
        trust_remote_code=False,
        dtype=dtype,
    )
    return model


def tokenizer_from(source: str | Path, **options: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, an id on the hub, or of a GGUF file (`gguf_file`)."""
    check_folder(Path(source))
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        source, trust_remote_code=False, **options
    )
    return tokenizer


def fast_tokenizer_from(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder that this project wrote."""
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(
        folder, trust_remote_code=False, local_files_only=True
    )
    return tokenizer


def adapter_from(model: PreTrainedModel, folder: Path) -> PeftModel:
    """A model with the LoRA adapter of a folder, not trainable.

    Raises:
        PretrainedModelError: it is no LoRA adapter of safetensors, or damaged.
    """
    with naming_errors(f"the adapter {folder} cannot be loaded"), warnings.catch_warnings():
        # The model without its updates would be used.
        warnings.filterwarnings("error", message="Found missing adapter keys")
        config = _object_of(folder / _ADAPTER_CONFIG)
        if config.get("peft_type") != "LORA" or config.get("megatron_config") is not None:
            raise PretrainedModelError(
                f"{folder / _ADAPTER_CONFIG} is no LoRA adapter that `dti train` wrote"
            )
        if not (folder / _ADAPTER).is_file():
            pickled = folder / "adapter_model.bin"
            raise PretrainedModelError(
                f"{pickled} is not loaded: {_CONVERT}"
                if pickled.exists()
                else f"{folder / _ADAPTER} is missing"
            )
        adapted: PeftModel = PeftModel.from_pretrained(
            model, str(folder), trust_remote_code=False, use_safetensors=True, local_files_only=True
        )
        return adapted


@contextmanager
def naming_errors(what: str) -> Iterator[None]:
    """Errors of the libraries as `PretrainedModelError`s that begin with `what`: impossible values in a file raise any kind."""
    try:
        yield
    except (PretrainedModelError, MemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise PretrainedModelError(f"{what}: {reason:.500}") from error


def check_folder(folder: Path) -> None:
    """Refuse a folder that brings code; what is no folder passes.

    Raises:
        PretrainedModelError: naming the file.
    """
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        path = folder / name
        if path.is_file() and "auto_map" in _object_of(path):
            raise PretrainedModelError(
                f"{path} names code of the model's own (auto_map), which is never run. Take auto_map out of it if the plain "
                "architecture computes the same, or choose another model"
            )


def _check_weights(folder: Path) -> None:
    if (folder / _ADAPTER_CONFIG).exists():
        raise PretrainedModelError(
            f"{folder / _ADAPTER_CONFIG}: the folder holds an adapter, which would be put on top of the model. Merge it (peft: "
            "merge_and_unload), or move it elsewhere"
        )
    if "transformers_weights" in _object_of(folder / "config.json"):
        raise PretrainedModelError(
            f"{folder / 'config.json'} names another file of weights (transformers_weights): call it {_WEIGHTS}, and take that out"
        )
    if (folder / _WEIGHTS).is_file():
        return
    if (folder / _INDEX).is_file():
        _check_index(folder)
        return
    for path in sorted(folder.iterdir()):
        if _PICKLE.fullmatch(path.name) and may_hold_weights(path.name):
            raise PretrainedModelError(f"{path} is not loaded: {_CONVERT}")
    raise PretrainedModelError(f"{folder} holds no weights: neither {_WEIGHTS} nor {_INDEX} is there")


def _check_index(folder: Path) -> None:
    files = _object_of(folder / _INDEX).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise PretrainedModelError(f"{folder / _INDEX} has no weight_map, from names of tensors to files")
    for name in {json.dumps(file): file for file in files.values()}.values():
        if not isinstance(name, str) or "/" in name or not name.endswith(".safetensors"):
            raise PretrainedModelError(
                f"{folder / _INDEX} names {json.dumps(name):.100}, which is no safetensors file of this folder"
            )
        if not (folder / name).is_file():
            raise PretrainedModelError(f"{folder / name} is missing, and {_INDEX} names it")


def _object_of(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(read_file(path))
    except FileNotFoundError:
        raise PretrainedModelError(f"{path} is missing") from None
    except (ValueError, RecursionError) as error:
        raise PretrainedModelError(f"{path} is no JSON ({error})") from error
    if not isinstance(value, dict):
        raise PretrainedModelError(f"{path} must hold an object")
    return value
