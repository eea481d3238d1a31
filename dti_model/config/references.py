"""References to pretrained models, of `model.pretrained` and `--base`, and the absolute ones that run folders keep.

    models/smollm2-135m, /models/llama, ~/x.gguf     a folder or a GGUF file, wherever there is one
    hub:meta-llama/Llama-3.1-8B-Instruct             a model of the Hugging Face hub: downloaded, unless its cache has it
    meta-llama/Llama-3.1-8B-Instruct                 likewise, but only out of the hub's cache on this machine

Only `hub:` goes to the network. A mistyped or missing `models/x` looks like an id of the hub: without this rule a run would load the
model of a stranger called `models`. Run folders keep an absolute path, or `hub:` and the id.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

HUB = "hub:"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_OLD_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*", re.ASCII)  # gpt2: from before hub models had owners


class PretrainedModelError(ValueError):
    """A pretrained model cannot be found, is of another architecture, or needs what is not installed."""


@dataclass(frozen=True)
class Reference:
    """A pretrained model's place.

    Attributes:
        source: what `from_pretrained` takes: a folder, or an id of the hub.
        gguf_file: the file in that folder, where it is one.
        on_hub: `source` is an id.
        may_download: `hub:` was said.
    """

    source: str
    gguf_file: str | None = None
    on_hub: bool = False
    may_download: bool = False

    @property
    def stored(self) -> str:
        """The reference that a run folder keeps."""
        if self.on_hub:
            return HUB + self.source
        return self.source if self.gguf_file is None else str(Path(self.source) / self.gguf_file)

    @property
    def name(self) -> str:
        """As other programs know it: a path, or the hub's id."""
        return self.stored.removeprefix(HUB)

    @property
    def is_cached(self) -> bool:
        """Whether the hub's cache on this machine has begun to hold it."""
        return self.on_hub and _cached_config(self.source) is not None

    @property
    def folder(self) -> Path:
        """The folder of its files; of a model of the hub, in the cache."""
        if not self.on_hub:
            return Path(self.source)
        found = _cached_config(self.source)
        if found is None:
            raise PretrainedModelError(f"{HUB}{self.source} is not in the hub's cache on this machine")
        return found.parent


def locate(reference: str) -> Reference:
    """Find a model; asks no network.

    Raises:
        PretrainedModelError: nothing is there; the message says what could be.
    """
    if reference.startswith(HUB):
        name = reference.removeprefix(HUB)
        if not (_HUB_ID.fullmatch(name) or _OLD_HUB_ID.fullmatch(name)):
            raise PretrainedModelError(f"{reference}: an id of the hub is {HUB}owner/name")
        return Reference(name, on_hub=True, may_download=True)
    path = Path(os.path.abspath(os.path.expanduser(reference)))
    if path.suffix == ".gguf":
        if not path.is_file():
            raise PretrainedModelError(f"model.pretrained: there is no file {path}")
        return Reference(str(path.parent), gguf_file=path.name)
    if path.is_dir():
        return _folder(path)
    if path.exists():
        raise PretrainedModelError(
            f"model.pretrained: {path} is neither a folder nor a GGUF file: name the folder"
        )
    if _HUB_ID.fullmatch(reference) and _cached_config(reference) is not None:
        return Reference(reference, on_hub=True)
    message = f"model.pretrained: there is no folder or GGUF file {reference} ({path})"
    if _HUB_ID.fullmatch(reference):
        message += (
            f", and the hub's cache on this machine has no model of that name. Say where it is (model.pretrained, --base), get it "
            f"with `dti fetch-model`, or write {HUB}{reference} for the hub's"
        )
    raise PretrainedModelError(message)


def located(reference: str) -> str:
    """The reference that a run folder keeps; one that leads nowhere stays as it is, and loading it will say so."""
    try:
        return locate(reference).stored
    except PretrainedModelError:
        return reference


def _folder(path: Path) -> Reference:
    if not (path / "config.json").is_file():
        ggufs = sorted(path.glob("*.gguf"))
        hint = f"; name the GGUF file itself: {ggufs[0]}" if ggufs else ""
        raise PretrainedModelError(f"{path} is not a model folder: it has no config.json{hint}")
    return Reference(str(path))


def _cached_config(name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json")
    return Path(found) if isinstance(found, str) else None
