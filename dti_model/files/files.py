"""Files and folders that appear whole or not at all, and checksums.

    with whole_file(path) as temporary: temporary.write_text(...)        flushed to the disk, then renamed to `path`
    with whole_folder(path) as temporary: ...                            likewise; an older folder of that name goes
    with temporary_folder(path) as temporary: ...                        removed at the end, or by the next one after a kill
    write_sealed(path, {...}); read_sealed(path, "delete it")            JSON that carries its own sha256

Temporary names are `.NAME.dti-<16 hexadecimal digits>.incomplete`, beside NAME: nobody else's look so. A process holds a lock on its
own ones while it lives, so the next writer of NAME knows what a killed process left behind, and removes it. What is replaced leaves its
mode to what comes.

Cost: one fsync a file, one pass of sha256 over what is checked (about 1.5 GB/s where the processor has SHA instructions).
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import Any

from dti_model.files.locks import LockedError as LockedError
from dti_model.files.locks import is_still
from dti_model.files.locks import locked as locked
from dti_model.files.renames import exchanged, rename_file_to_nothing, rename_folder_to_nothing

CHECKSUMS_FILE = "checksums.json"
_SEAL = "sha256"
_MOST_BYTES = 1 << 26  # of a file that is read as a whole; the logs of a million steps have half
_INCOMPLETE, _REMOVED = ".incomplete", ".removed"
_TEMPORARY = re.compile(r"\..+\.dti-[0-9a-f]{16}(\.incomplete|\.removed)")
# Files that transformers, tokenizers and peft look for in a folder: a new one would change what is loaded.
_LOADED = re.compile(
    r".*\.safetensors(\.index\.json)?|(pytorch_model|adapter_model).*\.bin(\.index\.json)?|merges\.txt|(spiece|sentencepiece.*)\.model"
    r"|(config|generation_config|adapter_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|chat_template)"
    r"\.(json|jinja|txt|model)"
)
# What file browsers, notebooks and network file systems leave in any folder: nobody's work.
_PASSING = re.compile(r"\.DS_Store|\._.*|\.nfs[0-9a-f]+|\.ipynb_checkpoints|Thumbs\.db|desktop\.ini")
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


class DamagedFileError(ValueError):
    """A file is not what was written; the message names it and the way out."""


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
    remove_leftovers(path)
    with _named_errors(path):
        temporary, descriptor = _temporary(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    try:
        with _named_errors(path):
            older = _mode(path)
            if older is not None:
                _set_mode(temporary, older | stat.S_IRUSR | stat.S_IWUSR)
            yield temporary
            _flush(temporary)
            if older is not None:
                _set_mode(temporary, older)
            if replace:
                os.replace(temporary, path)
            else:
                rename_file_to_nothing(temporary, path)
            _flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
        os.close(descriptor)


@contextmanager
def whole_folder(
    path: str | Path, check: Callable[[], object] | None = None, replace: bool = True
) -> Iterator[Path]:
    """An empty temporary folder to fill; at the end it becomes `path`, in the place of an older one; at an error it is removed.

    Args:
        path: the folder to make.
        check: called when everything is on the disk, right before an older `path` goes; what it raises keeps that one.
        replace: an older `path` is replaced; False: only an empty one is, and anything else stays, also what comes in the last moment.

    Raises:
        FileExistsError: there is a `path` that is not an empty folder in the end, and `replace` is False.
        WriteError: the disk is full; an older `path` is untouched.
    """
    path = Path(os.path.realpath(path))
    with temporary_folder(path) as temporary, _named_errors(path):
        mode, older = stat.S_IMODE(temporary.stat().st_mode), _mode(path)
        if older is not None:
            _set_mode(temporary, older | stat.S_IRWXU)
        yield temporary
        for written in temporary.rglob("*"):
            _open_to_others(written, mode & 0o666)
            _flush(written)
        _flush(temporary)
        if older is not None:
            _set_mode(temporary, older)
        if check is not None:
            check()
        if replace:
            _swap(temporary, path)
        else:
            rename_folder_to_nothing(temporary, path)
            _flush(path.parent)


def _mode(path: Path) -> int | None:
    """Who may do what with a file or folder; None: there is none."""
    try:
        return stat.S_IMODE(path.stat().st_mode) & 0o777
    except FileNotFoundError:
        return None


def _set_mode(path: Path, mode: int) -> None:
    with suppress(OSError):  # a file system that knows no modes
        path.chmod(mode)


def _open_to_others(written: Path, mode: int) -> None:
    """Give a file the mode of the umask: some libraries write theirs for their user alone, whatever the umask says."""
    found = written.lstat().st_mode
    if stat.S_ISREG(found) and stat.S_IMODE(found) == 0o600:
        _set_mode(written, mode)


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
        remove_tree(temporary)  # an older folder by now, where there was one
        os.close(descriptor)


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
    _flush(path.parent)


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


def _hidden(path: Path, ending: str) -> Path:
    return path.with_name(f".{path.name}.dti-{secrets.token_hex(8)}{ending}")


def is_temporary(path: Path) -> bool:
    """Whether a name is one that only this module gives."""
    return _TEMPORARY.fullmatch(path.name) is not None


def is_passing(path: Path) -> bool:
    """Whether a file or folder is one that programs leave behind wherever somebody looks, and that goes with its folder."""
    return _PASSING.fullmatch(path.name) is not None


def remove_leftovers(path: Path) -> None:
    """Remove what killed writers of `path` left beside it; what living ones are writing, and what is not ours, stays."""
    ours = re.compile(rf"\.{re.escape(path.name)}\.dti-[0-9a-f]{{16}}({_INCOMPLETE}|{_REMOVED})")
    with suppress(OSError):
        for name in os.listdir(path.parent):
            if not ours.fullmatch(name):
                continue
            if name.endswith(_REMOVED):
                remove_tree(path.parent / name)
            else:
                _remove_unlocked(path.parent / name)


@contextmanager
def opened(path: Path) -> Iterator[BufferedReader]:
    """A regular file, to read. A named pipe, which would wait for ever for somebody to write to it, is refused, as devices are.

    Raises:
        OSError: it is no regular file, or cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(f"{path} is no regular file, as one of its name must be: move it elsewhere")
        with open(descriptor, "rb", closefd=False) as file:
            yield file
    finally:
        os.close(descriptor)


def read_file(path: Path) -> bytes:
    """The content of a file of ours that is read as a whole, such as JSON.

    Raises:
        OSError: it is no regular file, cannot be read, or is larger than any of ours.
    """
    with opened(path) as file:
        content = file.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise OSError(f"{path} has more than {_MOST_BYTES:,} bytes, which no file of its name needs")
    return content


def sha256_of(path: Path) -> str:
    """Of a file's content, in hexadecimal digits; errors as `opened`."""
    with opened(path) as file:
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


def are_checksums(value: Any) -> bool:
    """Whether a value has the types of what `checksums` gives; a seal says that nobody changed it, not who wrote it."""
    return isinstance(value, dict) and all(
        isinstance(facts, dict) and type(facts.get("bytes")) is int and isinstance(facts.get("sha256"), str)
        for facts in value.values()
    )


def read_checksums(path: Path, way_out: str) -> dict[str, dict[str, Any]]:
    """The files that a `checksums.json` is about, with their facts.

    Args:
        path: the file.
        way_out: what the user can do, a sentence without its full stop.

    Raises:
        DamagedFileError: as `read_sealed`, or it holds no checksums.
        OSError: as `read_sealed`.
    """
    files = read_sealed(path, way_out).get("files")
    if not are_checksums(files):
        raise DamagedFileError(f"{path} is damaged: it holds no checksums. {way_out}")
    return dict(files or {})


def write_checksums(folder: Path) -> None:
    """Write `checksums.json` into a folder whose other files are complete."""
    write_sealed(folder / CHECKSUMS_FILE, {"files": checksums(folder)})


def check_checksums(folder: Path, way_out: str, required: bool = False, is_model: bool = False) -> None:
    """Check a folder against its `checksums.json`; one without (of version 0.1.0) passes unless it is `required`.

    Args:
        folder: where they are.
        way_out: what the user can do, a sentence without its full stop.
        required: whether the folder must have checksums.
        is_model: whether a library loads it, which reads what it finds there (`check_nothing_added`).

    Raises:
        DamagedFileError: as `check_files` and `check_nothing_added`.
    """
    if required or (folder / CHECKSUMS_FILE).is_file():
        files = read_checksums(folder / CHECKSUMS_FILE, way_out)
        check_files(folder, files, way_out)
        if is_model:
            check_nothing_added(folder, files)


def check_nothing_added(folder: Path, known: Collection[str]) -> None:
    """Refuse a file that loaders of models and tokenizers find by its name, and that nobody has checked.

    Args:
        folder: of a model or a tokenizer.
        known: names of the files in it that are checked.

    Raises:
        DamagedFileError: naming the first one.
    """
    for path in sorted(folder.iterdir()):
        if path.name not in known and path.name != CHECKSUMS_FILE and _LOADED.fullmatch(path.name):
            raise DamagedFileError(
                f"{path} was added after the folder was written, and loading would read it. Move it elsewhere"
            )


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
    write_json(path, {**plain, _SEAL: sha256_of_json(plain)}, check)


def read_sealed(path: Path, way_out: str) -> dict[str, Any]:
    """What `write_sealed` was given.

    Args:
        path: the file.
        way_out: what the user can do, a sentence without its full stop.

    Raises:
        DamagedFileError: it is missing, no JSON, or not what was written.
        OSError: it is no regular file, or cannot be read.
    """
    try:
        value = json.loads(read_file(path))
    except FileNotFoundError:
        raise DamagedFileError(f"{path} is missing. {way_out}") from None
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(f"{path} is damaged: not valid JSON ({error}). {way_out}") from None
    if not isinstance(value, dict) or value.pop(_SEAL, None) != sha256_of_json(value):
        raise DamagedFileError(f"{path} is damaged: its content is not what was written. {way_out}")
    return value


def sha256_of_json(value: Any) -> str:
    """Of a value that JSON knows, whatever the order of its keys, in hexadecimal digits."""
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
        if is_still(temporary, descriptor):
            return temporary, descriptor
        os.close(descriptor)


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
