"""Files and folders that appear whole or not at all, locks that end with their process, and checksums.

    with whole_file(path) as temporary: temporary.write_text(...)        flushed to the disk, then renamed to `path`
    with whole_folder(path) as temporary: ...                            likewise; an older folder of that name goes
    with temporary_folder(path) as temporary: ...                        removed at the end, or by the next one after a kill
    with locked(folder / ".lock", "dti train"): ...                      one writer at a time; the kernel releases it on a kill
    write_sealed(path, {...}); read_sealed(path, "delete it")            JSON that carries its own sha256

Temporary names are `.NAME.RANDOM.incomplete`, beside NAME. A process holds a lock on its own ones while it lives, so the next writer of
NAME knows what a killed process left behind, and removes it.

Cost: one fsync a file, one pass of sha256 over what is checked (about 1.5 GB/s where the processor has SHA instructions).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

CHECKSUMS_FILE = "checksums.json"
_SEAL = "sha256"
_INCOMPLETE, _REMOVED = ".incomplete", ".removed"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux' renameat2
# How a full disk, a quota or a size limit ends a write. Libraries written in Rust and C++ say it in words of their own.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FULL_WORDS = (
    "No space left",
    "File too large",
    "Disk quota exceeded",
    "os error 28",
    "os error 27",
    "os error 122",
)


class WriteError(OSError):
    """A file or folder cannot be written; the message names it, why, and the way out. What was there before is untouched."""


class LockedError(RuntimeError):
    """Another process writes here; the message says which."""


class DamagedFileError(ValueError):
    """A file is not what was written; the message names it and the way out."""


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A temporary path to write to; at the end it becomes `path`, at an error it is removed.

    Raises:
        WriteError: the disk is full; an older `path` is untouched.
    """
    path = Path(os.path.realpath(path))  # through a link, so that the link stays one
    remove_leftovers(path)
    with _named_errors(path):
        temporary, descriptor = _temporary(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    try:
        with _named_errors(path):
            yield temporary
            _flush(temporary)
            os.replace(temporary, path)
            _flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
        os.close(descriptor)


@contextmanager
def whole_folder(path: str | Path, check: Callable[[], object] | None = None) -> Iterator[Path]:
    """An empty temporary folder to fill; at the end it becomes `path`, in the place of an older one; at an error it is removed.

    Args:
        path: the folder to make.
        check: called when everything is on the disk, right before an older `path` goes; what it raises keeps that one.

    Raises:
        WriteError: the disk is full; an older `path` is untouched.
    """
    path = Path(os.path.realpath(path))
    with temporary_folder(path) as temporary, _named_errors(path):
        yield temporary
        for written in (*temporary.rglob("*"), temporary):
            _flush(written)
        if check is not None:
            check()
        _swap(temporary, path)


@contextmanager
def temporary_folder(path: str | Path) -> Iterator[Path]:
    """An empty hidden folder beside `path`, removed at the end; after a kill, by the next call with the same `path`.

    Raises:
        WriteError: the disk is full.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    with _named_errors(path):
        temporary, descriptor = _temporary(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with _named_errors(path):
            yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(descriptor)


def _swap(new: Path, path: Path) -> None:
    """Put the folder `new` in the place of the folder `path`; where there is one, it ends up under a hidden name."""
    if not path.exists():
        new.rename(path)
    elif not _exchanged(new, path):
        hidden = _hidden(path, _REMOVED)
        path.rename(hidden)
        try:
            new.rename(path)
        except BaseException:
            hidden.rename(path)
            raise
        shutil.rmtree(hidden, ignore_errors=True)
    _flush(path.parent)


def _exchanged(a: Path, b: Path) -> bool:
    """Exchange two names in one step, so that a kill never finds one of them missing; False where that is unknown."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError):  # an old C library
        return False
    failed: int = renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE)
    return not failed


def remove_folder(path: Path) -> None:
    """Rename a folder away, then delete it, so that a kill halfway never leaves something that looks complete."""
    if path.exists():
        hidden = _hidden(path, _REMOVED)
        path.rename(hidden)
        shutil.rmtree(hidden)


def _hidden(path: Path, ending: str) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}{ending}")


def remove_leftovers(path: Path) -> None:
    """Remove what killed writers of `path` left beside it; what living ones are writing stays."""
    with suppress(OSError):
        for leftover in path.parent.glob(f".{_glob_escaped(path.name)}.????????{_REMOVED}"):
            shutil.rmtree(leftover, ignore_errors=True)
        for leftover in path.parent.glob(f".{_glob_escaped(path.name)}.????????{_INCOMPLETE}"):
            _remove_unlocked(leftover)


@contextmanager
def locked(path: Path, purpose: str, written: Path | None = None) -> Iterator[None]:
    """Hold the lock file `path`, whose folder is made where it is missing; it is gone at the end, or free after a kill.

    A file system that knows no locks is no reason to stop: there, nothing is held.

    Args:
        path: the lock file.
        purpose: what the others are told, such as "dti train".
        written: what is written meanwhile; None: the folder that `path` is in.

    Raises:
        LockedError: another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = _lock_file(path, path.parent if written is None else written)
    try:
        os.ftruncate(descriptor, 0)
        since = datetime.now().astimezone().isoformat(timespec="seconds")
        holder = f"{purpose} (process {os.getpid()} on {socket.gethostname()}, since {since})\n"
        with suppress(OSError):  # a full disk: then the others are told less
            os.pwrite(descriptor, holder.encode(), 0)
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _lock_file(path: Path, written: Path) -> int:
    """An open and locked descriptor of `path`."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 1000, 0).decode(errors="replace").strip() or "another process"
            os.close(descriptor)
            raise LockedError(
                f"{written} is being written by {holder}: wait until it has ended, or choose another"
            ) from None
        except OSError:
            return descriptor
        # Whoever held it may have removed the file between our two calls: then ours is the lock of nothing.
        if _is_still(path, descriptor):
            return descriptor
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Of a file's content, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksums(folder: Path) -> dict[str, dict[str, Any]]:
    """`bytes` and `sha256` of every file below a folder, by its name there with slashes; not of hidden files."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in files
    }


def check_files(folder: Path, wanted: Mapping[str, Mapping[str, Any]], way_out: str) -> None:
    """Compare files with what `checksums` gave for them.

    Args:
        folder: where they are.
        wanted: of `checksums`.
        way_out: what the user can do, a sentence without its full stop.

    Raises:
        DamagedFileError: a file is missing or another one.
    """
    for name, facts in wanted.items():
        path = folder / name
        if not path.is_file():
            raise DamagedFileError(f"{path} is missing. {way_out}")
        size = path.stat().st_size
        if size != facts["bytes"]:
            raise DamagedFileError(f"{path} has {size:,} bytes instead of {facts['bytes']:,}. {way_out}")
        if sha256_of(path) != facts["sha256"]:
            raise DamagedFileError(f"{path} is damaged: its content is not what was written. {way_out}")


def write_checksums(folder: Path) -> None:
    """Write `checksums.json` into a folder whose other files are complete."""
    write_sealed(folder / CHECKSUMS_FILE, {"files": checksums(folder)})


def check_checksums(folder: Path, way_out: str, required: bool = False) -> None:
    """Check a folder against its `checksums.json`; one without (of version 0.1.0) passes unless it is `required`.

    Raises:
        DamagedFileError: as `check_files`.
    """
    if required or (folder / CHECKSUMS_FILE).is_file():
        check_files(folder, read_sealed(folder / CHECKSUMS_FILE, way_out)["files"], way_out)


def write_json(path: Path, value: Mapping[str, Any], check: Callable[[], object] | None = None) -> None:
    """A whole file of strict JSON: NaN and infinities, which JSON does not know, become null; `check` as in `whole_folder`."""
    text = json.dumps(without_nan(value), indent=2, allow_nan=False)
    with whole_file(path) as temporary:
        temporary.write_text(text + "\n")
        if check is not None:
            check()


def without_nan(value: Any) -> Any:
    """`value` with None in the place of floats that are not finite."""
    if isinstance(value, Mapping):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and value - value != 0 else value


def write_sealed(path: Path, value: Mapping[str, Any], check: Callable[[], object] | None = None) -> None:
    """`write_json` of an object that also holds the sha256 of its other fields."""
    plain = json.loads(json.dumps(without_nan(value)))
    write_json(path, {**plain, _SEAL: _seal_of(plain)}, check)


def read_sealed(path: Path, way_out: str) -> dict[str, Any]:
    """What `write_sealed` was given.

    Args:
        path: the file.
        way_out: what the user can do, a sentence without its full stop.

    Raises:
        DamagedFileError: it is missing, no JSON, or not what was written.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DamagedFileError(f"{path} is missing. {way_out}") from None
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(f"{path} is damaged: not valid JSON ({error}). {way_out}") from None
    if not isinstance(value, dict) or value.pop(_SEAL, None) != _seal_of(value):
        raise DamagedFileError(f"{path} is damaged: its content is not what was written. {way_out}")
    return value


def _seal_of(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _temporary(path: Path, flags: int) -> tuple[Path, int]:
    """A new hidden file or folder beside `path`, and a descriptor that holds its lock."""
    while True:
        temporary = _hidden(path, _INCOMPLETE)
        if flags & os.O_DIRECTORY:
            temporary.mkdir()
        descriptor = os.open(temporary, flags, 0o666)
        with suppress(OSError):  # a file system without locks: then nobody removes leftovers there
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Between creation and lock another writer may have taken it for a leftover.
        if _is_still(temporary, descriptor):
            return temporary, descriptor
        os.close(descriptor)


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _remove_unlocked(leftover: Path) -> None:
    try:
        descriptor = os.open(leftover, os.O_RDONLY)
    except OSError:  # another user's, or gone by now
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)
    except OSError:  # somebody is writing it, or locks are unknown here
        pass
    finally:
        os.close(descriptor)


@contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    """Full disks, in whatever words a library says it, as one line that names the file."""
    try:
        yield
    except WriteError:
        raise
    except Exception as error:
        full = isinstance(error, OSError) and error.errno in _FULL
        if not full and not any(word in str(error) for word in _FULL_WORDS):
            raise
        raise WriteError(
            f"{path} cannot be written ({_first_line(error)}). Nothing half written is left: make room and give the same "
            "command again"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _glob_escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
