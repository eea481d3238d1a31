"""From raw files to a prepared folder: load, check, index, order, label, split, tokenise, write.

    label  = rating > threshold
    order  = (time, user, item, rating); ids compare as numbers when all are integers, otherwise as text
    target = at least `min_context` earlier interactions of the user

Cost: ML-1M's 1,000,209 ratings take a few seconds; the sort dominates.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from dti_model.data.errors import DataError
from dti_model.data.fetch import fetch
from dti_model.data.movielens import load_1m, load_100k
from dti_model.data.source import RawData
from dti_model.data.split import CONTEXT, SPLIT_CODES, SplitKind, assign_split
from dti_model.data.store import (
    COLUMNS,
    FORMAT_VERSION,
    STATS_FILE,
    TOKENIZER_FOLDER,
    PreparedData,
    write_table,
)
from dti_model.data.tokens import save_tokenizer, train_tokenizer

LOADERS: Mapping[str, Callable[[Path], RawData]] = {"ml-100k": load_100k, "ml-1m": load_1m}
MISSING_TEXT = "Unknown title"
DEFAULT_VOCAB_SIZE = 4096


@dataclass(frozen=True)
class _Indexed:
    """A data set by index: users and items in id order, rows in (user, time, item, rating) order."""

    users: pl.Series
    items: pl.DataFrame
    offsets: npt.NDArray[np.int64]
    item: npt.NDArray[np.int32]
    timestamp: npt.NDArray[np.int64]
    rating: npt.NDArray[np.float32]
    num_pruned: int


def prepare(
    source: str,
    out: str | Path,
    raw_dir: str | Path | None = None,
    *,
    split: SplitKind = "global",
    threshold: float | None = None,
    min_context: int = 5,
    min_item_count: int | None = None,
    subset: bool = False,
    vocab_size: int = DEFAULT_VOCAB_SIZE,
) -> dict[str, Any]:
    """Read a data set and write a prepared folder, all of it or nothing.

    Args:
        source: "ml-100k" or "ml-1m".
        out: folder to write. An older prepared folder there is replaced; any other content is an error.
        raw_dir: folder with the raw files; None fetches them.
        split: "global" (by time over all users) or "user" (within each user).
        threshold: a rating above it is a click; None takes the data set's default (3 for MovieLens).
        min_context: earlier interactions that a target needs.
        min_item_count: items with fewer interactions are dropped; None takes the data set's default.
        subset: accept a part of the data set: counts are reported, not compared with the full set's.
        vocab_size: largest vocabulary of the tokenizer trained on the item texts.

    Returns:
        The content of stats.json.

    Raises:
        DataError: a file is missing, malformed or cut short, a count is wrong, or `out` holds something else.
        ValueError: an argument has an impossible value.
    """
    out = Path(out)
    _check_arguments(source, split, min_context, min_item_count)
    _check_out(out)
    with tempfile.TemporaryDirectory(prefix="dti-fetch-") as download:
        folder = fetch(source, Path(download)) if raw_dir is None else Path(raw_dir)
        raw = LOADERS[source](folder)
        if not subset:
            raw.check_facts()
    threshold = raw.threshold if threshold is None else threshold
    min_item_count = raw.min_item_count if min_item_count is None else min_item_count
    indexed = _index(raw, min_item_count)
    columns = _columns(indexed, threshold, split, min_context)
    stats = {
        "format_version": FORMAT_VERSION,
        "source": _provenance(source, raw, subset),
        **_counts(raw, indexed, columns),
        "threshold": threshold,
        "split": split,
        "min_context": min_context,
        "min_item_count": min_item_count,
        "splits": _split_stats(columns),
    }
    try:
        _publish(out, lambda folder: _write(folder, indexed, columns, stats, vocab_size))
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({error}). Name another folder with --out.") from error
    return stats


def _check_arguments(source: str, split: str, min_context: int, min_item_count: int | None) -> None:
    if source not in LOADERS:
        raise DataError(f"source must be one of {', '.join(LOADERS)}, but is {source!r}")
    if split not in get_args(SplitKind):
        raise ValueError(f"split must be one of {', '.join(get_args(SplitKind))}, but is {split!r}")
    if min_context < 0:
        raise ValueError(f"min_context must be at least 0, but is {min_context}")
    if min_item_count is not None and min_item_count < 1:
        raise ValueError(f"min_item_count must be at least 1, but is {min_item_count}")


def _check_out(out: Path) -> None:
    """Only nothing, an empty folder, or an older prepared folder may be in the way."""
    if out.is_dir() and ((out / STATS_FILE).is_file() or not any(out.iterdir())):
        return
    if out.exists():
        raise DataError(
            f"{out}: exists and is not a prepared folder. Name another one with --out, or remove it."
        )


def _publish(out: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a hidden folder next to `out`, then put it in place; a failure leaves `out` as it was."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
        built = Path(temporary) / "new"
        write(built)
        _check_out(out)
        if out.exists():
            out.rename(Path(temporary) / "old")
        built.rename(out)


def _index(raw: RawData, min_item_count: int) -> _Indexed:
    """Prune rare items, number users and items in id order, sort the rows."""
    rows = raw.interactions
    kept = rows.filter(pl.len().over("item") >= min_item_count) if min_item_count > 1 else rows
    if kept.is_empty():
        raise DataError(
            f"{raw.interactions_path}: no interaction is left (min_item_count is {min_item_count})."
        )
    users, items = _in_id_order(kept["user"]), _in_id_order(kept["item"])
    kept = kept.with_columns(
        user=kept["user"].replace_strict(users, np.arange(len(users)), return_dtype=pl.Int64),
        item=kept["item"].replace_strict(items, np.arange(len(items)), return_dtype=pl.Int32),
    ).sort("user", "timestamp", "item", "rating")
    counts = np.bincount(kept["user"].to_numpy(), minlength=len(users))
    texts = items.to_frame("item").join(raw.items, on="item", how="left", maintain_order="left")
    return _Indexed(
        users=users,
        items=texts.with_columns(pl.col("text").fill_null("")),
        offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)]),
        item=kept["item"].to_numpy(),
        timestamp=kept["timestamp"].to_numpy(),
        rating=kept["rating"].to_numpy(),
        num_pruned=rows.height - kept.height,
    )


def _in_id_order(ids: pl.Series) -> pl.Series:
    """The distinct ids, sorted as numbers when all are integers, otherwise as text."""
    distinct = ids.unique().sort()
    numbers = distinct.cast(pl.Int64, strict=False)
    if numbers.null_count():
        return distinct
    return distinct.gather(np.argsort(numbers.to_numpy(), kind="stable"))


def _columns(
    data: _Indexed, threshold: float, split: SplitKind, min_context: int
) -> dict[str, npt.NDArray[Any]]:
    order = np.empty(data.timestamp.shape, dtype=np.int64)
    # Rows are in (user, time, item, rating) order: a stable sort by time gives (time, user, item, rating).
    order[np.argsort(data.timestamp, kind="stable")] = np.arange(order.size)
    return {
        "item": data.item,
        "label": (data.rating > threshold).astype(np.int8),
        "timestamp": data.timestamp,
        "rating": data.rating,
        "split": assign_split(data.offsets, order, split, min_context),
        "order": order,
    }


def _counts(raw: RawData, data: _Indexed, columns: Mapping[str, npt.NDArray[Any]]) -> dict[str, Any]:
    lengths = np.diff(data.offsets)
    pairs = raw.interactions.select("user", "item")
    return {
        "users": len(data.users),
        "items": data.items.height,
        "interactions": int(data.offsets[-1]),
        "base_rate": float(columns["label"].mean()),
        "items_listed": raw.items.height,
        "interactions_pruned": data.num_pruned,
        "duplicate_pairs": pairs.height - pairs.n_unique(),
        "missing_titles": int((data.items["text"] == "").sum()),
        "history_length": {
            "min": int(lengths.min()),
            "median": float(np.median(lengths)),
            "mean": float(lengths.mean()),
            "max": int(lengths.max()),
        },
        "first_timestamp": int(data.timestamp.min()),
        "last_timestamp": int(data.timestamp.max()),
    }


def _split_stats(columns: Mapping[str, npt.NDArray[Any]]) -> dict[str, Any]:
    """Per split its targets and base rate (null where it has no target); "context" counts the other rows."""
    stats: dict[str, Any] = {}
    for name, code in SPLIT_CODES.items():
        labels = columns["label"][columns["split"] == code]
        stats[name] = {"targets": labels.size, "base_rate": float(labels.mean()) if labels.size else None}
    stats["context"] = {"interactions": int((columns["split"] == CONTEXT).sum())}
    return stats


def _provenance(source: str, raw: RawData, subset: bool) -> dict[str, Any]:
    return {
        "name": source,
        "route": raw.route,
        "subset": subset,
        "sha256": dict(raw.checksums),
        "digest": raw.digest(),
    }


def _write(
    folder: Path,
    data: _Indexed,
    columns: Mapping[str, npt.NDArray[Any]],
    stats: dict[str, Any],
    vocab_size: int,
) -> None:
    """Write everything into the new `folder`, stats.json last, and read it back once."""
    folder.mkdir()
    texts = [text or MISSING_TEXT for text in data.items["text"]]
    tables = {
        "interactions.arrow": {name: pa.array(columns[name], kind) for name, kind in COLUMNS.items()},
        "users.arrow": {"user": pa.array(data.users.to_list()), "history_stop": pa.array(data.offsets[1:])},
        "items.arrow": {"item": pa.array(data.items["item"].to_list()), "text": pa.array(texts)},
    }
    for name, table in tables.items():
        write_table(pa.table(table), folder / name)
    tokenizer = train_tokenizer(texts, vocab_size)
    save_tokenizer(tokenizer, folder / TOKENIZER_FOLDER)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    stats["files"] = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    stats["tokenizer"] = {"vocab_size": tokenizer.get_vocab_size()}
    _save_stats(folder, stats)
    offsets, _ = PreparedData.open(folder).token_ids(tokenizer)
    stats["tokenizer"]["mean_item_tokens"] = float(offsets[-1] / (offsets.size - 1))
    _save_stats(folder, stats)


def _save_stats(folder: Path, stats: Mapping[str, Any]) -> None:
    (folder / STATS_FILE).write_text(json.dumps(stats, indent=2) + "\n")
