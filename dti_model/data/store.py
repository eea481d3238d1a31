"""Prepared data on disk: memory-mapped Arrow files, every user's history once.

    stats.json            counts, split, provenance, size and sha256 of every file and of itself; see folder.py
    interactions.arrow    item int32, label int8, timestamp int64, rating float32, split int8, order int64;
                          user after user, each in (time, item, file) order
    users.arrow           user string, history_stop int64: the row after the user's last
    items.arrow           item string, text string
    contexts.arrow        texts of interactions' contexts, where there are any, each distinct one once; contexts_codes.arrow says
                          which of them each interaction has, part by part of the template; see coded_texts.py
    profiles.arrow        texts of users, where there are any, likewise; profiles_codes.arrow says which of them each user has
    since.arrow           since int16, in extended folders only: the extension (1, 2, ...) since which a row is a training target,
                          0 for those of the first folder, -1 for rows that are none; see extension.py
    rejected.csv          file, line and problem of every row that could not be used, where there are any
    tokenizer/            the BPE trained on the item texts
    tokens/<name>.arrow   token ids of the item texts, one file per tokenizer, made when first asked for; see token_cache.py

Ids are ordered as numbers when all of them are integers, otherwise as text; `item` is a row of items.arrow.
Two rows of one user with equal time are in item order, and in the order of the source's file where the item repeats too.
Reading copies nothing: the arrays are views of the mapped files, and stay as they are when the folder is made again or removed. A
mapped file that somebody truncates in place ends its readers with SIGBUS, which no check can prevent.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dti_model.data.arrow_file import as_numpy, read_table
from dti_model.data.coded_texts import CodedTexts
from dti_model.data.errors import DataError
from dti_model.data.folder import (
    AGAIN,
    OPTIONAL_TABLES,
    SINCE_TABLE,
    STATS_FILE,
    TABLES,
    TOKENIZER_FOLDER,
    TOKENS_FOLDER,
    check_whole,
    read_stats,
)
from dti_model.data.split import SPLIT_CODES
from dti_model.data.text_encoder import TextEncoder, TokenIds
from dti_model.data.texts import Template
from dti_model.data.token_cache import cached_token_ids
from dti_model.files import DamagedFileError, check_nothing_added, sha256_of_json

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
        stats: the content of stats.json, without its own sha256.
        item: (I,) int32, index into `item_ids` and `item_texts`.
        label: (I,) int8, 1 where the rating is above the threshold.
        timestamp: (I,) int64, in the unit that stats["timestamp_unit"] names.
        rating: (I,) float32.
        split: (I,) int8, `CONTEXT`, `TRAIN`, `VAL` or `TEST`.
        order: (I,) int64, rank in the global (time, user, item) order.
        history_offsets: (U + 1,) int64, user u owns rows `history_offsets[u]:history_offsets[u + 1]`.
        since: (I,) int16, the extension since which a row is a training target, -1 where it is none; None: of no extended folder.
    """

    def __init__(self, path: Path, stats: dict[str, Any]) -> None:
        """Map the files of a folder whose stats are already checked; users call `open`."""
        self.path = path
        self.stats = stats
        table = read_table(path / "interactions.arrow", COLUMNS)
        columns = {name: as_numpy(table.column(name)) for name in COLUMNS}
        self.item: npt.NDArray[np.int32] = columns["item"]
        self.label: npt.NDArray[np.int8] = columns["label"]
        self.timestamp: npt.NDArray[np.int64] = columns["timestamp"]
        self.rating: npt.NDArray[np.float32] = columns["rating"]
        self.split: npt.NDArray[np.int8] = columns["split"]
        self.order: npt.NDArray[np.int64] = columns["order"]
        self._users = read_table(path / "users.arrow", {"user": pa.string(), "history_stop": pa.int64()})
        self._items = read_table(path / "items.arrow", {"item": pa.string(), "text": pa.string()})
        stops = as_numpy(self._users.column("history_stop"))
        self.history_offsets: npt.NDArray[np.int64] = np.concatenate([np.zeros(1, np.int64), stops])
        self.since: npt.NDArray[np.int16] | None = None
        if SINCE_TABLE in stats["files"]:
            self.since = as_numpy(read_table(path / SINCE_TABLE, {"since": pa.int16()}).column("since"))
        found = (self._users.num_rows, self._items.num_rows, table.num_rows, int(self.history_offsets[-1]))
        wanted = (stats["users"], stats["items"], stats["interactions"], stats["interactions"])
        if found != wanted or (self.since is not None and self.since.size != table.num_rows):
            raise DataError(
                f"{path}: the files hold {found} users, items, rows, but {STATS_FILE} says {wanted}. {AGAIN}"
            )

    @classmethod
    def open(cls, path: str | Path) -> PreparedData:
        """Open a folder that `prepare` wrote.

        Raises:
            DataError: no such folder, not a prepared one, another format version, or a file is missing or damaged.
        """
        path = Path(path)
        stats = read_stats(path)
        try:
            check_whole(path, stats["files"])
            data = cls(path, stats)
            data.check_tokenizer()
        except DataError:
            if read_stats(path) == stats:
                raise
        else:
            if read_stats(path) == stats:
                return data
        return cls.open(path)  # it was made again meanwhile: the parts that were read are of two folders

    def check_tokenizer(self) -> None:
        """Check the tokenizer's files against stats.json, also that none was added.

        Cost: a file that this process has found whole and that has not changed is not read again.

        Raises:
            DataError: a file is another one, missing or not of the tokenizer.
        """
        inside = f"{TOKENIZER_FOLDER}/"
        files = {name: facts for name, facts in self.stats["files"].items() if name.startswith(inside)}
        check_whole(self.path, files)
        try:
            check_nothing_added(self.tokenizer_dir, {name.removeprefix(inside) for name in files})
        except DamagedFileError as error:
            raise DataError(str(error)) from error

    @property
    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal digits, of all tables and the tokenizer, by name; no file is read for it."""
        files = {
            name: facts["sha256"]
            for name, facts in self.stats["files"].items()
            if name in (*TABLES, *OPTIONAL_TABLES) or name.startswith(f"{TOKENIZER_FOLDER}/")
        }
        return sha256_of_json(files)

    @property
    def chain(self) -> list[str]:
        """Fingerprints of the folders that were extended, the first one first, and of this one."""
        return [*self.stats.get("extends", []), self.fingerprint]

    @property
    def text_rule(self) -> dict[str, Any]:
        """The rule of the item texts: `text`, a template, and `max_chars`; those of `texts.py` where the folder names none."""
        source = self.stats["source"]
        return {name: source[name] for name in ("text", "max_chars") if name in source}

    @cached_property
    def contexts(self) -> CodedTexts | None:
        """Texts of every interaction besides its item's; None: there are none."""
        return self._coded("contexts", self.context_rule, len(self.item))

    @cached_property
    def profiles(self) -> CodedTexts | None:
        """Texts of every user; None: there are none."""
        return self._coded("profiles", self.profile_rule, self.num_users)

    def _coded(self, name: str, rule: Mapping[str, Any] | None, num_rows: int) -> CodedTexts | None:
        if rule is None:
            return None
        template = Template(rule["text"], missing_title=None)
        return CodedTexts.read(self.path, name, len(template.part_columns), num_rows)

    @property
    def context_rule(self) -> Mapping[str, Any] | None:
        """The rule of interactions' contexts: `text`, a template, and what its columns are made of (`contexts.py`); None: there are none."""
        rule: Mapping[str, Any] | None = self.stats["source"].get("context")
        return rule

    @property
    def profile_rule(self) -> Mapping[str, Any] | None:
        """The rule of users' profiles: `text`, a template, and `max_chars`; None: there are none."""
        rule: Mapping[str, Any] | None = self.stats["source"].get("profile")
        return rule

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

    def targets(self, split_name: str, after: int | None = None) -> npt.NDArray[np.int64]:
        """Rows of the targets of "train", "val" or "test", int64, in the global (time, user, item) order.

        Args:
            split_name: the split.
            after: only training targets that came with a later extension than this one; 0: later than the first folder. None: all.

        Raises:
            DataError: there is no split of that name.
        """
        if split_name not in SPLIT_CODES:
            raise DataError(f"split must be one of {', '.join(SPLIT_CODES)}, but is {split_name!r}")
        rows = np.flatnonzero(self.split == SPLIT_CODES[split_name])
        if after is not None:
            rows = rows[:0] if self.since is None else rows[self.since[rows] > after]
        return rows[np.argsort(self.order[rows])]

    def token_ids(self, tokenizer: Any) -> TokenIds:
        """Token ids of all item texts: no special token, no label, whatever a text says (`text_encoder.py`).

        Encoded once per tokenizer and cached in `tokens/`; later calls, in any process, map the file. Without the right to write
        there, every process encodes for itself.

        Args:
            tokenizer: a fast transformers tokenizer or a `tokenizers.Tokenizer`.

        Returns:
            offsets (N + 1,) int64 and ids int32, read-only; item i is `ids[offsets[i]:offsets[i + 1]]`.

        Raises:
            DataError: the tokenizer makes no token of some text, or the cache cannot be written.
        """
        offsets, ids = self.tokens_of(tokenizer, self.item_texts)
        empty = np.flatnonzero(np.diff(offsets) == 0)
        if empty.size:
            raise DataError(f"the tokenizer makes no token of item text {self.item_texts[empty[0]]!r}")
        return offsets, ids

    def tokens_of(self, tokenizer: Any, texts: list[str]) -> TokenIds:
        """Token ids of texts of this data set, cached and encoded as `token_ids` says."""
        encoder = TextEncoder(tokenizer)
        return cached_token_ids(
            self.path / TOKENS_FOLDER, encoder.fingerprint(texts), lambda: encoder.encode_all(texts)
        )
