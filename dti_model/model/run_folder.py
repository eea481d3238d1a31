"""The model's folder in a run folder, and what may be in it."""

from __future__ import annotations

import re
from pathlib import Path

from dti_model.files import CHECKSUMS_FILE, is_passing, read_checksums
from dti_model.model.fingerprints import PROVENANCE_FILE
from dti_model.model.model_card import CARD_FILE

# Of a model without checksums, which version 0.1.0 wrote.
_MODEL_FILES = re.compile(
    r"README\.md|(generation_|adapter_|tokenizer_)?config\.json|(adapter_)?model[\w.-]*\.safetensors(\.index\.json)?"
    r"|tokenizer\.json|special_tokens_map\.json|added_tokens\.json|chat_template\.jinja|dti\.json|tokenizer\.model|vocab\.(json|txt)|merges\.txt"
)


class RunExistsError(FileExistsError):
    """The run folder holds another run, or a finished one, or is not a run folder."""


def check_model_is_ours(path: Path) -> None:
    """Refuse a model folder that holds anything that no run wrote: a newer model takes its place, with everything in it.

    Raises:
        RunExistsError: naming what is there.
    """
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise RunExistsError(
            f"{path} is not a folder of a run's model: move it elsewhere, or choose another --out"
        )
    if not path.exists():
        return
    known = None
    if (path / CHECKSUMS_FILE).is_file():
        known = read_checksums(path / CHECKSUMS_FILE, f"Delete {path}, or choose another --out").keys()
        if PROVENANCE_FILE not in known:  # an export
            raise RunExistsError(
                f"{path} is not a folder of a run's model: move it elsewhere, or choose another --out"
            )
    for file in sorted(path.rglob("*")):
        if is_passing(file) or any(is_passing(folder) for folder in file.relative_to(path).parents):
            continue
        name = file.relative_to(path).as_posix()
        if known is None:
            is_ours = _MODEL_FILES.fullmatch(name) is not None
        else:
            is_ours = name in (*known, CHECKSUMS_FILE, CARD_FILE)
        if not is_ours or file.is_symlink():
            raise RunExistsError(
                f"{file} is no file of a run's model, and would go with the folder: move it elsewhere, or choose another --out"
            )
