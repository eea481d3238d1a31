"""Token ids of item texts, kept in a prepared folder: encoded once per tokenizer, mapped by every later process.

    tokens/<fingerprint of tokenizer and texts>-<sha256 of the file>.arrow

The name holds the digest of the content and the file appears by a rename, so it is whole or absent, and several processes may write it
at once. A damaged file is not refused but made again, which takes a moment. A folder without the right to write gets no cache, and a
warning says so.
"""

from __future__ import annotations

import errno
import hashlib
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dti_model.data.arrow_file import only_chunk, read_table, write_table
from dti_model.data.errors import DataError
from dti_model.data.folder import check_whole
from dti_model.data.text_encoder import TokenIds
from dti_model.files import whole_file

_KIND = pa.large_list(pa.int32())
# The folder belongs to somebody else, is on a read-only disk, or was removed after it was opened.
_UNWRITABLE = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT}


def cached_token_ids(folder: Path, fingerprint: str, encode: Callable[[], TokenIds]) -> TokenIds:
    """Offsets (N + 1,) int64 and ids int32 of `encode`, from the cache where it is there.

    Args:
        folder: of the cache; made where it is missing.
        fingerprint: name of what is encoded, 16 hexadecimal digits.
        encode: makes the ids.

    Raises:
        DataError: the disk is full.
    """
    damaged = []
    for path in sorted(folder.glob(f"{fingerprint}-*.arrow")):
        found = _read(path)
        if found is not None:
            return found
        logging.getLogger(__name__).warning("%s is damaged: it is made again", path)
        damaged.append(path)
    offsets, ids = encode()
    for array in (offsets, ids):
        array.setflags(write=False)
    try:
        kept = _keep(folder, fingerprint, offsets, ids)
        for path in damaged:
            if path != kept:
                path.unlink(missing_ok=True)
        return _read(kept) or (offsets, ids)
    except OSError as error:
        cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
        if cause.errno not in _UNWRITABLE:
            raise DataError(
                f"{cause.filename2 or cause.filename or folder}: cannot write the token cache ({cause.strerror or cause}). Make room, or move away what is in "
                "the way, and give the same command again"
            ) from error
        logging.getLogger(__name__).warning(
            "%s may not be written: every process makes the token ids of this tokenizer anew. Make them once as somebody who may "
            "write there, or copy the prepared folder",
            folder,
        )
    return offsets, ids


def _keep(folder: Path, fingerprint: str, offsets: npt.NDArray[np.int64], ids: npt.NDArray[np.int32]) -> Path:
    tokens = pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(ids)).cast(_KIND)
    written = pa.BufferOutputStream()
    write_table(pa.table({"tokens": tokens}), written)
    content = written.getvalue()
    folder.mkdir(exist_ok=True)
    path = folder / f"{fingerprint}-{hashlib.sha256(content).hexdigest()}.arrow"
    with whole_file(path) as temporary:
        temporary.write_bytes(content)
    return path


def _read(path: Path) -> TokenIds | None:
    """The mapped ids; None: the file is damaged or was removed."""
    digest = path.stem.partition("-")[2]
    try:
        check_whole(path.parent, {path.name: {"bytes": path.stat().st_size, "sha256": digest}})
        tokens = only_chunk(read_table(path, {"tokens": _KIND}).column("tokens"))
    except (DataError, OSError):
        return None
    return tokens.offsets.to_numpy(zero_copy_only=True), tokens.values.to_numpy(zero_copy_only=True)
