"""Extended folders: the rows of an older one and those that came later, its tokenizer, and which training targets are new."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dti_model.cli import main
from dti_model.data import (
    CONTEXT,
    TRAIN,
    CustomFiles,
    DataError,
    PreparedData,
    extend,
    files_like,
    prepare,
)
from tests.cli.commands import refused
from tests.data.movielens_files import MOVIES, some_ratings, write_1m
from tests.data.prepared_folders import content_of

Row = tuple[Any, ...]  # user, item, timestamp, liked
MIN_CONTEXT = 2


def some_rows(num: int = 400, users: int = 12, items: int = 9) -> list[Row]:
    """In the order of their times, many of which are equal."""
    rng = np.random.default_rng(3)
    columns = rng.integers(1, users + 1, num), rng.integers(1, items + 1, num), rng.integers(0, 2, num)
    return [(int(u), int(i), t // 2, int(y)) for t, (u, i, y) in enumerate(zip(*columns))]


def written(folder: Path, rows: list[Row], titles: dict[Any, str] | None = None) -> dict[str, Path]:
    """A log and its item file."""
    folder.mkdir(parents=True, exist_ok=True)
    titles = {row[1]: f"Film {row[1]}" for row in rows} if titles is None else titles
    log = "".join(f"{','.join(map(str, row))}\n" for row in rows)
    (folder / "log.csv").write_text(f"user,item,timestamp,liked\n{log}")
    (folder / "items.csv").write_text("item,title\n" + "".join(f"{i},{t}\n" for i, t in titles.items()))
    return {"interactions": folder / "log.csv", "items": folder / "items.csv"}


def prepared(out: Path, rows: list[Row], **settings: Any) -> PreparedData:
    files = CustomFiles(**written(out.with_name(f"{out.name}-raw"), rows), text="{title}", label="liked")
    prepare(files, out, **{"min_context": MIN_CONTEXT, "vocab_size": 300, **settings})
    return PreparedData.open(out)


def extended(
    older: Path, out: Path, rows: list[Row], titles: dict[Any, str] | None = None, **fields: Any
) -> PreparedData:
    files = files_like(older, **written(out.with_name(f"{out.name}-raw"), rows, titles), **fields)
    stats = extend(older, files, out)
    data = PreparedData.open(out)
    assert data.stats == stats
    return data


def facts(data: PreparedData) -> dict[str, int]:
    found: dict[str, int] = data.stats["extension"]
    return found


def rows_of(data: PreparedData, index: np.ndarray) -> list[Row]:
    """Rows by their ids."""
    users, items = np.array(data.user_ids)[data.users_of(index)], np.array(data.item_ids)[data.item[index]]
    return sorted(zip(users, items, data.timestamp[index].tolist(), data.label[index].tolist()))


def as_ids(rows: list[Row]) -> list[Row]:
    return sorted((str(u), str(i), t, y) for u, i, t, y in rows)


def test_the_rows_of_both_as_if_prepared_together(tmp_path: Path) -> None:
    rows = some_rows()
    rows[300:] = [(u + 6, i + 4, t, y) for u, i, t, y in rows[300:]]  # with users and items that are new
    older = prepared(tmp_path / "old", rows[:300])
    before = content_of(older.path)
    data, whole = extended(older.path, tmp_path / "new", rows[300:]), prepared(tmp_path / "whole", rows)
    assert content_of(older.path) == before
    for name in ("item", "label", "timestamp", "rating", "order", "history_offsets"):
        assert np.array_equal(getattr(data, name), getattr(whole, name)), name
    assert (data.user_ids, data.item_ids, data.item_texts) == (
        whole.user_ids,
        whole.item_ids,
        whole.item_texts,
    )
    assert np.array_equal(data.split != CONTEXT, whole.split != CONTEXT)
    assert content_of(data.tokenizer_dir) == content_of(older.tokenizer_dir)
    assert content_of(data.tokenizer_dir) != content_of(whole.tokenizer_dir)
    assert (older.stats["format_version"], data.stats["format_version"]) == (2, 3)
    assert facts(data)["users"] == data.num_users - older.num_users > 0
    assert facts(data)["items"] == data.num_items - older.num_items > 0
    assert (facts(data)["interactions"], facts(data)["repeated"], facts(data)["late"]) == (100, 0, 0)
    assert data.stats["timestamp_unit"] == older.stats["timestamp_unit"]
    assert {**data.stats["source"], "sha256": 0} == {**older.stats["source"], "sha256": 0}


def test_targets_of_the_older_folder_train_and_new_ones_are_split_by_time(tmp_path: Path) -> None:
    rows = some_rows()
    older = prepared(tmp_path / "old", rows[:300])
    data = extended(older.path, tmp_path / "new", rows[300:])
    num_new = facts(data)["targets"]
    assert num_new > 90
    sizes = [num_new * 8 // 10, num_new * 9 // 10 - num_new * 8 // 10, num_new - num_new * 9 // 10]
    assert [data.targets(split).size for split in ("val", "test")] == sizes[1:]
    for split in ("train", "val", "test"):
        assert data.stats["splits"][split]["targets"] == data.targets(split).size
    scored = np.concatenate([older.targets(split) for split in ("val", "test")])
    new = data.targets("train", after=0)
    assert new.size == sizes[0] + scored.size == facts(data)["train_targets"]
    in_new = [row for row in rows_of(data, new) if row[2] >= 150]
    assert rows_of(older, scored) == [row for row in rows_of(data, new) if row not in in_new]
    assert max(row[2] for row in in_new) <= data.timestamp[data.targets("val")].min()
    assert rows_of(data, data.targets("train")) == sorted(
        rows_of(older, older.targets("train")) + rows_of(data, new)
    )
    assert older.since is None
    assert older.targets("train", after=0).size == 0


def test_new_targets_are_split_by_dates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    older = prepared(tmp_path / "old", some_rows()[:300])
    files = [f"--{name}={path}" for name, path in written(tmp_path / "raw", some_rows()[300:]).items()]
    words = ["prepare", "custom", f"--extend={older.path}", *files, f"--out={tmp_path / 'new'}"]
    assert main([*words, "--val-from", "170", "--test-from", "190"]) == 0
    data = PreparedData.open(tmp_path / "new")
    assert data.stats["split"] == "date"
    for split, first, last in (("val", 170, 189), ("test", 190, 199)):
        times = data.timestamp[data.targets(split)]
        assert (times.min(), times.max()) == (first, last)
    new = rows_of(data, data.targets("train", after=0))
    assert {row[2] for row in new if row[2] >= 150} == set(range(150, 170))
    assert [row for row in new if row[2] < 150] == rows_of(
        older, np.concatenate([older.targets(split) for split in ("val", "test")])
    )
    assert "no target is test" in refused([*words, "--val-from", "170", "--test-from", "900"], capsys)
    assert "needs test_from (--test-from) beside it" in refused([*words, "--val-from", "170"], capsys)
    line = refused([*words, "--split-column", "liked"], capsys)
    assert "--split-column is the extended folder's own: leave --split-column out" in line


def test_a_chain_of_extensions(tmp_path: Path) -> None:
    rows = some_rows()
    first = prepared(tmp_path / "a", rows[:200])
    second = extended(first.path, tmp_path / "b", rows[200:300])
    third = extended(second.path, tmp_path / "c", rows[300:])
    assert first.chain == [first.fingerprint]
    assert third.chain == [first.fingerprint, second.fingerprint, third.fingerprint]
    assert [facts(data)["number"] for data in (second, third)] == [1, 2]
    train = [set(rows_of(data, data.targets("train"))) for data in (first, second, third)]
    assert set(rows_of(third, third.targets("train", after=0))) == train[2] - train[0]
    assert set(rows_of(third, third.targets("train", after=1))) == train[2] - train[1]
    assert third.targets("train", after=2).size == 0
    assert train[0] < train[1] < train[2]
    assert third.since is not None
    assert np.array_equal(third.since >= 0, third.split == TRAIN)
    at_once = extended(first.path, tmp_path / "d", rows[200:])  # the same rows, other targets
    assert np.array_equal(at_once.item, third.item)
    assert at_once.fingerprint not in third.chain


def test_an_export_that_overlaps(tmp_path: Path) -> None:
    """Each row that was there takes one equal row out; more equal rows than that are new."""
    rows = some_rows()
    older = prepared(tmp_path / "old", [*rows[:200], rows[150]])
    again = [rows[150], rows[150], rows[150]]
    other = [(u, i, t, 1 - y) for u, i, t, y in rows[:3]]  # another label is another row
    data = extended(older.path, tmp_path / "new", [*rows[160:300], *again, *other])
    assert facts(data)["repeated"] == 40 + 2
    assert facts(data)["interactions"] == 100 + 1 + 3
    assert rows_of(data, np.arange(data.item.size)) == as_ids([*rows[:300], rows[150], rows[150], *other])
    assert data.stats["rows_in_files"]["interactions"] == 140 + 3 + 3
    with pytest.raises(DataError, match=r"log\.csv: no row is new: 20 are in "):
        extended(data.path, tmp_path / "more", rows[100:120])
    assert not (tmp_path / "more").exists()


def test_rows_that_come_late(tmp_path: Path) -> None:
    """They have their place in the histories, and may give older rows enough earlier interactions to be training targets."""
    older = prepared(tmp_path / "old", [*some_rows()[:200], ("77", 1, 50, 1)], min_context=2)
    data = extended(older.path, tmp_path / "new", [*some_rows()[200:300], ("77", 2, 3, 0), ("77", 3, 3, 1)])
    assert facts(data)["late"] == 2
    user = data.user_ids.index("77")
    rows = np.arange(*data.history_offsets[user : user + 2])
    assert data.timestamp[rows].tolist() == [3, 3, 50]
    assert data.since is not None
    assert (data.split[rows].tolist(), data.since[rows].tolist()) == ([CONTEXT, CONTEXT, TRAIN], [-1, -1, 1])


def test_ids_that_are_no_numbers_change_the_order_of_all(tmp_path: Path) -> None:
    older = prepared(tmp_path / "old", some_rows()[:200])
    assert older.user_ids[:3] == ["1", "2", "3"]
    data = extended(older.path, tmp_path / "new", [("x", i, 500 + i, i % 2) for i in range(1, 8)])
    assert data.user_ids == sorted(data.user_ids)
    assert rows_of(data, data.targets("train", after=-1)) == sorted(rows_of(data, data.targets("train")))
    whole = prepared(
        tmp_path / "whole", [*some_rows()[:200], *[("x", i, 500 + i, i % 2) for i in range(1, 8)]]
    )
    assert np.array_equal(data.item, whole.item)


def test_texts_of_items(tmp_path: Path) -> None:
    older = prepared(tmp_path / "old", some_rows()[:200])
    new = [(1, i, 300 + i, 1) for i in (1, 2, 3, 20, 21)]
    data = extended(older.path, tmp_path / "new", new, {1: "Another", 2: "Film 2", 20: "Film 20"})
    texts = dict(zip(data.item_ids, data.item_texts))
    assert (texts["1"], texts["2"], texts["20"], texts["21"]) == (
        "Film 1",
        "Film 2",
        "Film 20",
        "Unknown title",
    )
    assert facts(data)["other_texts"] == 1
    assert data.stats["missing_titles"] == 1
    data = extended(older.path, tmp_path / "newer", new[:3], {20: "Film 20"})  # a catalogue of new items only
    assert data.item_texts == older.item_texts
    with pytest.raises(DataError, match=r"items\.csv: lists none of the 5 items of "):
        extended(older.path, tmp_path / "none", new, {99: "x"})


def test_rare_items_are_dropped_by_the_older_rule(tmp_path: Path) -> None:
    rows = [(u, i, t, t % 2) for t, (u, i) in enumerate((u, i) for i in range(1, 4) for u in range(1, 9))]
    older = prepared(tmp_path / "old", rows, min_item_count=3)
    new = [
        (1, 1, 100, 1),
        (2, 50, 101, 0),
        (3, 50, 102, 1),
        (4, 60, 103, 1),
        (5, 60, 104, 0),
        (6, 60, 105, 1),
    ]
    data = extended(older.path, tmp_path / "new", new)
    assert data.item_ids == ["1", "2", "3", "60"]
    assert (facts(data)["interactions"], data.stats["interactions_pruned"]) == (4, 2)


def test_movielens_goes_on_with_a_log_of_ones_own(tmp_path: Path) -> None:
    prepare(
        "ml-1m", tmp_path / "old", write_1m(tmp_path / "raw", some_ratings()), subset=True, vocab_size=300
    )
    older = PreparedData.open(tmp_path / "old")
    log = "user,item,rating,timestamp\n1,1,4,100\n1,2,3,101\n99,1,5,102\n"
    (tmp_path / "log.csv").write_text(log)
    (tmp_path / "items.csv").write_text(
        f'item,title,genres\n1,{MOVIES[0].title},"Animation, Comedy"\n2,Les Misérables,Drama\n'
    )
    files = files_like(older.path, interactions=tmp_path / "log.csv", items=tmp_path / "items.csv")
    assert (files.rating, files.threshold, files.text) == ("rating", 3.0, "{title}; {genres}")
    stats = extend(older.path, files, tmp_path / "new")
    assert stats["source"]["name"] == "ml-1m"
    assert stats["extension"]["other_texts"] == 1
    data = PreparedData.open(tmp_path / "new")
    assert data.label[data.timestamp >= 100].tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"text": "{item}"}, "text must be that of .*old, '{title}', got '{item}'"),
        ({"max_chars": 9}, "max_chars must be that of .*old, 200, got 9"),
        (
            {"rating": "liked", "threshold": 0.5},
            "rating is given, but clicks of .*old were made of a label: name the column",
        ),
    ],
)
def test_other_rules_are_refused_by_name(tmp_path: Path, fields: dict[str, Any], problem: str) -> None:
    older = prepared(tmp_path / "old", some_rows()[:200])
    with pytest.raises(DataError, match=problem):
        extended(older.path, tmp_path / "new", some_rows()[200:300], **fields)


def test_another_threshold_is_refused(tmp_path: Path) -> None:
    rows = some_rows()[:300]
    raw = written(tmp_path / "raw", rows[:200])
    prepare(
        CustomFiles(**raw, text="{title}", rating="liked", threshold=0.25), tmp_path / "old", vocab_size=300
    )
    with pytest.raises(DataError, match=r"threshold must be that of .*old, 0\.25, got 0\.5: leave it out"):
        extended(tmp_path / "old", tmp_path / "new", rows[200:], threshold=0.5)
    with pytest.raises(DataError, match="label is given, but clicks of .*old were made of a rating"):
        extended(tmp_path / "old", tmp_path / "new", rows[200:], label="liked")
    assert extended(tmp_path / "old", tmp_path / "new", rows[200:]).stats["threshold"] == 0.25


DAY, SECOND = "2026-11-2{} 10:00:00", 1_700_000_000


@pytest.mark.parametrize(
    ("older", "newer", "problem"),
    [
        (SECOND, (SECOND + 90) * 1000, "is one in seconds and the other in milliseconds"),
        (SECOND, "2026-11-20", "the times are date-times, or microseconds, and those of .*old are numbers"),
        (
            "2026-11-20",
            SECOND,
            "the times are numbers of a unit that was not said, and those of .*old are date-times",
        ),
        (SECOND, SECOND + 0.5, "the times are numbers with a fraction, and those of .*old are integers"),
        (SECOND, f"{SECOND + 90}.0", None),
        (SECOND + 0.5, SECOND + 90, None),
        ("2026-11-20", "2026-11-21 10:00", None),
    ],
)
def test_units_of_time(tmp_path: Path, older: Any, newer: Any, problem: str | None) -> None:
    rows = [(1 + n % 3, 1 + n % 2, older, n % 2) for n in range(20)]
    prepared(tmp_path / "old", rows)
    new = [(1, 1, newer, 1), (2, 2, newer, 0)]
    if problem is not None:
        with pytest.raises(DataError, match=problem):
            extended(tmp_path / "old", tmp_path / "new", new)
        return
    data = extended(tmp_path / "old", tmp_path / "new", new)
    scale = {int: 1, float: 10**6, str: 10**6}[type(older)]
    gap = 34 * 3600 if isinstance(older, str) else 90 if isinstance(older, int) else 89.5
    assert facts(data)["late"] == 0
    assert data.stats["last_timestamp"] - PreparedData.open(tmp_path / "old").stats["last_timestamp"] == gap * scale  # fmt: skip


def command(tmp_path: Path, *more: str) -> list[str]:
    files = written(tmp_path / "raw", some_rows()[190:300])
    words = [f"--{name}={path}" for name, path in files.items()]
    return ["prepare", "custom", "--extend", str(tmp_path / "old"), *words, "--out", str(tmp_path / "new"), *more]  # fmt: skip


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    older = prepared(tmp_path / "old", some_rows()[:200])
    assert main(command(tmp_path)) == 0
    printed = capsys.readouterr().out
    new = PreparedData.open(tmp_path / "new")
    for said in (
        "extension 1: 100 new interactions (0 earlier than the last one before)",
        "10 were there already and left out",
        f"100 new targets; {new.targets('train', after=0).size} training targets are new",
    ):
        assert said in printed
    assert main(command(tmp_path)) == 0  # its own older result is replaced
    assert PreparedData.open(tmp_path / "new").fingerprint == new.fingerprint
    line = refused(command(tmp_path, "--min-context", "2"), capsys)
    assert "--min-context is the extended folder's own: leave --min-context out" in line
    before = content_of(older.path)
    line = refused([*command(tmp_path)[:-1], str(older.path)], capsys)
    assert "is the folder to extend, which stays as it is: name another one with --out" in line
    assert content_of(older.path) == before
    line = refused(["prepare", "custom", *command(tmp_path)[4:]], capsys)
    assert "--text must be given" in line


def test_contexts_and_profiles(tmp_path: Path) -> None:
    """New ones as if all had been prepared together; older ones stay, whatever the new files say."""
    template = "{hour}; {device}; {gap}, {item_rate}"
    rows = [(u, i, SECOND + 3000 * t, y) for u, i, t, y in some_rows()]
    rows[300:] = [(u + 6, i + 4, t, y) for u, i, t, y in rows[300:]]

    def files_of(name: str, rows: list[Row], users: dict[int, str]) -> dict[str, Path]:
        files = written(tmp_path / name, rows)
        devices = "".join(f"{','.join(map(str, row))},{'phone' if row[2] % 7 else 'tv'}\n" for row in rows)
        files["interactions"].write_text(f"user,item,timestamp,liked,device\n{devices}")
        files["users"] = tmp_path / name / "users.csv"
        files["users"].write_text("user,town\n" + "".join(f"{user},{town}\n" for user, town in users.items()))
        return files

    def made(name: str, rows: list[Row], users: dict[int, str]) -> PreparedData:
        files = files_of(f"{name}-raw", rows, users)
        log = CustomFiles(**files, text="{title}", label="liked", user_text="{town}")
        prepare(log, tmp_path / name, min_context=2, vocab_size=300, context_text=template)
        return PreparedData.open(tmp_path / name)

    older = made("old", rows[:300], {1: "Rome", 2: "Oslo"})
    whole = made("whole", rows, {1: "Rome", 2: "Oslo", 15: "Bonn"})
    files = files_of("new-raw", rows[300:], {1: "Kyiv", 15: "Bonn"})
    log = files_like(older.path, **files)
    extend(older.path, log, tmp_path / "new")
    data = PreparedData.open(tmp_path / "new")
    assert data.contexts is not None
    assert whole.contexts is not None
    shown = [[each.contexts.of_row(row) for row in range(400)] for each in (data, whole) if each.contexts]
    assert shown[0] == shown[1]
    assert len({tuple(texts) for texts in shown[0]}) > 50
    assert data.profiles is not None
    towns = {user: data.profiles.of_row(index)[0] for index, user in enumerate(data.user_ids)}
    assert {user: town for user, town in towns.items() if town} == {"1": "Rome", "2": "Oslo", "15": "Bonn"}
    assert (data.context_rule, data.chain[:-1]) == (older.context_rule, older.chain)
    plain = files["interactions"].read_text().replace("device", "gadget")
    files["interactions"].write_text(plain)
    with pytest.raises(DataError, match=r"log\.csv: there is no column device, of which contexts of "):
        extend(older.path, log, tmp_path / "newer")
    with pytest.raises(DataError, match="user_text must be that of .*old, '{town}', got '{user}'"):
        extend(older.path, files_like(older.path, **files, user_text="{user}"), tmp_path / "newer")
    without = prepared(tmp_path / "without", rows[:200])
    del files["users"]
    log = CustomFiles(**files, text="{title}", label="liked", users=files["items"], user_text="{item}")
    with pytest.raises(DataError, match="users is given, but .*without was prepared without profiles"):
        extend(without.path, log, tmp_path / "newer")
