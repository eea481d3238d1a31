"""Prepared data on disk: memory-mapped Arrow files, every user's history once.

    stats.json            counts, split, provenance, and the size in bytes of every file
    interactions.arrow    item int32, label int8, timestamp int64, rating float32, split int8, order int64;
                          user after user, each in (time, item, rating) order
    users.arrow           user string, history_stop int64: the row after the user's last
    items.arrow           item string, text string
    rejected.csv          file, line and problem of every row that could not be used, where there are any
    tokenizer/            the BPE trained on the item texts
    tokens/<name>.arrow   token ids of the item texts, one file per tokenizer, made when first asked for

Ids are ordered as numbers when all of them are integers, otherwise as text; `item` is a row of items.arrow.
Two rows of one user with equal time are in item order, and in rating order where the item repeats too.
Reading copies nothing: the arrays are views of the mapped files.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dti_model.data.errors import DataError
from dti_model.data.split import SPLIT_CODES
from dti_model.data.tokens import encode, fingerprint, plain_backend

FORMAT_VERSION = 1
STATS_FILE = "stats.json"
TOKENIZER_FOLDER = "tokenizer"
TOKENS_FOLDER = "tokens"
COLUMNS: Mapping[str, pa.DataType] = {
    "item": pa.int32(),
    "label": pa.int8(),
    "timestamp": pa.int64(),
    "rating": pa.float32(),
    "split": pa.int8(),
    "order": pa.int64(),
}


class PreparedData:
    """One prepared data set, read-only. Open it with `PreparedData.open(folder)`.

    Attributes:
        path: the folder.
        stats: the content of stats.json.
        item: (I,) int32, index into `item_ids` and `item_texts`.
        label: (I,) int8, 1 where the rating is above the threshold.
        timestamp: (I,) int64, in the unit that stats["timestamp_unit"] names.
        rating: (I,) float32.
        split: (I,) int8, `CONTEXT`, `TRAIN`, `VAL` or `TEST`.
        order: (I,) int64, rank in the global (time, user, item) order.
        history_offsets: (U + 1,) int64, user u owns rows `history_offsets[u]:history_offsets[u + 1]`.
    """

    def __init__(self, path: Path, stats: dict[str, Any]) -> None:
        """Map the files of a folder whose stats are already checked; users call `open`."""
        self.path = path
        self.stats = stats
        table = _read_table(path / "interactions.arrow", COLUMNS)
        columns = {name: _as_numpy(table.column(name)) for name in COLUMNS}
        self.item: npt.NDArray[np.int32] = columns["item"]
        self.label: npt.NDArray[np.int8] = columns["label"]
        self.timestamp: npt.NDArray[np.int64] = columns["timestamp"]
        self.rating: npt.NDArray[np.float32] = columns["rating"]
        self.split: npt.NDArray[np.int8] = columns["split"]
        self.order: npt.NDArray[np.int64] = columns["order"]
        self._users = _read_table(path / "users.arrow", {"user": pa.string(), "history_stop": pa.int64()})
        self._items = _read_table(path / "items.arrow", {"item": pa.string(), "text": pa.string()})
        stops = _as_numpy(self._users.column("history_stop"))
        self.history_offsets: npt.NDArray[np.int64] = np.concatenate([np.zeros(1, np.int64), stops])
        found = (self._users.num_rows, self._items.num_rows, table.num_rows, int(self.history_offsets[-1]))
        wanted = (stats["users"], stats["items"], stats["interactions"], stats["interactions"])
        if found != wanted:
            raise DataError(
                f"{path}: the files hold {found} users, items, rows, but {STATS_FILE} says {wanted}.{_AGAIN}"
            )

    @classmethod
    def open(cls, path: str | Path) -> PreparedData:
        """Open a folder that `prepare` wrote.

        Raises:
            DataError: no such folder, not a prepared one, another format version, or a file is cut short.
        """
        path = Path(path)
        stats_path = path / STATS_FILE
        if not path.is_dir():
            raise DataError(f"{path}: no such folder. Make it with: dti prepare ml-100k --out {path}")
        if not stats_path.is_file():
            raise DataError(
                f"{path}: not a prepared folder, it has no {STATS_FILE}. Make one with: dti prepare"
            )
        try:
            stats = json.loads(stats_path.read_text())
        except ValueError as error:
            raise DataError(f"{stats_path}: not valid JSON ({error}).{_AGAIN}") from error
        version = stats.get("format_version") if isinstance(stats, dict) else None
        if version != FORMAT_VERSION:
            raise DataError(
                f"{stats_path}: format version {version}, this program reads {FORMAT_VERSION}.{_AGAIN}"
            )
        missing = {"files", "users", "items", "interactions"} - stats.keys()
        if missing:
            raise DataError(f"{stats_path}: has no {', '.join(sorted(missing))}.{_AGAIN}")
        for name, size in stats["files"].items():
            found = (path / name).stat().st_size if (path / name).is_file() else None
            if found != size:
                state = "is missing" if found is None else f"has {found:,} bytes instead of {size:,}"
                raise DataError(f"{path / name}: the file {state}.{_AGAIN}")
        return cls(path, stats)

    @property
    def fingerprint(self) -> str:
        """sha256, in hexadecimal digits, over the names and contents of the tables and the tokenizer's files."""
        names = ["interactions.arrow", "users.arrow", "items.arrow"]
        names += sorted(f"{TOKENIZER_FOLDER}/{path.name}" for path in self.tokenizer_dir.iterdir())
        found = {name: hashlib.sha256((self.path / name).read_bytes()).hexdigest() for name in names}
        return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()

    @property
    def tokenizer_dir(self) -> Path:
        """Folder of the tokenizer trained on the item texts."""
        return self.path / TOKENIZER_FOLDER

    @cached_property
    def item_ids(self) -> list[str]:
        """Source ids, by item index."""
        return [str(value) for value in self._items.column("item").to_pylist()]

    @cached_property
    def item_texts(self) -> list[str]:
        """Texts, by item index; never empty."""
        return [str(value) for value in self._items.column("text").to_pylist()]

    @cached_property
    def user_ids(self) -> list[str]:
        """Source ids, by user index."""
        return [str(value) for value in self._users.column("user").to_pylist()]

    @property
    def num_users(self) -> int:
        """U, users."""
        return int(self._users.num_rows)

    @property
    def num_items(self) -> int:
        """N, items."""
        return int(self._items.num_rows)

    def users_of(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """User index of interaction rows, int64 of the same shape."""
        return np.searchsorted(self.history_offsets, rows, side="right") - 1

    def targets(self, split_name: str) -> npt.NDArray[np.int64]:
        """Rows of the targets of "train", "val" or "test", int64, in the global (time, user, item) order.

        Raises:
            DataError: there is no split of that name.
        """
        if split_name not in SPLIT_CODES:
            raise DataError(f"split must be one of {', '.join(SPLIT_CODES)}, but is {split_name!r}")
        rows = np.flatnonzero(self.split == SPLIT_CODES[split_name])
        return rows[np.argsort(self.order[rows])]

    def token_ids(self, tokenizer: Any) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
        """Token ids of all item texts, without special tokens.

        Encoded once per tokenizer and kept in `tokens/`; later calls, in any process, map the file.

        Args:
            tokenizer: a fast transformers tokenizer or a `tokenizers.Tokenizer`.

        Returns:
            offsets (N + 1,) int64 and ids int32; item i is `ids[offsets[i]:offsets[i + 1]]`.

        Raises:
            DataError: the tokenizer makes no token of some text, or the cache cannot be written.
        """
        backend = plain_backend(tokenizer)
        path = self.path / TOKENS_FOLDER / f"{fingerprint(backend, self.item_texts)}.arrow"
        kind = pa.large_list(pa.int32())
        if not path.exists():
            offsets, ids = encode(backend, self.item_texts)
            empty = np.flatnonzero(np.diff(offsets) == 0)
            if empty.size:
                raise DataError(f"the tokenizer makes no token of item text {self.item_texts[empty[0]]!r}")
            tokens = pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(ids)).cast(kind)
            try:
                path.parent.mkdir(exist_ok=True)
                write_table(pa.table({"tokens": tokens}), path)
            except OSError as error:
                raise DataError(f"{path}: cannot write the token cache ({error.strerror}).") from error
        tokens = _only_chunk(_read_table(path, {"tokens": kind}).column("tokens"))
        return tokens.offsets.to_numpy(zero_copy_only=True), tokens.values.to_numpy(zero_copy_only=True)


def write_table(table: pa.Table, path: Path) -> None:
    """Write an Arrow file as one record batch; it appears under its name only when complete."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        with pa.ipc.new_file(temporary, table.schema) as writer:
            writer.write_table(table.combine_chunks())
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would shut out the others who share the folder
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


_AGAIN = " Make the folder again with: dti prepare"


def _read_table(path: Path, columns: Mapping[str, pa.DataType]) -> pa.Table:
    try:
        with pa.memory_map(str(path)) as source:
            table = pa.ipc.open_file(source).read_all()
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: not a complete Arrow file ({error}).{_AGAIN}") from error
    if table.schema != pa.schema(list(columns.items())):
        raise DataError(f"{path}: the columns are {table.schema}, expected {dict(columns)}.{_AGAIN}")
    return table


def _only_chunk(column: pa.ChunkedArray) -> Any:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _as_numpy(column: pa.ChunkedArray) -> npt.NDArray[Any]:
    array: npt.NDArray[Any] = _only_chunk(column).to_numpy(zero_copy_only=True)
    return array
