"""Folders for compiled code. Later processes run it, so a folder must be absolute, no link, this user's, and writable by nobody else.

They are `$XDG_CACHE_HOME/dti_kernels`, `~/.cache/dti_kernels` and `$TMPDIR/dti_kernels-UID` (/tmp without TMPDIR), or DTI_CACHE_DIR alone
if it is set. No folder beneath the current one is used unasked: it may hold files that somebody downloaded or unpacked.
"""

from __future__ import annotations

import os
import pwd
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

Result = TypeVar("Result")


def in_private_folder(use: Callable[[Path], Result]) -> Result:
    """Use the first folder that will do.

    Args:
        use: takes a folder, which exists; raises OSError if it will not do.

    Returns:
        The result of `use`.

    Raises:
        OSError: no folder will do; the message names each with its reason, and the way out, in one line.
    """
    tried = []
    for folder in _folders():
        try:
            _make_private(folder)
            return use(folder)
        except OSError as error:
            tried.append(f"{folder} ({error.strerror or error})")
    message = (
        f"no folder will do for compiled code: {', '.join(tried)}. Name a folder of your own in DTI_CACHE_DIR"
    )
    raise OSError(" ".join(message.split()))


def check_owner(status: os.stat_result) -> None:
    """Raise OSError for a file or folder that is another user's, or that others may write to."""
    if status.st_uid != os.geteuid():
        raise OSError("it belongs to another user")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise OSError("others may write to it: chmod go-w")


def _folders() -> list[Path]:
    chosen, user = os.environ.get("DTI_CACHE_DIR"), os.environ.get("XDG_CACHE_HOME")
    if chosen:
        return [Path(chosen)]
    caches = [*([Path(user)] if user else []), _home() / ".cache"]
    temporary = Path(os.environ.get("TMPDIR") or "/tmp") / f"dti_kernels-{os.geteuid()}"
    return list(dict.fromkeys([*(cache / "dti_kernels" for cache in caches), temporary]))


def _home() -> Path:
    """HOME, else the system's entry for this user; `~` if there is neither."""
    with suppress(KeyError):
        return Path(os.environ.get("HOME") or pwd.getpwuid(os.geteuid()).pw_dir)
    return Path("~")


def _make_private(folder: Path) -> None:
    if not folder.is_absolute():
        raise OSError("no absolute path")
    home = _home()
    # `sudo` may keep another user's HOME: files that root makes there would be in that user's way.
    if folder == home / ".cache" / "dti_kernels" and home.stat().st_uid != os.geteuid():
        raise OSError(f"{home} belongs to another user")
    for place in (*reversed(folder.parents), folder):
        if not place.is_dir():
            with suppress(FileExistsError):
                place.mkdir(mode=0o700)  # whatever the umask
    status = os.lstat(folder)
    if stat.S_ISLNK(status.st_mode):
        raise OSError("it is a link: name the folder itself")
    if not stat.S_ISDIR(status.st_mode):
        raise OSError("it is no folder")
    check_owner(status)
