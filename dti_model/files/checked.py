"""Checked files: regular ones only, sizes and sha256 of a folder's, and JSON that carries its own sha256.

    write_checksums(folder); check_checksums(folder, "delete it")        `checksums.json`, about all other files
    write_sealed(path, {...}); read_sealed(path, "delete it")

`way_out` is what the user can do about a damaged file, a sentence without its full stop.

Cost: one pass of sha256 (about 1.5 GB/s where the processor has SHA instructions).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

from dti_model.files.whole import whole_file

CHECKSUMS_FILE = "checksums.json"
_SEAL = "sha256"
_MOST_BYTES = 1 << 26  # of a file that is read as a whole; the logs of a million steps have half
# Files that transformers, tokenizers and peft look for in a folder: a new one would change what is loaded.
_LOADED = re.compile(
    r".*\.safetensors(\.index\.json)?|(pytorch_model|adapter_model).*\.bin(\.index\.json)?|merges\.txt|(spiece|sentencepiece.*)\.model"
    r"|(config|generation_config|adapter_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|chat_template)"
    r"\.(json|jinja|txt|model)"
)


class DamagedFileError(ValueError):
    """A file is not what was written; the message names it and the way out."""


@contextmanager
def opened(path: Path) -> Iterator[BufferedReader]:
    """A regular file, to read. A named pipe, which would wait for ever for a writer, is refused, as devices are.

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


def sha256_of_json(value: Any) -> str:
    """Of a value that JSON knows, whatever the order of its keys, in hexadecimal digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def checksums(folder: Path) -> dict[str, dict[str, Any]]:
    """`bytes` and `sha256` of every file below a folder, by its name there with slashes; not of hidden files."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in files
    }


def are_checksums(value: Any) -> bool:
    """Whether a value has the types of a result of `checksums`; a seal says that nobody changed it, not who wrote it."""
    return isinstance(value, dict) and all(
        isinstance(facts, dict) and type(facts.get("bytes")) is int and isinstance(facts.get("sha256"), str)
        for facts in value.values()
    )


def check_files(folder: Path, wanted: Mapping[str, Mapping[str, Any]], way_out: str) -> None:
    """Compare files of a folder with a result of `checksums`.

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


def check_nothing_added(folder: Path, known: Collection[str]) -> None:
    """Refuse a file that loaders of models and tokenizers find by its name, and that is not `known`: nobody has checked it.

    Raises:
        DamagedFileError: naming the first one.
    """
    for path in sorted(folder.iterdir()):
        if path.name not in known and path.name != CHECKSUMS_FILE and _LOADED.fullmatch(path.name):
            raise DamagedFileError(
                f"{path} was added after the folder was written, and loading would read it. Move it elsewhere"
            )


def write_checksums(folder: Path) -> None:
    """Write `checksums.json` into a folder whose other files are complete."""
    write_sealed(folder / CHECKSUMS_FILE, {"files": checksums(folder)})


def read_checksums(path: Path, way_out: str) -> dict[str, dict[str, Any]]:
    """The files that a `checksums.json` is about, with their facts.

    Raises:
        DamagedFileError: as `read_sealed`, or it holds no checksums.
        OSError: as `read_sealed`.
    """
    files = read_sealed(path, way_out).get("files")
    if not are_checksums(files):
        raise DamagedFileError(f"{path} is damaged: it holds no checksums. {way_out}")
    return dict(files or {})


def check_checksums(folder: Path, way_out: str, required: bool = False, is_model: bool = False) -> None:
    """Check a folder against its `checksums.json`.

    Args:
        folder: with the files.
        way_out: see above.
        required: the folder must have checksums; False: one without (of version 0.1.0) passes.
        is_model: a library loads the folder, and reads whatever it finds there (`check_nothing_added`).

    Raises:
        DamagedFileError: as `check_files` and `check_nothing_added`.
    """
    if required or (folder / CHECKSUMS_FILE).is_file():
        files = read_checksums(folder / CHECKSUMS_FILE, way_out)
        check_files(folder, files, way_out)
        if is_model:
            check_nothing_added(folder, files)


def without_nan(value: Any) -> Any:
    """`value` with None in the place of floats that are not finite."""
    if isinstance(value, Mapping):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and value - value != 0 else value


def write_json(path: Path, value: Mapping[str, Any], check: Callable[[], object] | None = None) -> None:
    """A whole file of strict JSON: NaN and infinities, which JSON does not know, become null; `check` as in `whole_folder`."""
    text = json.dumps(without_nan(value), indent=2, allow_nan=False)
    with whole_file(path) as temporary:
        temporary.write_text(text + "\n")
        if check is not None:
            check()


def write_sealed(path: Path, value: Mapping[str, Any], check: Callable[[], object] | None = None) -> None:
    """`write_json` of an object that also holds the sha256 of its other fields."""
    plain = json.loads(json.dumps(without_nan(value)))
    write_json(path, {**plain, _SEAL: sha256_of_json(plain)}, check)


def read_sealed(path: Path, way_out: str) -> dict[str, Any]:
    """The object that `write_sealed` was given.

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
