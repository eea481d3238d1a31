"""From raw files to a prepared folder: load, check, index, order, label, split, tokenise, write.

    label  = rating > threshold
    order  = (time, user, item, rating); see index.py
    target = at least `min_context` earlier interactions of the user

Rows add up: rows in the file = interactions + interactions_pruned + rejected. Rejected rows are in rejected.csv.
Cost: O(rows log rows) time, for the sort.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from dti_model.data.amazon import AMAZON_CATEGORIES, amazon_category
from dti_model.data.custom import CustomFiles
from dti_model.data.errors import DataError
from dti_model.data.fetch import fetch
from dti_model.data.index import Indexed, index_rows
from dti_model.data.movielens import load_1m, load_100k
from dti_model.data.source import RawData, Source
from dti_model.data.split import CONTEXT, SPLIT_CODES, SplitKind, assign_split
from dti_model.data.store import (
    COLUMNS,
    FORMAT_VERSION,
    STATS_FILE,
    TOKENIZER_FOLDER,
    PreparedData,
    write_table,
)
from dti_model.data.texts import MISSING_TITLE
from dti_model.data.tokens import save_tokenizer, train_tokenizer

MOVIELENS: Mapping[str, Callable[[Path], RawData]] = {"ml-100k": load_100k, "ml-1m": load_1m}
SOURCES = (*MOVIELENS, *AMAZON_CATEGORIES)
DEFAULT_VOCAB_SIZE = 4096
REJECTED_FILE = "rejected.csv"


def prepare(
    source: str | Source,
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
        source: "ml-100k", "ml-1m", "amazon-cds", "amazon-kindles", or files described by an `AmazonFiles` or a
            `CustomFiles`.
        out: folder to write. An older prepared folder there is replaced; any other content is an error.
        raw_dir: folder with the raw files; None fetches them (MovieLens only).
        split: "global" (by time over all users) or "user" (within each user).
        threshold: a rating above it is a click; None takes the source's (3 for MovieLens, 4 for Amazon).
        min_context: earlier interactions that a target needs.
        min_item_count: items with fewer interactions are dropped; None takes the data set's default.
        subset: accept a part of MovieLens: counts are reported, not compared with the full set's.
        vocab_size: largest vocabulary of the tokenizer trained on the item texts.

    Returns:
        The content of stats.json.

    Raises:
        DataError: a file is missing, malformed or cut short, a count is wrong, or `out` holds something else.
        ValueError: an argument has an impossible value, or does not apply to the source.
    """
    out = Path(out)
    _check_arguments(source, raw_dir, split, threshold, min_context, min_item_count, subset)
    _check_out(out)
    raw = _load(source, raw_dir, subset)
    threshold = raw.threshold if threshold is None else threshold
    min_item_count = raw.min_item_count if min_item_count is None else min_item_count
    provenance = _provenance(source, raw, subset)
    indexed = index_rows(raw, min_item_count)
    columns = _columns(indexed, threshold, split, min_context)
    stats = {
        "format_version": FORMAT_VERSION,
        "source": provenance,
        **_counts(raw, indexed, columns),
        "threshold": threshold,
        "click": raw.click.format(threshold=threshold),
        "split": split,
        "min_context": min_context,
        "min_item_count": min_item_count,
        "splits": _split_stats(columns),
    }
    try:
        _publish(out, lambda folder: _write(folder, raw, indexed, columns, stats, vocab_size))
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({error}). Name another folder with --out.") from error
    return stats


def _check_arguments(
    source: str | Source,
    raw_dir: str | Path | None,
    split: str,
    threshold: float | None,
    min_context: int,
    min_item_count: int | None,
    subset: bool,
) -> None:
    name = source if isinstance(source, str) else source.name
    if isinstance(source, str) and source not in SOURCES:
        raise DataError(
            f"source must be one of {', '.join(SOURCES)}, an AmazonFiles or a CustomFiles, but is {source!r}"
        )
    if raw_dir is not None and not isinstance(source, str):
        raise ValueError(f"raw_dir does not apply to {name}: its files have their own paths")
    if subset and name not in MOVIELENS:
        raise ValueError(f"subset does not apply to {name}: it has no published counts")
    if threshold is not None and isinstance(source, CustomFiles):
        raise ValueError("threshold does not apply to custom files here: give it to CustomFiles")
    if split not in get_args(SplitKind):
        raise ValueError(f"split must be one of {', '.join(get_args(SplitKind))}, but is {split!r}")
    if min_context < 0:
        raise ValueError(f"min_context must be at least 0, but is {min_context}")
    if min_item_count is not None and min_item_count < 1:
        raise ValueError(f"min_item_count must be at least 1, but is {min_item_count}")


def _load(source: str | Source, raw_dir: str | Path | None, subset: bool) -> RawData:
    if not isinstance(source, str):
        return source.load()
    if source not in MOVIELENS:
        return amazon_category(source, raw_dir).load()
    with tempfile.TemporaryDirectory(prefix="dti-fetch-") as download:
        folder = fetch(source, Path(download)) if raw_dir is None else Path(raw_dir)
        raw = MOVIELENS[source](folder)
        if not subset:
            raw.check_facts()
    return raw


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


def _columns(
    data: Indexed, threshold: float, split: SplitKind, min_context: int
) -> dict[str, npt.NDArray[Any]]:
    # Rows are in (user, time, item, rating) order: a stable sort by time gives (time, user, item, rating).
    by_time = np.argsort(data.timestamp, kind="stable")
    order = np.empty(by_time.shape, dtype=np.int64)
    order[by_time] = np.arange(order.size)
    return {
        "item": data.item,
        "label": (data.rating > threshold).view(np.int8),
        "timestamp": data.timestamp,
        "rating": data.rating,
        "split": assign_split(data.offsets, by_time, split, min_context),
        "order": order,
    }


def _counts(raw: RawData, data: Indexed, columns: Mapping[str, npt.NDArray[Any]]) -> dict[str, Any]:
    lengths = np.diff(data.offsets)
    interactions, items = raw.num_rejected
    first = [row for rejected in raw.rejected or () for row in rejected.first()]
    return {
        "users": len(data.users),
        "items": data.items.height,
        "interactions": int(data.offsets[-1]),
        "base_rate": float(columns["label"].mean()),
        "rows_in_files": {"interactions": raw.num_rows, "items": raw.num_listed},
        "rejected": {"interactions": interactions, "items": items, "first": first},
        "items_listed": raw.num_listed - items - raw.repeated_items,
        "items_repeated": raw.repeated_items,
        "interactions_pruned": data.num_pruned,
        "duplicate_pairs": data.duplicate_pairs,
        "duplicate_interactions": data.duplicate_interactions,
        "missing_titles": int((~data.items["titled"]).sum()),
        "texts_cut": raw.texts_cut,
        "history_length": {
            "min": int(lengths.min()),
            "median": float(np.median(lengths)),
            "mean": float(lengths.mean()),
            "max": int(lengths.max()),
        },
        "timestamp_unit": raw.timestamp_unit,
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


def _provenance(source: str | Source, raw: RawData, subset: bool) -> dict[str, Any]:
    return {
        "name": source if isinstance(source, str) else source.name,
        "route": raw.route,
        "subset": subset,
        **raw.text_rule,
        "sha256": dict(raw.checksums),
        # Says of two formats of one published set that they agree; other sources have the checksums of their files.
        "digest": None if raw.facts is None else raw.digest(),
    }


def _write(
    folder: Path,
    raw: RawData,
    data: Indexed,
    columns: Mapping[str, npt.NDArray[Any]],
    stats: dict[str, Any],
    vocab_size: int,
) -> None:
    """Write everything into the new `folder`, stats.json last, and read it back once."""
    folder.mkdir()
    texts = [text or MISSING_TITLE for text in data.items["text"]]
    tables = {
        "interactions.arrow": {name: pa.array(columns[name], kind) for name, kind in COLUMNS.items()},
        "users.arrow": {
            "user": data.users.to_arrow().cast(pa.string()),
            "history_stop": pa.array(data.offsets[1:]),
        },
        "items.arrow": {"item": data.items["item"].to_arrow().cast(pa.string()), "text": pa.array(texts)},
    }
    for name, table in tables.items():
        write_table(pa.table(table), folder / name)
    if raw.rejected is not None and any(raw.num_rejected):
        pl.concat([rejected.frame() for rejected in raw.rejected]).write_csv(folder / REJECTED_FILE)
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
