"""Places where a command may make a file or a folder."""

from __future__ import annotations

import os
import re
from pathlib import Path

from dti_model.config.file import CONFIG_FILE, is_run_config

# Names that commands write into their folders.
_OF_A_RUN = re.compile(
    r"config\.yaml|metrics\.json|checksums\.json|report\.png|predictions-(test|val)\.parquet|model|checkpoints|tensorboard|\..*"
)
_MADE_BY_A_RUN = ("checkpoints", "metrics.json", "model/provenance.json", ".lock")
_OF_A_SEARCH = re.compile(r"search\.json|search\.csv|search-folder\.json|base|.*=.*|\..*")
_OF_DATA = re.compile(
    r"stats\.json|(interactions|users|items|since|(contexts|profiles)(_codes)?)\.arrow|rejected\.csv|tokenizer|tokens|\..*"
)


def why_owned(path: Path, is_run: bool = False) -> str | None:
    """Why an output may not have a name: it is one of a run's, a search's or prepared data's own; None: it is free.

    A file there would be taken for theirs: `metrics.json` makes a run a finished one, and what lies in `model` goes with it.

    Args:
        path: of the output.
        is_run: it is the folder of a run, which a search has in it.
    """
    real = Path(os.path.realpath(path))
    for folder in real.parents:
        names = _names_of(folder)
        if names is not None:
            if is_run and names is _OF_A_SEARCH:
                return None
            is_own = names.fullmatch(real.relative_to(folder).parts[0]) is not None
            return f"is a place of {folder}'s own files: choose another name" if is_own else None
    return None


def _names_of(folder: Path) -> re.Pattern[str] | None:
    """The names that mean something in a folder of ours; None: it is none."""
    # A config.yaml alone may be a copy whose settings somebody uses again.
    if any((folder / name).exists() for name in _MADE_BY_A_RUN) and is_run_config(folder / CONFIG_FILE):
        return _OF_A_RUN
    if (folder / "search-folder.json").is_file():
        return _OF_A_SEARCH
    if (folder / "stats.json").is_file() and (folder / "interactions.arrow").is_file():
        return _OF_DATA
    return None


def why_irreplaceable(out: Path) -> str | None:
    """Why another folder cannot take the place of a folder, and the way out; None: it can, as far as places go."""
    real = Path(os.path.realpath(out))
    if os.path.ismount(real):
        return "is a mount point, which cannot be replaced. Name a folder in it with --out"
    if _current_folder().is_relative_to(real):
        return "is the current folder, or around it, and cannot be replaced. Name another one with --out"
    return None


def check_new_folder(out: Path) -> None:
    """Only nothing, or an empty folder, may be where a new folder is to be, and not where another command keeps its own.

    Raises:
        FileExistsError: something is there, or the place cannot be had.
    """
    owned = why_owned(out)
    if owned is not None:
        raise FileExistsError(f"{out} {owned}")
    if not os.path.lexists(os.path.realpath(out)):
        return
    if not out.is_dir() or any(out.iterdir()):
        raise FileExistsError(f"{out} exists and is not empty: choose another --out, or delete it")
    reason = why_irreplaceable(out)
    if reason is not None:
        raise FileExistsError(f"{out} {reason}")


def _current_folder() -> Path:
    try:
        return Path(os.path.realpath(os.getcwd()))
    except FileNotFoundError:  # somebody removed it
        return Path()
