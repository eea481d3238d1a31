"""Renaming in one step: two names exchanged, or a name taken that nothing has."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

_AT_FDCWD, _RENAME_NOREPLACE, _RENAME_EXCHANGE = -100, 1, 2  # of Linux' renameat2


def exchanged(a: Path, b: Path) -> bool:
    """Exchange two names, so that a kill never finds one of them missing; False where that is unknown."""
    return _renamed(a, b, _RENAME_EXCHANGE)


def rename_file_to_nothing(new: Path, path: Path) -> None:
    """Rename a file to a name that nothing has.

    Raises:
        FileExistsError: something has it, and keeps it.
    """
    if _renamed(new, path, _RENAME_NOREPLACE):
        return
    try:
        os.link(new, path)
    except FileExistsError:
        raise _in_the_way(path) from None
    except OSError:  # a file system without hard links: the last look is all that there is
        if os.path.lexists(path):
            raise _in_the_way(path) from None
        os.replace(new, path)
    else:
        os.unlink(new)


def rename_folder_to_nothing(new: Path, path: Path) -> None:
    """Rename a folder to a name that nothing has, or an empty folder: the kernel replaces no other.

    Raises:
        FileExistsError: something has it, and keeps it.
    """
    try:
        new.rename(path)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        raise _in_the_way(path) from None


def _renamed(a: Path, b: Path, how: int) -> bool:
    """Linux' renameat2; False where it, or this way of it, is unknown. Raises a FileExistsError where `b` is in the way."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):  # an old C library
        return False
    failed: int = renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), how)
    if failed and ctypes.get_errno() == errno.EEXIST:
        raise _in_the_way(b)
    return not failed


def _in_the_way(path: Path) -> FileExistsError:
    return FileExistsError(
        f"{path} came while it was being made, and is left as it is: move it away and give the same command again, or choose "
        "another name"
    )
