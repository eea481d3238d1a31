"""Locks that end with their process: one writer of a file or folder at a time.

    with locked(folder / ".lock", "dti train"): ...        held inside a folder
    with locked_beside(folder, "dti export"): ...          `.NAME.lock` beside a folder that is itself replaced

The kernel releases the lock of a killed process; the file stays, and the next process takes it. A lock file is empty or holds one line
that names its holder. Any other file of its name is somebody's own: it is refused and left untouched.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

_MAX_BYTES = 1000  # of a line that says who holds a lock
_TRIES = 20  # some folders, such as /proc, say for ever that a file is not there that is to be made
_HOLDER = re.compile(rb"[^\n(]{1,60} \(process \d+[^\n]*\)\n?")


class LockedError(RuntimeError):
    """Another process writes here; the message says which."""


@contextmanager
def locked(path: Path, purpose: str, written: Path | None = None) -> Iterator[None]:
    """Hold the lock file `path`; it is gone at the end, or free after a kill.

    Missing folders are made, and removed again if they stay empty. On a file system without locks nothing is held.

    Args:
        path: the lock file.
        purpose: what the others are told, such as "dti train".
        written: what is written meanwhile; None: the folder that `path` is in.

    Raises:
        FileExistsError: `path` is somebody's own file, or a link.
        LockedError: another process holds it.
    """
    missing = [folder for folder in (path.parent, *path.parent.parents) if not folder.exists()]
    try:
        descriptor = _lock_file(path, path.parent if written is None else written)
        try:
            os.ftruncate(descriptor, 0)
            since = datetime.now().astimezone().isoformat(timespec="seconds")
            holder = f"{purpose} (process {os.getpid()} on {socket.gethostname()}, since {since})\n"
            with suppress(OSError):  # a full disk: then the others are told less
                os.pwrite(descriptor, holder.encode(), 0)
            yield
        finally:
            if is_still(path, descriptor):
                path.unlink(missing_ok=True)
            os.close(descriptor)
    finally:
        for folder in missing:
            with suppress(OSError):  # not empty: something has been written
                folder.rmdir()


@contextmanager
def locked_beside(folder: Path, purpose: str) -> Iterator[None]:
    """Hold the lock of a folder that is itself replaced: `.NAME.lock` beside it, through links."""
    real = Path(os.path.realpath(folder))
    with locked(real.with_name(f".{real.name}.lock"), purpose, folder):
        yield


def _lock_file(path: Path, written: Path) -> int:
    """An open and locked descriptor of `path`."""
    while True:
        descriptor = _opened(path)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, _MAX_BYTES, 0).decode(errors="replace").strip() or "another process"
            os.close(descriptor)
            raise LockedError(
                f"{written} is being written by {holder}: wait until it has ended, or choose another"
            ) from None
        except OSError:
            return descriptor
        # Whoever held it may have removed the file between our two calls: then ours is the lock of nothing.
        if is_still(path, descriptor):
            return descriptor
        os.close(descriptor)


def _opened(path: Path) -> int:
    """A descriptor of a lock file that is new or of this program."""
    try:
        descriptor = _created(path)
    except OSError as error:
        if error.errno == errno.ELOOP and path.is_symlink():
            raise _foreign(path, "a link") from None
        if path.exists() and not path.is_file():
            raise _foreign(path, "no file") from None
        raise
    kind = _foreign_kind(descriptor)
    if kind is not None:
        os.close(descriptor)
        raise _foreign(path, kind)
    return descriptor


def _created(path: Path) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    for _ in range(_TRIES):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Whoever made the folder too may remove it between our two calls.
        with suppress(FileNotFoundError):
            return os.open(path, flags, 0o666)
    return os.open(path, flags, 0o666)


def _foreign_kind(descriptor: int) -> str | None:
    """Somebody else's file in words; None: it is a lock file."""
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        return "no regular file"
    if found.st_nlink > 1:
        return "another name of some file"
    content = os.pread(descriptor, _MAX_BYTES + 1, 0)
    if content and (len(content) > _MAX_BYTES or not _HOLDER.fullmatch(content)):
        return "a file of something else"
    return None


def _foreign(path: Path, kind: str) -> FileExistsError:
    return FileExistsError(
        f"{path} must be a lock file of this program, or not be there, but is {kind}. It is left as it is: move it away, or choose "
        "another name to write to"
    )


def is_still(path: Path, descriptor: int) -> bool:
    """Whether `path` is what a descriptor was opened for, and not a link to it."""
    try:
        return os.path.samestat(os.lstat(path), os.fstat(descriptor))
    except OSError:
        return False
