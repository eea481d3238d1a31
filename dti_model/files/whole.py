"""Atomic writes: files and folders that appear whole or not at all.

    with whole_file(path) as temporary: temporary.write_text(...)        flushed to the disk, then renamed to `path`
    with whole_folder(path) as temporary: ...                            likewise; an older folder of that name goes
    with temporary_folder(path) as temporary: ...                        removed at the end, or by the next one after a kill

Temporary names are `.NAME.dti-<16 hexadecimal digits>.incomplete`, beside NAME: nobody else's look so. A process locks its own while it
lives, so that the next writer of NAME recognises and removes what a killed process left. A replacement keeps the older one's mode.

Cost: one fsync a file and folder.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dti_model.error_lines import reason_of
from dti_model.files.locks import is_still
from dti_model.files.renames import exchanged, rename_file_to_nothing, rename_folder_to_nothing

_INCOMPLETE, _REMOVED = ".incomplete", ".removed"
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.dti-[0-9a-f]{16}(\.incomplete|\.removed)")
# Left in any folder by file browsers, notebooks and network file systems: nobody's work.
_PASSING = re.compile(r"\.DS_Store|\._.*|\.nfs[0-9a-f]+|\.ipynb_checkpoints|Thumbs\.db|desktop\.ini")
# A full disk, a quota or a size limit, and the same in the words of libraries written in Rust and C++.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FULL_WORDS = re.compile(
    "No space left|File too large|Disk quota exceeded|os error 28|os error 27|os error 122"
)


class WriteError(OSError):
    """A file or folder cannot be written; the message names it, why, and the way out. Older content is untouched."""


@contextmanager
def whole_file(path: str | Path, replace: bool = True) -> Iterator[Path]:
    """A temporary path to write to; at the end it becomes `path`, at an error it is removed.

    Args:
        path: the file to make.
        replace: an older `path` is replaced; False: it stays, also one that comes in the last moment.

    Raises:
        FileExistsError: there is a `path` in the end, and `replace` is False.
        WriteError: the disk is full; an older `path` is untouched.
    """
    path = Path(os.path.realpath(path))  # through a link, so that the link stays one
    with _incomplete(path, is_folder=False) as temporary:
        with _mode_of(path, temporary, stat.S_IRUSR | stat.S_IWUSR):
            yield temporary
            _flush(temporary)
        if replace:
            os.replace(temporary, path)
        else:
            rename_file_to_nothing(temporary, path)
        _flush(path.parent)


@contextmanager
def whole_folder(
    path: str | Path, check: Callable[[], object] | None = None, replace: bool = True
) -> Iterator[Path]:
    """An empty temporary folder to fill; at the end it becomes `path`, in the place of an older one; at an error it is removed.

    Args:
        path: the folder to make.
        check: called when everything is on the disk, right before an older `path` goes; its error keeps that one.
        replace: an older `path` is replaced; False: only an empty one is, and anything else stays, also one that comes in the last moment.

    Raises:
        FileExistsError: there is a `path` that is not an empty folder in the end, and `replace` is False.
        WriteError: the disk is full; an older `path` is untouched.
    """
    path = Path(os.path.realpath(path))
    with temporary_folder(path) as temporary:
        mode = stat.S_IMODE(temporary.stat().st_mode) & 0o666
        with _mode_of(path, temporary, stat.S_IRWXU):
            yield temporary
            for written in temporary.rglob("*"):
                _open_to_others(written, mode)
                _flush(written)
            _flush(temporary)
        if check is not None:
            check()
        if replace:
            _swap(temporary, path)
        else:
            rename_folder_to_nothing(temporary, path)
        _flush(path.parent)


@contextmanager
def temporary_folder(path: str | Path) -> Iterator[Path]:
    """An empty hidden folder beside `path`, removed at the end; after a kill, by the next call with the same `path`.

    Raises:
        WriteError: the disk is full.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    with _incomplete(path, is_folder=True) as temporary:
        yield temporary


@contextmanager
def _incomplete(path: Path, is_folder: bool) -> Iterator[Path]:
    """A new hidden file or folder beside `path`, locked; its name is free at the end, whatever has it by then."""
    remove_leftovers(path)
    with _named_errors(path):
        temporary, descriptor = _temporary(path, is_folder)
        try:
            yield temporary
        finally:
            if is_folder:
                remove_tree(temporary)  # an older folder by now, where there was one
            else:
                temporary.unlink(missing_ok=True)
            os.close(descriptor)


def _temporary(path: Path, is_folder: bool) -> tuple[Path, int]:
    while True:
        temporary = _hidden(path, _INCOMPLETE)
        if is_folder:
            temporary.mkdir()
        flags = os.O_RDONLY | os.O_DIRECTORY if is_folder else os.O_RDWR | os.O_CREAT | os.O_EXCL
        descriptor = os.open(temporary, flags, 0o666)
        with suppress(OSError):  # a file system without locks: then nobody removes leftovers there
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Between creation and lock another writer may have taken it for a leftover.
        if is_still(temporary, descriptor):
            return temporary, descriptor
        os.close(descriptor)


@contextmanager
def _mode_of(path: Path, temporary: Path, needed: int) -> Iterator[None]:
    """Give a replacement the mode of an older `path`, and the bits that are needed to write it while it is written."""
    older = stat.S_IMODE(path.stat().st_mode) & 0o777 if path.exists() else None
    if older is not None:
        _set_mode(temporary, older | needed)
    yield
    if older is not None:
        _set_mode(temporary, older)


def _set_mode(path: Path, mode: int) -> None:
    with suppress(OSError):  # a file system that knows no modes
        path.chmod(mode)


def _open_to_others(written: Path, mode: int) -> None:
    """Give a file the mode of the umask: some libraries write theirs for their user alone, whatever the umask says."""
    found = written.lstat().st_mode
    if stat.S_ISREG(found) and stat.S_IMODE(found) == 0o600:
        _set_mode(written, mode)


def _swap(new: Path, path: Path) -> None:
    """Put the folder `new` in the place of the folder `path`; where there is one, it ends up under a hidden name."""
    if not path.exists():
        new.rename(path)
    elif not exchanged(new, path):
        hidden = _hidden(path, _REMOVED)
        path.rename(hidden)
        try:
            new.rename(path)
        except BaseException:
            hidden.rename(path)
            raise
        remove_tree(hidden)


def remove_folder(path: Path) -> None:
    """Rename a folder away, then delete it, so that a kill halfway never leaves something that looks complete."""
    if path.exists():
        hidden = _hidden(path, _REMOVED)
        path.rename(hidden)
        remove_tree(hidden, ignore_errors=False)


def remove_tree(folder: Path, ignore_errors: bool = True) -> None:
    """Delete a folder, also one that its owner made read-only, with all that is in it; links in it are not followed."""
    below = [folder]
    while below:
        place = below.pop()
        if place.is_dir() and not place.is_symlink():
            _set_mode(place, stat.S_IRWXU)
            with suppress(OSError):  # another user's
                below += place.iterdir()
    shutil.rmtree(folder, ignore_errors=ignore_errors)


def remove_leftovers(path: Path) -> None:
    """Remove what killed writers of `path` left beside it; what living ones are writing, and what is not ours, stays."""
    with suppress(OSError):
        for name in os.listdir(path.parent):
            ours = _TEMPORARY.fullmatch(name)
            if ours is None or ours["name"] != path.name:
                continue
            if name.endswith(_REMOVED):
                remove_tree(path.parent / name)
            else:
                _remove_unlocked(path.parent / name)


def _remove_unlocked(leftover: Path) -> None:
    try:
        descriptor = os.open(leftover, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:  # another user's, or gone by now
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if leftover.is_dir():
            remove_tree(leftover)
        else:
            leftover.unlink(missing_ok=True)
    except OSError:  # somebody is writing it, or locks are unknown here
        pass
    finally:
        os.close(descriptor)


def is_temporary(path: Path) -> bool:
    """Whether a name is one that only this module gives."""
    return _TEMPORARY.fullmatch(path.name) is not None


def is_passing(path: Path) -> bool:
    """Whether a file or folder is one that programs leave behind wherever somebody looks, and that goes with its folder."""
    return _PASSING.fullmatch(path.name) is not None


def _hidden(path: Path, ending: str) -> Path:
    return path.with_name(f".{path.name}.dti-{secrets.token_hex(8)}{ending}")


@contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    """Full disks, in whatever words a library says it, as one line that names the file."""
    try:
        yield
    except WriteError:
        raise
    except Exception as error:
        full = isinstance(error, OSError) and error.errno in _FULL
        if not full and not _FULL_WORDS.search(str(error)):
            raise
        raise WriteError(
            f"{path} cannot be written ({reason_of(error)}). Nothing half written is left: make room and give the same command again"
        ) from error


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
