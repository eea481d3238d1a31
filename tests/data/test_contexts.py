"""Contexts of interactions and profiles of users: what they say, that they look at nothing later, and what is refused."""

from __future__ import annotations

import dataclasses
import datetime
from pathlib import Path
from zoneinfo import ZoneInfo

import numpy as np
import pytest

from dti_model.cli import main
from dti_model.data import (
    TEST,
    TRAIN,
    VAL,
    DataError,
    ItemCategories,
    PreparedData,
    affinities,
    categories_of,
    ctr_text,
    gap_text,
    moment_texts,
    prepare,
    rate_text,
    rates,
)
from dti_model.data.coded_texts import CodedTexts, Column, coded_texts
from dti_model.data.contexts import BUILT_IN
from dti_model.data.row_facts import RowFacts
from dti_model.data.sources.movielens import MovieLens
from dti_model.data.texts import Template
from dti_model.data.tokens import train_tokenizer
from tests.data.movielens_files import some_ratings, write_1m
from tests.data.prepared_folders import content_of
from tests.data.text_logs import CONTEXT, GENRES, some_rows, some_users, text_data, text_files, write_csv


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    return text_data(tmp_path_factory.mktemp("texts"), timezone="Europe/Berlin")


def test_contexts_by_a_plain_loop(data: PreparedData) -> None:
    """Hours of the zone's clock, devices of the log, gaps, and rates of what has an earlier time stamp."""
    rows = some_rows()
    stamps = sorted(
        range(len(rows)), key=lambda i: (rows[i]["timestamp"], rows[i]["user"], rows[i]["item"], i)
    )
    items: dict[str, list[tuple[int, int]]] = {}
    users: dict[str, list[tuple[int, int]]] = {}
    last: dict[str, int] = {}
    seen: dict[str, list[tuple[int, set[str], float]]] = {}
    wanted = {}
    for place in stamps:
        row = rows[place]
        moment = datetime.datetime.fromtimestamp(row["timestamp"], ZoneInfo("Europe/Berlin"))
        genres = {*filter(None, GENRES[int(row["item"][1:]) % len(GENRES)].split(", "))}
        of_item, of_user = items.setdefault(row["item"], []), users.setdefault(row["user"], [])
        gap = "first of all" if not of_user else gap_text(row["timestamp"] - last[row["user"]])
        wanted[row["user"], len(of_user)] = [
            f"{moment:%A}, {moment.hour}",
            row["device"],
            gap,
            rate(of_item, row["timestamp"]),
            rate(of_user, row["timestamp"]),
            f"{ctr(of_item, row['timestamp'])} {ctr(of_user, row['timestamp'])}",
            affinity(seen.setdefault(row["user"], []), genres, row["timestamp"]),
        ]
        known = [label for stamp, label in of_item if stamp < row["timestamp"]]
        expected = (sum(known) + 1) / (len(known) + 2)
        seen[row["user"]].append((row["timestamp"], genres, row["liked"] - expected))
        of_item.append((row["timestamp"], row["liked"]))
        of_user.append((row["timestamp"], row["liked"]))
        last[row["user"]] = row["timestamp"]
    assert data.contexts is not None
    found = {}
    for user, (first, stop) in enumerate(zip(data.history_offsets, data.history_offsets[1:])):
        for row in range(first, stop):
            found[data.user_ids[user], int(row - first)] = data.contexts.of_row(row)
    assert found == wanted
    assert {text[2] for text in wanted.values()} >= {
        "at once",
        "within a minute",
        "hours later",
        "days later",
    }


def rate(earlier: list[tuple[int, int]], time: int) -> str:
    labels = [label for stamp, label in earlier if stamp < time]
    return rate_text(sum(labels), len(labels))


def ctr(earlier: list[tuple[int, int]], time: int) -> str:
    labels = [label for stamp, label in earlier if stamp < time]
    return f"{2 * round(50 * (sum(labels) + 2) / (len(labels) + 4))}" if labels else "new"


def affinity(earlier: list[tuple[int, set[str], float]], genres: set[str], time: int) -> str:
    """Each earlier interaction counts once for every genre that it shares."""
    shared = [(len(genres & theirs), surplus) for stamp, theirs, surplus in earlier if stamp < time]
    number = sum(times for times, _ in shared)
    if number == 0:
        return "new"
    share = sum(times * surplus for times, surplus in shared) / (number + 3)
    return f"{2 * round(share * 50):+}"


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_rates_do_not_depend_on_chunks(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks end where time stamps do, also where all are equal."""
    rng = np.random.default_rng(0)
    for times in (np.sort(rng.integers(0, 40, 300)), np.zeros(300, np.int64)):
        item, label = rng.integers(0, 5, 300).astype(np.int32), rng.integers(0, 2, 300).astype(np.int8)
        split = rng.integers(0, 4, 300).astype(np.int8)
        split[250:] = rng.choice([0, VAL, TEST], 50)
        facts = RowFacts(np.array([0, 300]), item, label, times, np.arange(300), split, "seconds", "UTC", "")
        monkeypatch.setattr(rates, "_CHUNK", chunk)
        column = BUILT_IN["item_rate"](facts)
        for row in range(300):
            known = (times < times[row]) & (item == item[row])
            if (
                row <= np.flatnonzero(split == TRAIN)[-1]
            ):  # what training reads knows nothing of validation and test
                known &= split < VAL
            wanted = rate_text(int(label[known].sum()), int(known.sum()))
            assert column.values[column.codes[row]] == wanted


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_affinities_do_not_depend_on_chunks(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks are of whole users, also of none; what training reads counts no validation or test target, nor rates that do."""
    rng = np.random.default_rng(0)
    offsets = np.array([0, 0, 5, 120, 120, 300])
    times = np.concatenate([np.sort(rng.integers(0, 40, size)) for size in np.diff(offsets)])
    item, label = rng.integers(0, 12, 300).astype(np.int32), rng.integers(0, 2, 300).astype(np.int8)
    split, texts = rng.integers(0, 4, 300).astype(np.int8), [f"T{i}; {GENRES[i % 4]}" for i in range(12)]
    by_time = np.argsort(times, kind="stable")
    facts = RowFacts(offsets, item, label, times, by_time, split, "seconds", "UTC", "", texts)
    for module in (rates, affinities):
        monkeypatch.setattr(module, "_CHUNK", chunk)
    column = BUILT_IN["affinity"](facts)
    user = facts.user()
    for row in range(300):
        counted = np.ones(300, bool)
        if row <= np.flatnonzero((split == TRAIN) & (user == user[row]))[-1]:
            counted = split < VAL
        seen = []
        for before in np.flatnonzero(counted & (user == user[row])):
            of_item = counted & (times < times[before]) & (item == item[before])
            expected = (label[of_item].sum() + 1) / (of_item.sum() + 2)
            seen.append((int(times[before]), genres_of(texts[item[before]]), float(label[before] - expected)))
        wanted = affinity(seen, genres_of(texts[item[row]]), int(times[row]))
        assert column.values[column.codes[row]] == wanted


def genres_of(text: str) -> set[str]:
    return {*filter(None, text.split("; ")[1].split(", "))}


def test_categories_are_what_stands_behind_the_title() -> None:
    assert categories_of("Toy Story (1995); Animation, Comedy") == ["Animation", "Comedy"]
    assert categories_of("Gift Card, red; Gift Cards, Cards; Gift Cards") == ["Gift Cards", "Cards"]
    assert categories_of("Casino, 1995") == categories_of("Casino; ,") == []


def test_the_first_eight_categories_count() -> None:
    texts = [f"T; {', '.join('abcdefghij')}", "U; i, j", "V; h, j", "W"]
    found = ItemCategories.of(map(categories_of, texts))
    rows, ids = found.of_rows(np.array([1, 0, 3, 2]))
    assert rows.tolist() == [0, 0, *[1] * 8, 3, 3]
    assert ids.tolist() == [8, 9, *range(8), 7, 9]
    assert found.num == 10
    kept = ItemCategories.of(map(categories_of, texts), kept=["j", "h"])
    assert [kept.of_rows(np.array([item]))[1].tolist() for item in range(4)] == [[1, 0], [0], [1, 0], []]


def test_affinity_needs_categories(tmp_path: Path) -> None:
    files = dataclasses.replace(text_files(tmp_path / "raw"), text="{title}, {genres}")
    with pytest.raises(
        DataError, match=r"\{affinity\} compares categories of items, and none of its items has any"
    ):
        text_data(tmp_path, files)
    assert not (tmp_path / "data").exists()


def test_profiles_follow_the_users_file(data: PreparedData) -> None:
    assert data.profiles is not None
    found = dict(zip(data.user_ids, map(data.profiles.of_row, range(data.num_users))))
    assert found == {f"u{i:02}": [f"{'FM'[i % 2]}, {20 + i}"] for i in range(15)} | {"u15": [""]}
    assert data.stats["source"]["profile"]["users_without"] == 1
    assert data.stats["format_version"] == 3


def test_an_own_label_and_later_rows_change_no_context(tmp_path: Path) -> None:
    """Of the row in the middle of the global order the label is turned, and all later rows are: contexts up to it stay."""
    before = text_data(tmp_path / "a")
    time = np.sort(before.timestamp)[len(before.timestamp) // 2]
    rows = [{**row, "liked": 1 - row["liked"]} if row["timestamp"] >= time else row for row in some_rows()]
    after = text_data(tmp_path / "b", text_files(tmp_path / "b" / "raw", rows))
    assert before.contexts is not None
    assert after.contexts is not None
    changed = 0
    for row in range(len(before.item)):
        if before.timestamp[row] <= time:
            assert before.contexts.of_row(row) == after.contexts.of_row(row)
        else:
            changed += before.contexts.of_row(row) != after.contexts.of_row(row)
    assert changed > 20


def test_a_column_of_the_log_comes_before_a_built_in_fact(tmp_path: Path) -> None:
    rows = [{**row, "hour": f"h{row['timestamp'] % 3}"} for row in some_rows()]
    files = text_files(tmp_path / "raw", rows)
    data = text_data(tmp_path, files, context_text="{hour}")
    assert data.contexts is not None
    assert set(data.contexts.texts) == {"", "h0", "h1", "h2"}
    assert data.context_rule is not None
    assert data.context_rule["built_in"] == []


def test_texts_of_parts_are_kept_once() -> None:
    """Rows beyond one chunk too; a part that is left out is "", and combinations that do not occur are not made."""
    template = Template("{a} ({b}); {c}", missing_title=None)
    rng = np.random.default_rng(0)
    codes = [rng.integers(size, size=50_000).astype(np.int32) for size in (3, 4, 2)]
    names = [["x", "y", ""], ["1", "2", "3", ""], ["", "z"]]
    columns = {name: Column(code, values) for name, code, values in zip("abc", codes, names)}
    found = coded_texts(template, columns, 50_000)
    assert len(found.texts) == len(set(found.texts)) == 13
    for row in range(100):
        a, b, c = (values[code[row]] for values, code in zip(names, codes))
        first = f"{a} ({b})" if a and b else (a or (f"({b})" if b else ""))
        assert found.of_row(row) == [first, c]


def test_a_tokenizer_learns_texts_as_often_as_rows_have_them() -> None:
    """What all rows have is one token, not digits; a part that is left out is no text."""
    coded = CodedTexts((np.array([0, 1, 1, 2]), np.array([3, 3, 3, 0])), ["", "a", "b", "c"])
    assert coded.by_frequency(8, 2) == [*"cccccc", *"aaaa"]
    assert coded.by_frequency(1, 9) == [*"cab"]
    codes = np.random.default_rng(0).integers(1, 102, 3_000).astype(np.int32)
    texts = ["", *(f"{percent:+}" for percent in range(-100, 101, 2))]
    titles = [f"Film {number}; Drama" for number in range(900)]
    learnt = [*titles, *(f"; {text}" for text in CodedTexts((codes,), texts).by_frequency(len(titles), 999))]
    encoder = train_tokenizer(learnt, 1_000)
    assert {len(encoder.encode(f"; {text}").ids) for text in texts[1:]} == {1}


def test_moments_follow_the_season_and_the_zone() -> None:
    """Summer and winter time, and a zone of a half hour; the vectorised way and that of requests agree."""
    seconds = np.array([1_593_560_000, 1_609_460_000, 1_616_893_199, 1_616_893_200, 0])
    for zone in ("Europe/Berlin", "Asia/Kolkata", "America/New_York", "UTC"):
        facts = RowFacts(
            np.array([0, 5]),
            np.zeros(5, np.int32),
            np.zeros(5, np.int8),
            seconds,
            np.arange(5),
            np.zeros(5, np.int8),
            "seconds",
            zone,
            "",
        )
        for name in ("hour", "weekday"):
            column = BUILT_IN[name](facts)
            assert [column.values[code] for code in column.codes] == [
                moment_texts(int(one), zone)[name] for one in seconds
            ]
    assert moment_texts(1_616_893_199, "Europe/Berlin")["hour"] == "1"
    assert moment_texts(1_616_893_200, "Europe/Berlin")["hour"] == "3"


def test_rates_are_rounded_to_few_texts() -> None:
    assert [ctr_text(*x) for x in ((0, 0), (0, 1), (1, 1), (223, 312), (10_000, 10_000))] == [
        *("new", "40", "60", "72", "100"),
    ]
    assert [rate_text(*x) for x in ((0, 0), (0, 1), (1, 1), (1, 3), (223, 312), (9_999, 10_000))] == [
        *("new", "0% of 1", "100% of 1", "34% of 3", "72% of 300", "100% of 10000"),
    ]
    assert [gap_text(x) for x in (0, 9, 10, 59, 60, 599, 3_599, 86_399, 86_400, 10**9)] == [
        *("at once", "seconds later", "within a minute", "within a minute", "minutes later", "minutes later"),
        *("within the hour", "hours later", "days later", "years later"),
    ]


def test_folders_without_texts_stay_as_they_were(tmp_path: Path) -> None:
    """Version 2, and not a file more."""
    files = dataclasses.replace(text_files(tmp_path / "raw"), users=None, user_text=None)
    plain = text_data(tmp_path, files, context_text=None)
    assert plain.stats["format_version"] == 2
    assert plain.contexts is None
    assert plain.profiles is None
    assert not {"context", "profile"} & plain.stats["source"].keys()
    assert not any(name.startswith(("contexts", "profiles")) for name in content_of(plain.path))


def test_texts_are_part_of_the_fingerprint(data: PreparedData, tmp_path: Path) -> None:
    other = text_data(
        tmp_path, text_files(tmp_path / "raw", users=some_users()[1:]), timezone="Europe/Berlin"
    )
    assert data.profiles is not None
    assert other.fingerprint != data.fingerprint


def test_movielens_profiles(tmp_path: Path) -> None:
    raw = write_1m(tmp_path, some_ratings(num_users=3))
    (raw / "users.dat").write_text("1::F::1::10::48067\n2::M::56::16::70072\n3::M::25::0::1\n")
    prepare(MovieLens("ml-1m", raw, subset=True, profile=True), tmp_path / "out", vocab_size=300)
    data = PreparedData.open(tmp_path / "out")
    assert data.profiles is not None
    assert [data.profiles.of_row(user) for user in range(3)] == [
        ["F", "under 18", "K-12 student"],
        ["M", "56+", "self-employed"],
        ["M", "25-34", "other"],
    ]
    (raw / "users.dat").write_text("1::F::1::10::48067\n1::M::56::16::70072\n")
    with pytest.raises(DataError, match=r"users.dat:2: a second row of user '1', whose first is in line 1"):
        prepare(MovieLens("ml-1m", raw, subset=True, profile=True), tmp_path / "out2")
    (raw / "users.dat").unlink()
    with pytest.raises(DataError, match="no users' file here"):
        prepare(MovieLens("ml-1m", raw, subset=True, profile=True), tmp_path / "out2")


def test_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each bad input is one line that names the place and the way out."""
    files = text_files(tmp_path / "raw")
    base = [
        *("prepare", "custom", "--interactions", str(files.interactions), "--items", str(files.items)),
        *("--text", "{title}", "--label", "liked", "--out", str(tmp_path / "out")),
    ]

    def error(*words: str) -> str:
        assert main([*base, *words]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert not (tmp_path / "out").exists()
        return line

    users = str(files.users)
    assert "log.csv: there is no column devise, which --context-text '{devise}' names" in error(
        "--context-text", "{devise}"
    )
    assert "built in are hour, weekday, gap, item_rate, user_rate, item_ctr, user_ctr, affinity" in error(
        "--context-text", "{devise}"
    )
    assert "no context may hold what is to be predicted" in error("--context-text", "{liked}")
    assert "text template 'no field' names no column" in error("--context-text", "no field")
    assert "timezone" in error("--context-text", "{hour}", "--timezone", "Berlin")
    assert "users goes with user_text" in error("--users", users)
    assert "names agee, but" in error("--users", users, "--user-text", "{agee}")
    assert "there is no column id" in error("--users", users, "--user-text", "{age}", "--users-key", "id")
    twice = write_csv(tmp_path / "twice.csv", [*some_users(), some_users()[2]])
    line = error("--users", str(twice), "--user-text", "{age}")
    assert "twice.csv:18: a second row of user 'u02', whose first is in line 4. Keep one row a user" in line
    empty = write_csv(tmp_path / "empty.csv", [*some_users(), {"user": " ", "gender": "F", "age": 1}])
    assert "empty.csv:18: user must not be empty" in error("--users", str(empty), "--user-text", "{age}")
    strangers = write_csv(tmp_path / "strangers.csv", [{"user": "nobody", "gender": "F", "age": 1}])
    line = error("--users", str(strangers), "--user-text", "{age}")
    assert "strangers.csv: lists none of the 16 users of" in line
    assert "means finished parts: rename that column" in error("--context-text", "{text}")
    assert "rename that column" in error("--context-text", "{timestamp}")
    rows = [{**row, "timestamp": "0001-01-01T00:30:00"} for row in some_rows()]
    base[3] = str(write_csv(tmp_path / "edge.csv", rows))
    line = error("--context-text", "{hour}", "--timezone", "America/New_York")
    assert "is at the edge of the years 1 to 9999" in line
    old = write_csv(tmp_path / "old.csv", [{**row, "timestamp": i} for i, row in enumerate(some_rows())])
    base[3] = str(old)
    assert "cannot be read as dates" in error("--context-text", "{hour}")


def test_context_template_is_in_the_stats(data: PreparedData) -> None:
    assert data.context_rule == {
        "text": CONTEXT,
        "max_chars": 200,
        "built_in": [
            *("weekday", "hour", "gap", "item_rate", "user_rate"),
            *("item_ctr", "user_ctr", "affinity"),
        ],
        "timezone": "Europe/Berlin",
        "per_second": 1,
    }
