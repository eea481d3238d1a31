"""What every loader returns: two frames and the facts to check them against.

A new data set is one loader that returns a `RawData`; labels, order, split, storage and tokens are shared.

    interactions: user (String), item (String), timestamp (Int64, seconds), rating (Float32)
    items:        item (String), text (String, "" where the source has no title)

Every interaction of the source is a row, repeated (user, item) pairs included; no frame needs an order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import polars as pl

from dti_model.data.errors import DataError

INTERACTION_SCHEMA = {"user": pl.String, "item": pl.String, "timestamp": pl.Int64, "rating": pl.Float32}
ITEM_SCHEMA = {"item": pl.String, "text": pl.String}


@dataclass(frozen=True)
class Facts:
    """Published facts of a full data set. `digest` is the content digest of `RawData`, where it is known."""

    interactions: int
    users: int
    items_rated: int
    items_listed: int
    digest: str | None = None


@dataclass(frozen=True)
class RawData:
    """One data set as read: frames (see the module docstring), defaults of its protocol, provenance."""

    interactions: pl.DataFrame
    items: pl.DataFrame
    threshold: float
    min_item_count: int
    route: str
    interactions_path: Path
    items_path: Path
    facts: Facts | None = None
    checksums: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert dict(self.interactions.schema) == INTERACTION_SCHEMA, self.interactions.schema
        assert dict(self.items.schema) == ITEM_SCHEMA, self.items.schema

    def digest(self) -> str:
        """SHA-256 of the content, whatever the file format and the order of its lines."""
        rows = self.interactions.sort("user", "item", "timestamp", "rating")
        items = self.items.sort("item")
        digest = hashlib.sha256()
        for strings in (rows["user"], rows["item"], items["item"], items["text"]):
            digest.update("\n".join(strings.to_list()).encode() + b"\0")
        digest.update(np.ascontiguousarray(rows["timestamp"].to_numpy(), dtype="<i8").tobytes())
        digest.update(np.ascontiguousarray(rows["rating"].to_numpy(), dtype="<f4").tobytes())
        return digest.hexdigest()

    def check_facts(self) -> None:
        """Compare with the published facts.

        Raises:
            DataError: a count differs, or all counts agree and the content differs.
        """
        if self.facts is None:
            return
        counts = (
            (self.interactions_path, "interactions", self.interactions.height, self.facts.interactions),
            (self.interactions_path, "users", self.interactions["user"].n_unique(), self.facts.users),
            (self.interactions_path, "items", self.interactions["item"].n_unique(), self.facts.items_rated),
            (self.items_path, "listed items", self.items.height, self.facts.items_listed),
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


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
