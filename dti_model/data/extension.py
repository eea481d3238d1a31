"""New days: a prepared folder and the log that came after it, as another prepared folder.

    rows     those of the older folder, and those of the new files that are not there yet
    split    targets of the older folder are training targets now, whatever they were; the new ones are split 8 : 1 : 1 by time, or by dates
    since    per row, the number of the extension since which it is a training target: what a run that knows an older folder of the
             chain has not trained on

An export that overlaps with the one before repeats rows: each row of the older folder accounts for one equal row (user, item, time and
rating) of the new files, which is left out. New rows may be earlier than the older folder's last one. Items, users and interactions keep
the texts that they had, the tokenizer is copied byte for byte, and users and items are numbered in id order as ever, so numbers differ from the older folder's.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
from tokenizers import Tokenizer

from dti_model.data.build import columns_of, counts_of, locked_place, split_stats, write_prepared
from dti_model.data.coded_texts import CodedTexts
from dti_model.data.errors import DataError
from dti_model.data.folder import (
    FORMAT_VERSION,
    SINCE_TABLE,
    TOKENIZER_FOLDER,
    check_replaceable,
)
from dti_model.data.index import Indexed, count_duplicates, sort_rows
from dti_model.data.row_texts import context_template, contexts_of, facts_of
from dti_model.data.rules import FolderRules
from dti_model.data.sources import CustomFiles, IdTable, RawData
from dti_model.data.split import CONTEXT, TEST, TRAIN, VAL, cut_by_time
from dti_model.data.split_rule import SplitRule
from dti_model.data.store import PreparedData
from dti_model.data.texts import MISSING_TITLE
from dti_model.data.times import Clock, Moment

NO_TARGET = -1  # of `since`
_Columns = dict[str, npt.NDArray[Any]]
_KEY = ["user", "item", "timestamp", "rating"]


def extend(
    older: str | Path,
    files: CustomFiles,
    out: str | Path,
    *,
    val_from: Moment | None = None,
    test_from: Moment | None = None,
) -> dict[str, Any]:
    """Write a prepared folder of an older one's rows and those of new files, all of it or nothing.

    Args:
        older: a prepared folder, of any source; it stays as it is.
        files: of the same rules of clicks and texts; `files_like` fills them in.
        out: folder to write. An older prepared folder there is replaced; any other content, also in it, is an error.
        val_from, test_from: where validation and test begin among the new targets, as in `prepare`; None: 8 : 1 : 1 by time.

    Returns:
        The content of stats.json, without its own sha256. Counts of rows in files, rejected rows and cut texts are of the new files.

    Raises:
        DataError: a folder or file cannot be read, the new files follow other rules than the older folder, nothing in them is new, or
            `out` is the older folder or holds something else.
        LockedError: another process prepares `out`.
        WriteError: the disk is full.
    """
    out = Path(out)
    data = PreparedData.open(older)
    if out.exists() and out.samefile(data.path):
        raise DataError(f"{out} is the folder to extend, which stays as it is: name another one with --out")
    rules = FolderRules.of(data)
    rules.check(files)
    rule = SplitRule(None, val_from, test_from)
    rule.check(files)
    if files.split_column is not None:
        raise DataError(
            "split_column is given, but new targets are split by time, or by val_from and test_from"
        )
    check_replaceable(out)
    with locked_place(out):
        raw = files.load(rules.context_columns)
        rules.check_columns(raw)
        raw.interactions = raw.interactions.with_columns(rules.times(raw))
        raw.timestamp_unit = rules.unit
        return _extended(data, raw, rule, out)


def _extended(data: PreparedData, raw: RawData, rule: SplitRule, out: Path) -> dict[str, Any]:
    merged = _merged(data, raw)
    indexed, number = merged.indexed, len(data.chain)
    by_time = np.argsort(indexed.timestamp, kind="stable")
    split, since = _split(data, merged, by_time, number)
    split_facts: dict[str, Any] = {"split": "global"}
    if rule.val_from is not None:
        of_dates, split_facts = rule.assigned(raw, indexed, by_time, data.stats["min_context"])
        is_new = merged.place < 0
        split[is_new] = of_dates[is_new]
        since[is_new] = np.where(split[is_new] == TRAIN, number, NO_TARGET)
        _check_dates(raw, indexed.timestamp[is_new], split[is_new])
    label = (indexed.rating > data.stats["threshold"]).view(np.int8)
    columns = columns_of(indexed, label, by_time, split)
    row_texts = _row_texts(data, raw, merged, columns)
    counts = counts_of(raw, indexed, columns)
    counts["missing_titles"] += data.stats.get("missing_titles", 0)
    stats = {
        "format_version": FORMAT_VERSION,
        "source": {**data.stats["source"], "route": raw.route, "sha256": raw.checksums, "digest": None},
        **counts,
        **{name: data.stats[name] for name in ("threshold", "click")},
        **split_facts,
        **{name: data.stats[name] for name in ("min_context", "min_item_count")},
        "splits": split_stats(columns),
        "extends": data.chain,
        "extension": {
            **merged.facts,
            "targets": int((split[merged.place < 0] != CONTEXT).sum()),
            "train_targets": int((since == number).sum()),
        },
    }

    def add_tokenizer(folder: Path, _: list[str]) -> Tokenizer:
        (folder / TOKENIZER_FOLDER).mkdir()
        for name in data.stats["files"]:
            if name.startswith(f"{TOKENIZER_FOLDER}/"):
                shutil.copyfile(data.path / name, folder / name)
        return Tokenizer.from_file(str(folder / TOKENIZER_FOLDER / "tokenizer.json"))

    more = {SINCE_TABLE: pa.table({"since": since})}
    write_prepared(out, raw, indexed, columns, row_texts, stats, add_tokenizer, more)
    return stats


def _check_dates(raw: RawData, timestamp: npt.NDArray[np.int64], split: npt.NDArray[np.int8]) -> None:
    """Raise a DataError where dates leave validation or test without a new target."""
    for name, code in (("val", VAL), ("test", TEST)):
        if not (split == code).any():
            clock = Clock(
                raw.timestamp_unit, int(timestamp.min()), int(timestamp.max()), str(raw.interactions_path)
            )
            raise DataError(
                f"{raw.interactions_path}: val_from and test_from leave {name} without a new target; the new rows are of "
                f"{clock.shown(clock.first)} to {clock.shown(clock.last)}"
            )


@dataclass(frozen=True)
class _Merged:
    """Rows of both: `place` is the (I,) row of the older folder, -1 for new rows; `facts` are counts for stats.json."""

    indexed: Indexed
    place: npt.NDArray[np.int64]
    facts: dict[str, int]


def _merged(data: PreparedData, raw: RawData) -> _Merged:
    new, users, items = _numbered(data, raw)
    kept = ~_repeats(data, new)
    num_repeats = int((~kept).sum())
    counts = np.bincount(new["item"][kept], minlength=len(items))
    counts[: data.num_items] += np.bincount(data.item, minlength=data.num_items)
    kept &= counts[new["item"]] >= data.stats["min_item_count"]
    num_pruned = int((~kept).sum()) - num_repeats
    new = {name: values[kept] for name, values in new.items()}
    if not new["user"].size:
        raise DataError(
            f"{raw.interactions_path}: no row is new: {num_repeats:,} are in {data.path}, {num_pruned:,} are of items with fewer than "
            f"{data.stats['min_item_count']} interactions, and {raw.num_rejected[0]:,} cannot be used"
        )
    older = _rows(data, np.arange(data.item.size))
    columns: _Columns = {name: np.concatenate([older[name], new[name]]) for name in _KEY}
    for name in raw.extra:  # of older rows the texts are kept, not the values
        columns[f"={name}"] = np.concatenate([np.zeros(data.item.size, np.int32), new[f"={name}"]])
    columns["place"] = np.concatenate([np.arange(data.item.size), np.full(new["user"].size, -1)])
    duplicates = count_duplicates(columns["user"], columns["item"])
    all_users, all_items, offsets = sort_rows(columns, users, items)
    texts, num_other = _texts(data, raw, all_items)
    place = columns.pop("place")
    facts = {
        "number": len(data.chain),
        "interactions": int(new["user"].size),
        "repeated": num_repeats,
        "late": int((new["timestamp"] < data.timestamp.max()).sum()),
        "users": len(all_users) - data.num_users,
        "items": len(all_items) - data.num_items,
        "other_texts": num_other,
    }
    indexed = Indexed(
        users=all_users,
        items=texts,
        offsets=offsets,
        item=columns["item"],
        timestamp=columns["timestamp"],
        rating=columns["rating"],
        num_pruned=num_pruned,
        duplicate_pairs=duplicates[0],
        duplicate_interactions=duplicates[1],
        extra={name: (columns[f"={name}"], values) for name, values in raw.extra.items()},
    )
    return _Merged(indexed, place, facts)


def _numbered(data: PreparedData, raw: RawData) -> tuple[_Columns, pl.Series, pl.Series]:
    """The new rows, with the older folder's numbers for its users and items and the next ones for others, and the ids by number."""
    columns, found = raw.take_rows(), []
    for name, older, ids in (("user", data.user_ids, raw.users), ("item", data.item_ids, raw.rated)):
        table = IdTable()
        table.encode(older)
        columns[name] = table.encode(ids.to_list())[columns[name]]
        found.append(table.names())
    users, items = found
    return columns, users, items


def _rows(data: PreparedData, rows: npt.NDArray[np.int64]) -> _Columns:
    """Rows of the older folder, as those that are read from files."""
    user = data.users_of(rows).astype(np.int32)
    return {
        "user": user,
        "item": data.item[rows],
        "timestamp": data.timestamp[rows],
        "rating": data.rating[rows],
    }


def _repeats(data: PreparedData, new: _Columns) -> npt.NDArray[np.bool_]:
    """Which new rows repeat one of the older folder: of equal rows as many as there are there."""
    repeats = np.zeros(new["user"].size, bool)
    if not repeats.size:
        return repeats
    times = data.timestamp
    near = np.flatnonzero((times >= new["timestamp"].min()) & (times <= new["timestamp"].max()))
    ours, older = (
        pl.DataFrame({**rows, "rating": rows["rating"].view(np.int32)}).with_columns(
            pl.int_range(pl.len()).over(_KEY).alias("nth")
        )
        for rows in (new, _rows(data, near))
    )
    found = ours.with_row_index("row").join(older, on=[*_KEY, "nth"], how="semi")["row"]
    repeats[found.to_numpy()] = True
    return repeats


def _texts(data: PreparedData, raw: RawData, items: pl.Series) -> tuple[pl.DataFrame, int]:
    """Items, texts and whether they have a title, and the number of older items that have another text in the new files.

    Raises:
        DataError: the new files list none of their items.
    """
    older = pl.DataFrame({"item": data.item_ids, "older": data.item_texts})
    known = raw.items.join(older, on="item")
    num_other = int((known["older"] != known["text"].replace("", MISSING_TITLE)).sum())
    if raw.items.is_empty() and items.len() > data.num_items:
        raise DataError(
            f"{raw.items_path}: lists none of the {len(raw.rated):,} items of {raw.interactions_path}, such as {raw.rated[0]!r}. "
            "Do the two files belong together, and are the item columns the right ones?"
        )
    texts = (
        items.to_frame("item")
        .join(older, on="item", how="left", maintain_order="left")
        .join(raw.items, on="item", how="left", maintain_order="left")
        .select(
            "item",
            text=pl.coalesce("older", "text", pl.lit("")),
            titled=pl.col("older").is_not_null() | pl.col("titled").fill_null(False),
        )
    )
    return texts, num_other


def _split(
    data: PreparedData, merged: _Merged, by_time: npt.NDArray[np.int64], number: int
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.int16]]:
    """Split of every row, and `since`.

    A context row of the older folder becomes a training target where late rows have given it enough earlier interactions.
    """
    offsets, place, least = merged.indexed.offsets, merged.place, data.stats["min_context"]
    num_earlier = np.arange(place.size) - np.repeat(offsets[:-1], np.diff(offsets))
    split = np.full(place.size, CONTEXT, np.int8)
    since = np.full(place.size, NO_TARGET, np.int16)
    older = np.flatnonzero(place >= 0)
    rows = place[older]
    had = rows - data.history_offsets[data.users_of(rows)]
    was_target = data.split[rows] != CONTEXT
    became_one = ~was_target & (had < least) & (num_earlier[older] >= least)
    split[older[was_target | became_one]] = TRAIN
    since[split == TRAIN] = number
    trained = data.split[rows] == TRAIN
    since[older[trained]] = 0 if data.since is None else data.since[rows[trained]]
    is_new_target = (place < 0) & (num_earlier >= least)
    cut_by_time(split, by_time[is_new_target[by_time]])
    since[is_new_target & (split == TRAIN)] = number
    return split, since


def _row_texts(data: PreparedData, raw: RawData, merged: _Merged, columns: _Columns) -> dict[str, CodedTexts]:
    """Contexts of interactions and profiles of users, where the older folder has them; older rows and users keep theirs."""
    indexed, found = merged.indexed, dict[str, CodedTexts]()
    if data.context_rule is not None and data.contexts is not None:
        facts = facts_of(raw, indexed, columns, data.context_rule["timezone"])
        made, _ = contexts_of(context_template(data.context_rule["text"]), facts, indexed.extra)
        found["context"] = _with_older(made, data.contexts, merged.place)
    if data.profiles is not None:
        known = {user: index for index, user in enumerate(data.user_ids)}
        place = np.array([known.get(user, -1) for user in indexed.users])
        none = np.zeros(len(place), np.int32)
        made = CodedTexts(tuple(none for _ in data.profiles.codes), [""])
        if raw.profiles is not None:
            made, _ = raw.profiles.coded(indexed.users, raw.interactions_path)
        found["profile"] = _with_older(made, data.profiles, place)
    return found


def _with_older(made: CodedTexts, older: CodedTexts, place: npt.NDArray[np.int64]) -> CodedTexts:
    """Texts of rows of which some, with `place` >= 0, have one in the older folder."""
    texts = {text: code for code, text in enumerate(made.texts)}
    renumbered = np.array([texts.setdefault(text, len(texts)) for text in older.texts], np.int32)
    at = np.maximum(place, 0)
    pairs = zip(made.codes, older.codes, strict=True)
    return CodedTexts(
        tuple(np.where(place >= 0, renumbered[old[at]], new).astype(np.int32) for new, old in pairs),
        list(texts),
    )


def files_like(older: str | Path, **fields: Any) -> CustomFiles:
    """New files for a prepared folder: `CustomFiles` of these fields, where texts and clicks follow the folder's rules unless said.

    Raises:
        DataError: no prepared folder.
        ValueError: as `CustomFiles`.
    """
    return FolderRules.of(PreparedData.open(older)).files(**fields)
