"""From raw files to a prepared folder: load, check, index, order, label, split, tokenise, write.

    label  = rating > threshold
    order  = (time, user, item, file); see index.py
    target = at least `min_context` earlier interactions of the user; split_rule.py divides the targets

Rows add up: rows in the file = interactions + interactions_pruned + duplicates_dropped + rejected. Rejected rows are in rejected.csv.
Cost: O(rows log rows) time, for the sort.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
from tokenizers import Tokenizer

from dti_model.data.arrow_file import write_table
from dti_model.data.coded_texts import CodedTexts
from dti_model.data.contexts import check_timezone
from dti_model.data.errors import DataError
from dti_model.data.folder import (
    FORMAT_VERSION,
    STATS_FILE,
    TOKENIZER_FOLDER,
    check_replaceable,
    write_stats,
)
from dti_model.data.index import Indexed, index_rows
from dti_model.data.row_texts import context_template, contexts_of, facts_of
from dti_model.data.sources import RawData, Source, source_in_folder
from dti_model.data.split import (
    CONTEXT,
    SPLIT_CODES,
    TRAIN,
    SplitKind,
    num_sharing_time,
    num_train_after_test,
)
from dti_model.data.split_rule import SplitRule
from dti_model.data.store import COLUMNS, PreparedData
from dti_model.data.texts import MISSING_TITLE
from dti_model.data.times import Moment
from dti_model.data.tokens import check_vocab_size, save_tokenizer, title_of, train_tokenizer
from dti_model.files import WriteError, locked_beside, whole_folder, write_sealed

DEFAULT_VOCAB_SIZE = 4096
REJECTED_FILE = "rejected.csv"
MAX_LEARNT = 100_000  # distinct texts of contexts, and of profiles, that the tokenizer is trained on
MAX_REPEATED = 1_000_000  # times that texts of one part are learnt, together
MAX_COUNT = 2**31 - 1  # nobody has more interactions; beyond 64 bits NumPy cannot compare


def prepare(
    source: str | Source,
    out: str | Path,
    raw_dir: str | Path | None = None,
    *,
    split: SplitKind | None = None,
    val_from: Moment | None = None,
    test_from: Moment | None = None,
    threshold: float | None = None,
    min_context: int = 5,
    min_item_count: int | None = None,
    subset: bool = False,
    vocab_size: int = DEFAULT_VOCAB_SIZE,
    title_tokens: int = 0,
    context_text: str | None = None,
    timezone: str = "UTC",
) -> dict[str, Any]:
    """Read a data set and write a prepared folder, all of it or nothing.

    Args:
        source: "ml-100k", "ml-1m", "amazon-cds", "amazon-kindles", or a `Source`: an `AmazonFiles`, a `CustomFiles`.
        out: folder to write. An older prepared folder there is replaced; any other content, also in it, is an error.
        raw_dir: folder with the raw files, of a source given by its name; None fetches them (MovieLens only).
        split: "global" (by time over all users, the default) or "user" (within each user).
        val_from, test_from: instead of `split`: dates, date-times (ISO 8601 or objects; UTC unless they name an offset) or time stamps.
            Targets before `val_from` are train, before `test_from` validation, and the others test.
        threshold: a rating above it is a click; None takes the source's (3 for MovieLens, 4 for Amazon, `CustomFiles`' own).
        min_context: earlier interactions that a target needs.
        min_item_count: items with fewer interactions are dropped; None takes the data set's default.
        subset: accept a part of MovieLens: counts are reported, not compared with the full set's.
        vocab_size: largest vocabulary of the tokenizer trained on the texts.
        title_tokens: so many titles, of the items with the most interactions before validation, are tokens of that tokenizer.
        context_text: template of a text that stands behind the item's in every interaction, of columns of the log and of the facts in
            `contexts.py`, such as "{weekday}, {hour}; {gap}"; None: there is none.
        timezone: IANA name of the time zone of hours and weekdays.

    Returns:
        The content of stats.json, without its own sha256.

    Raises:
        DataError: a file is missing, malformed or cut short, a count is wrong, all labels are equal, a date or a column leaves a split
            without targets, or `out` holds something else.
        LockedError: another process prepares `out`.
        ValueError: an argument has an impossible value, or does not apply to the source.
        WriteError: the disk is full.
    """
    out, source = Path(out), _source(source, raw_dir, subset)
    rule = SplitRule(split, val_from, test_from)
    rules = _Rules(
        rule, threshold, min_context, min_item_count, vocab_size, title_tokens, context_text, timezone
    )
    rules.check(source)
    check_replaceable(out)
    with locked_place(out):
        # Who writes a source without further columns need not know of them.
        raw = source.load() if context_text is None else source.load(context_template(context_text).columns)
        return _prepared(source.name, raw, rules, out)


def _source(source: str | Source, raw_dir: str | Path | None, subset: bool) -> Source:
    if isinstance(source, str):
        return source_in_folder(source, raw_dir, subset)
    if raw_dir is not None:
        raise ValueError(f"raw_dir does not apply to {source.name}: its files have their own paths")
    if subset:
        raise ValueError(f"subset does not apply to {source.name}: it has no published counts")
    return source


@dataclass(frozen=True)
class _Rules:
    """The protocol: arguments of `prepare` that turn rows into targets and texts into tokens."""

    split: SplitRule
    threshold: float | None
    min_context: int
    min_item_count: int | None
    vocab_size: int
    title_tokens: int
    context_text: str | None
    timezone: str

    def check(self, source: Source) -> None:
        """Raise a ValueError at an impossible value."""
        self.split.check(source)
        if self.threshold is not None:
            if source.ratings is None:
                raise ValueError(f"threshold does not apply here: give it to {type(source).__name__}")
            low, high = source.ratings
            if not low <= self.threshold < high:  # NaN is neither
                raise ValueError(
                    f"threshold must be at least {low:g} and below {high:g}, so that a rating can be above it and not above it, but is "
                    f"{self.threshold}"
                )
        for name, least in (("min_context", 0), ("min_item_count", 1), ("title_tokens", 0)):
            value = getattr(self, name)
            if value is not None and not least <= value <= MAX_COUNT:
                raise ValueError(f"{name} must be at least {least} and at most {MAX_COUNT:,}, but is {value}")
        check_vocab_size(self.vocab_size)
        check_timezone(self.timezone)
        if self.context_text is not None:
            context_template(self.context_text)


def _prepared(name: str, raw: RawData, rules: _Rules, out: Path) -> dict[str, Any]:
    provenance = {
        "name": name,
        "route": raw.route,
        "subset": raw.subset,
        **raw.text_rule,
        "sha256": raw.checksums,
        # Equal for two formats of one published set; the checksums of their files differ.
        "digest": None if raw.facts is None else raw.digest(),
    }
    threshold = raw.threshold if rules.threshold is None else float(rules.threshold)
    min_item_count = raw.min_item_count if rules.min_item_count is None else rules.min_item_count
    indexed = index_rows(raw, min_item_count)
    columns, split_facts = _columns(raw, indexed, threshold, rules)
    row_texts = _row_texts(raw, indexed, columns, rules)
    provenance |= {name: rule for name, (_, rule) in row_texts.items()}
    stats = {
        "format_version": FORMAT_VERSION,
        "source": provenance,
        **counts_of(raw, indexed, columns),
        "threshold": threshold,
        "click": raw.click.replace("{threshold:g}", f"{threshold:g}"),
        **split_facts,
        "min_context": rules.min_context,
        "min_item_count": min_item_count,
        "splits": split_stats(columns),
    }

    def add_tokenizer(folder: Path, texts: list[str]) -> Tokenizer:
        titles = _frequent_titles(indexed, columns, rules.title_tokens)
        tokenizer = train_tokenizer(texts, rules.vocab_size, titles)
        save_tokenizer(tokenizer, folder / TOKENIZER_FOLDER)
        return tokenizer

    coded = {name: texts for name, (texts, _) in row_texts.items()}
    write_prepared(out, raw, indexed, columns, coded, stats, add_tokenizer)
    return stats


def _frequent_titles(data: Indexed, columns: Mapping[str, npt.NDArray[Any]], number: int) -> list[str]:
    """Titles of the items with the most interactions that are neither validation nor test, most frequent first."""
    is_known = np.isin(columns["split"], (CONTEXT, TRAIN))
    counts = np.bincount(columns["item"][is_known], minlength=data.items.height)
    order = np.argsort(-counts, kind="stable")[:number]
    texts = data.items["text"]
    titles = (title_of(texts[int(item)]) for item in order if counts[item])
    return list(dict.fromkeys(title for title in titles if title))


def write_prepared(
    out: Path,
    raw: RawData,
    indexed: Indexed,
    columns: Mapping[str, npt.NDArray[Any]],
    row_texts: Mapping[str, CodedTexts],
    stats: dict[str, Any],
    add_tokenizer: Callable[[Path, list[str]], Tokenizer],
    more: Mapping[str, pa.Table] | None = None,
) -> None:
    """Write a prepared folder, all of it or nothing.

    Args:
        out: the folder.
        raw: the files that were read, for its rejected rows.
        indexed: users, items and offsets.
        columns: of interactions.arrow.
        row_texts: of contexts and profiles.
        stats: the content of stats.json, to which files and tokenizer are added.
        add_tokenizer: makes the tokenizer's folder in a folder, perhaps from these texts.
        more: further tables by the names of their files.

    Raises:
        DataError: the place cannot be had.
        WriteError: the disk is full.
    """
    try:
        with whole_folder(out, lambda: check_replaceable(out)) as folder:
            for name, table in (more or {}).items():
                write_table(table, folder / name)
            _write(folder, raw, indexed, columns, row_texts, stats, add_tokenizer)
    except WriteError:
        raise
    except OSError as error:
        raise _cannot_be_written(out, error) from error


@contextmanager
def locked_place(out: Path) -> Iterator[None]:
    """Keep other processes from preparing `out`; the lock lies beside it, since `out` itself is replaced."""
    with ExitStack() as stack:
        try:
            stack.enter_context(locked_beside(out, "dti prepare"))
        except OSError as error:
            raise _cannot_be_written(out, error) from error
        yield


def _cannot_be_written(out: Path, error: OSError) -> DataError:
    return DataError(f"{out}: cannot be written ({error}). Name another folder with --out.")


def _columns(
    raw: RawData, data: Indexed, threshold: float, rules: _Rules
) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
    """The columns of interactions.arrow, and what stats.json says of their split."""
    label = (data.rating > threshold).view(np.int8)
    raw.check_classes(label, threshold)
    # Rows are in (user, time, item, file) order: a stable sort by time gives (time, user, item, file).
    by_time = np.argsort(data.timestamp, kind="stable")
    split, split_facts = rules.split.assigned(raw, data, by_time, rules.min_context)
    return columns_of(data, label, by_time, split), split_facts


def columns_of(
    data: Indexed, label: npt.NDArray[np.int8], by_time: npt.NDArray[np.int64], split: npt.NDArray[np.int8]
) -> dict[str, npt.NDArray[Any]]:
    """The columns of interactions.arrow; `by_time` has the rows in the global (time, user, item) order."""
    order = np.empty(by_time.shape, dtype=np.int64)
    order[by_time] = np.arange(order.size)
    return {
        "item": data.item,
        "label": label,
        "timestamp": data.timestamp,
        "rating": data.rating,
        "split": split,
        "order": order,
    }


def _row_texts(
    raw: RawData, data: Indexed, columns: Mapping[str, npt.NDArray[Any]], rules: _Rules
) -> dict[str, tuple[CodedTexts, dict[str, Any]]]:
    """Contexts of interactions and profiles of users, each with its rule, where there are any."""
    found: dict[str, tuple[CodedTexts, dict[str, Any]]] = {}
    if rules.context_text is not None:
        facts = facts_of(raw, data, columns, rules.timezone)
        found["context"] = contexts_of(context_template(rules.context_text), facts, data.extra)
    if raw.profiles is not None:
        profiles, without = raw.profiles.coded(data.users, raw.interactions_path)
        found["profile"] = profiles, {**raw.profiles.rule, "users_without": without}
    return found


def counts_of(raw: RawData, data: Indexed, columns: Mapping[str, npt.NDArray[Any]]) -> dict[str, Any]:
    """The counts in stats.json: of what the folder holds, and of the rows of the files that were read."""
    lengths = np.diff(data.offsets)
    interactions, items = raw.num_rejected
    first = [row for rejected in raw.rejected for row in rejected.first()]
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
        "duplicates_dropped": raw.duplicates_dropped,
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
        "sharing_time": num_sharing_time(data.offsets, data.timestamp),
    }


def split_stats(columns: Mapping[str, npt.NDArray[Any]]) -> dict[str, Any]:
    """Per split its targets and base rate (null where it has no target); "context" counts the other rows.

    "train_after_test" counts the training targets that are later than the first test target.
    """
    stats: dict[str, Any] = {}
    for name, code in SPLIT_CODES.items():
        labels = columns["label"][columns["split"] == code]
        stats[name] = {"targets": labels.size, "base_rate": float(labels.mean()) if labels.size else None}
    stats["context"] = {"interactions": int((columns["split"] == CONTEXT).sum())}
    stats["train_after_test"] = num_train_after_test(columns["split"], columns["timestamp"])
    return stats


def _write(
    folder: Path,
    raw: RawData,
    data: Indexed,
    columns: Mapping[str, npt.NDArray[Any]],
    row_texts: Mapping[str, CodedTexts],
    stats: dict[str, Any],
    add_tokenizer: Callable[[Path, list[str]], Tokenizer],
) -> None:
    """Write everything into the new `folder`, stats.json last, and read it back once."""
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
    if any(raw.num_rejected):
        pl.concat([rejected.frame() for rejected in raw.rejected]).write_csv(folder / REJECTED_FILE)
    learnt = texts
    for name, coded in row_texts.items():
        coded.write(folder, f"{name}s")
        many = min(len(texts), MAX_REPEATED)
        learnt = learnt + [f"; {text}" for text in coded.by_frequency(many, MAX_LEARNT)]
    tokenizer = add_tokenizer(folder, learnt)
    stats["tokenizer"] = {"vocab_size": tokenizer.get_vocab_size()}
    write_stats(folder, stats)
    offsets, _ = PreparedData.open(folder).token_ids(tokenizer)
    stats["tokenizer"]["mean_item_tokens"] = float(offsets[-1] / (offsets.size - 1))
    write_sealed(folder / STATS_FILE, stats)
