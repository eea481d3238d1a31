"""Sources: files that `prepare` reads, and what reading them gives.

A new data set is one file with a `Source` and one row of `names.py`; labels, order, split, storage and tokens are shared.

    interactions: user, item (Int32, numbers of `users` and `rated`), timestamp (Int64), rating (Float32); and a column "=name" (Int32,
                  numbers of `extra[name]`) of every extra column of the log that something asked for
    items:        item (String), text (String, "" where nothing is known), titled (Boolean)

Every row of the source that is not in `rejected` is a row here, repeated (user, item) pairs included; a source may drop rows that are
equal in all columns, and counts them. Interactions are in the
order of their file, which decides between rows of one user, time and item; items need no order. Ids are numbers, since one text
a row would not fit into memory for the largest sources.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import polars as pl

from dti_model.data.errors import DataError
from dti_model.data.sources.item_frames import ItemTexts
from dti_model.data.sources.rows import Interactions, Rejected
from dti_model.data.sources.user_frames import UserTexts
from dti_model.files import sha256_of

STARS = (1, 5)  # ratings of MovieLens and Amazon


@dataclass(frozen=True)
class Facts:
    """Published facts of a full data set. `digest` is the content digest of `RawData`, where it is known."""

    interactions: int
    users: int
    items_rated: int
    items_listed: int
    digest: str | None = None


class Source(Protocol):
    """Files that `prepare` can read."""

    @property
    def name(self) -> str:
        """The name of the source in stats.json."""

    @property
    def ratings(self) -> tuple[float, float] | None:
        """The lowest and the highest, between which `prepare`'s threshold lies; None: the source has a threshold of its own."""

    def load(self, columns: Sequence[str] = ()) -> RawData:
        """Read the files, and of these further columns of the interactions those that there are."""


@dataclass
class RawData:
    """One data set as read: frames (see the module docstring), defaults of its protocol, provenance.

    Attributes:
        collected: rows of the interaction file.
        texts: items of the item file.
        rejected: rows of both files that could not be used.
        num_rows: rows of the interaction file, rejected ones included.
        num_listed: rows of the item file, rejected ones included.
        threshold: a rating above it is a click, by default.
        min_item_count: items with fewer interactions are dropped, by default.
        route: where the files came from.
        click: the definition of a click, in words, with `{threshold}` where the threshold belongs.
        timestamp_unit: the unit of the timestamps, as `Clock` in times.py takes it.
        split_column: the extra column, of words of `SPLIT_WORDS` in split.py, that divides the targets; None: there is none.
        text_rule: `text` (template) and `max_chars` of the item texts; without them, the defaults of `texts.py`.
        facts: published facts to compare with.
        subset: a part of the published set is enough.
        profiles: texts of users; None: there are none.
        users: the user ids by number.
        rated: the item ids by number.
        extra: of each extra column its values by number.
        duplicates_dropped: rows of the interaction file that the source dropped, since an equal one is kept.
        repeated_items: rows of the item file that repeat an item with interactions.
        texts_cut: values of item texts that were cut because of their length.
        checksums: SHA-256 by file name.
    """

    collected: InitVar[Interactions]
    texts: InitVar[ItemTexts]
    rejected: tuple[Rejected, Rejected]
    num_rows: int
    num_listed: int
    threshold: float
    min_item_count: int
    route: str = "files"
    click: str = "rating > {threshold:g}"
    timestamp_unit: str = "seconds"
    split_column: str | None = None
    text_rule: Mapping[str, Any] = field(default_factory=dict)
    facts: Facts | None = None
    subset: bool = False
    profiles: UserTexts | None = None
    interactions: pl.DataFrame = field(init=False)
    users: pl.Series = field(init=False)
    rated: pl.Series = field(init=False)
    extra: Mapping[str, pl.Series] = field(init=False)
    duplicates_dropped: int = field(init=False)
    items: pl.DataFrame = field(init=False)
    repeated_items: int = field(init=False)
    texts_cut: int = field(init=False)
    checksums: Mapping[str, str] = field(init=False)

    def __post_init__(self, collected: Interactions, texts: ItemTexts) -> None:
        self.interactions, self.items = collected.frame(), texts.frame()
        self.duplicates_dropped = collected.num_dropped
        self.users, self.rated = collected.users.names(), collected.items.names()
        self.extra = {name: values.names() for name, values in collected.extra.items()}
        self.repeated_items, self.texts_cut = texts.num_repeated, texts.num_cut
        paths = [self.interactions_path, self.items_path]
        paths += [] if self.profiles is None else [self.profiles.path]
        self.checksums = {path.name: sha256_of(path) for path in paths}
        lost = self.num_rows - self.num_rejected[0] - self.duplicates_dropped - self.interactions.height
        assert lost == 0, f"{lost} rows of {self.interactions_path} are neither kept, rejected nor dropped"

    @property
    def interactions_path(self) -> Path:
        """The interaction file."""
        return self.rejected[0].path

    @property
    def items_path(self) -> Path:
        """The item file."""
        return self.rejected[1].path

    @property
    def num_rejected(self) -> tuple[int, int]:
        """Rejected rows of both files."""
        return len(self.rejected[0]), len(self.rejected[1])

    def rows(self) -> pl.DataFrame:
        """The interactions with the ids of the source."""
        return self.interactions.with_columns(
            user=self.users.gather(self.interactions["user"]),
            item=self.rated.gather(self.interactions["item"]),
        )

    def take_rows(self) -> dict[str, npt.NDArray[Any]]:
        """The columns of the interactions, which are given up: a large source does not fit into memory twice."""
        frame, self.interactions = self.interactions, self.interactions.clear()
        columns = {}
        for name in frame.columns:
            columns[name] = frame[name].to_numpy()
            frame = frame.drop(name)
        return columns

    def digest(self) -> str:
        """SHA-256 of the content, whatever the file format and the order of its lines; for small sets."""
        rows = self.rows().sort("user", "item", "timestamp", "rating")
        items = self.items.sort("item")
        digest = hashlib.sha256()
        for strings in (rows["user"], rows["item"], items["item"], items["text"]):
            digest.update("\n".join(strings.to_list()).encode() + b"\0")
        digest.update(np.ascontiguousarray(rows["timestamp"].to_numpy(), dtype="<i8").tobytes())
        digest.update(np.ascontiguousarray(rows["rating"].to_numpy(), dtype="<f4").tobytes())
        return digest.hexdigest()

    def check_classes(self, label: npt.NDArray[np.int8], threshold: float) -> None:
        """Raise a DataError where all labels are equal: nothing can be learnt from them."""
        if label.any() and not label.all():
            return
        click = self.click.replace("{threshold:g}", f"{threshold:g}")
        ways = [] if click == self.click else ["choose another threshold (--threshold)"]
        if label.any():
            ways.append("add what was shown and not clicked (impressions) as rows that are no clicks")
            ways.append(
                "where that was not logged, add items drawn at random that the user did not click then as rows that are no clicks"
            )
        else:
            ways.append("check that this is the column of clicks")
        raise DataError(
            f"{self.interactions_path}: of {label.size:,} interactions {'each one' if label.any() else 'none'} is a click ({click}), and a "
            f"click model learns from both. Ways out: {'; '.join(ways)}"
        )

    def check_facts(self) -> None:
        """Compare with the published facts.

        Raises:
            DataError: a count differs, or all counts agree and the content differs.
        """
        if self.facts is None:
            return
        counts = (
            (self.interactions_path, "interactions", self.interactions.height, self.facts.interactions),
            (self.interactions_path, "users", len(self.users), self.facts.users),
            (self.interactions_path, "items", len(self.rated), self.facts.items_rated),
            (self.items_path, "listed items", self.num_listed, self.facts.items_listed),
        )
        way_out = "Fetch it again, or accept a part of the set with subset=True (--subset)."
        for path, what, found, wanted in counts:
            if found != wanted:
                last_line = path.read_bytes().count(b"\n")
                raise DataError(
                    f"{path}:{last_line}: {found:,} {what} up to the last line, the full set has {wanted:,}. "
                    f"{way_out}"
                )
        if self.facts.digest is not None and self.digest() != self.facts.digest:
            raise DataError(
                f"{self.interactions_path}, {self.items_path}: all counts agree, but the content is not the "
                f"published one (digest {self.digest()[:12]}, expected {self.facts.digest[:12]}). {way_out}"
            )
