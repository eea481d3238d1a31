"""Where a command may make a folder."""

from __future__ import annotations

import os
from pathlib import Path


def why_irreplaceable(out: Path) -> str | None:
    """Why another folder cannot take the place of a folder, and the way out; None: it can, as far as places go."""
    real = Path(os.path.realpath(out))
    if os.path.ismount(real):
        return "is a mount point, which cannot be replaced. Name a folder in it with --out"
    if _current_folder().is_relative_to(real):
        return "is the current folder, or around it, and cannot be replaced. Name another one with --out"
    return None


def check_new_folder(out: Path) -> None:
    """Only nothing, or an empty folder, may be where a new folder is to be.

    Raises:
        FileExistsError: something is there, or the place cannot be had.
    """
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
