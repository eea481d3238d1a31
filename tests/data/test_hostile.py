"""Raw files in forms that nobody promised: read as they are meant, or refused with what to do; and memory that has a bound."""

from __future__ import annotations

import csv
import errno
import gzip
import logging
import os
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dti_model import downloads
from dti_model.config import TrainConfig
from dti_model.data import AmazonFiles, CustomFiles, DataError, PreparedData, prepare
from dti_model.data.sources import fetch, lines, rows
from dti_model.data.sources.custom import parsed_times
from dti_model.data.sources.movielens import load_1m, load_100k
from dti_model.data.sources.source import RawData
from dti_model.data.tokens import train_tokenizer
from dti_model.files import checked as files
from dti_model.model.run_folder import RunExistsError
from dti_model.scorer.items import ItemError
from dti_model.scorer.lines import InputFile, fields_of
from dti_model.training.search import search
from dti_model.training.train import train
from tests.data.log_files import (
    CUSTOM_COLUMNS,
    ITEM_COLUMNS,
    custom_rows,
    item_rows,
    write_amazon,
    write_csv,
)
from tests.data.movielens_files import some_ratings, write_1m, write_100k, write_recbole

RATINGS = some_ratings(num_users=4)
LOG, CATALOGUE = "user,item,timestamp,liked\n1,a,1,1\n1,b,2,0\n2,a,3,1\n", "item,title\na,A\nb,B\n"


def custom(
    tmp_path: Path, log: str | bytes = LOG, catalogue: str | bytes = CATALOGUE, **settings: Any
) -> CustomFiles:
    for name, content in (("log.csv", log), ("items.csv", catalogue)):
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    settings = {"label": "liked", "max_rejected": 1, **settings}
    return CustomFiles(tmp_path / "log.csv", tmp_path / "items.csv", "{title}", **settings)


def _write_custom(folder: Path) -> None:
    write_csv(folder / "log.csv", CUSTOM_COLUMNS, custom_rows(RATINGS))
    write_csv(folder / "items.csv", ITEM_COLUMNS, item_rows())


SOURCES: dict[str, tuple[Callable[[Path], object], Callable[[Path], RawData]]] = {
    "ml-100k": (lambda folder: write_100k(folder, RATINGS), load_100k),
    "ml-1m": (lambda folder: write_1m(folder, RATINGS), load_1m),
    "recbole": (lambda folder: write_recbole(folder, RATINGS), load_100k),
    "amazon": (
        lambda folder: write_amazon(folder, RATINGS, zipped=False),
        lambda folder: AmazonFiles(
            folder / "CDs_and_Vinyl_5.json.gz", folder / "meta_CDs_and_Vinyl.json.gz"
        ).load(),
    ),
    "custom": (
        _write_custom,
        lambda folder: CustomFiles(folder / "log.csv", folder / "items.csv", "{title}", label="liked").load(),
    ),
}


@pytest.fixture(params=SOURCES)
def source(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Callable[[Path], RawData]]:
    """A folder with the files of a source, and its loader."""
    write, load = SOURCES[request.param]
    write(tmp_path)
    return tmp_path, load


def changed(folder: Path, change: Callable[[bytes], bytes]) -> Iterator[Path]:
    """Every file by turns, changed and then as it was."""
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        path.write_bytes(change(content))
        yield path
        path.write_bytes(content)


def test_a_byte_order_mark_is_no_data(source: tuple[Path, Callable[[Path], RawData]]) -> None:
    """Amazon's first row was rejected, and MovieLens' first movie lost its title without a word."""
    folder, load = source
    whole = load(folder)
    for path in changed(folder, lambda content: b"\xef\xbb\xbf" + content):
        found = load(folder)
        assert found.rows().equals(whole.rows()), path
        assert found.items.equals(whole.items), path
        assert found.num_rejected == (0, 0)


FORMS = {
    "UTF-16": (lambda content: content.decode("latin-1").encode("utf-16"), "not UTF-8 but UTF-16"),
    "UTF-16 without a mark": (lambda content: content.decode("latin-1").encode("utf-16-le"), "not UTF-8 but UTF-16"),
    "UTF-32": (lambda content: content.decode("latin-1").encode("utf-32-be"), "not UTF-8 but UTF-16, UTF-32"),
    "carriage returns": (lambda content: content.replace(b"\n", b"\r"), "end with a carriage return alone. Save"),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_other_encodings_and_line_ends_are_named(
    source: tuple[Path, Callable[[Path], RawData]], form: str
) -> None:
    """Messages were about missing columns, malformed JSON or a file that is cut short."""
    folder, load = source
    change, message = FORMS[form]
    for path in changed(folder, change):
        with pytest.raises(DataError, match=rf"{path.name}:1: .*{message}"):
            load(folder)


def test_the_ids_of_movies_are_numbers(tmp_path: Path) -> None:
    """One with a NUL was another movie, so that the real one had no title."""
    write_100k(tmp_path, RATINGS)
    path = tmp_path / "u.item"
    content = path.read_bytes()
    path.write_bytes(b"00" + content)
    assert load_100k(tmp_path).items["item"][0] == content.split(b"|")[0].decode()
    path.write_bytes(b"\0" + content)
    with pytest.raises(DataError, match=r"u\.item:1: (not UTF-8|item must be an integer)"):
        load_100k(tmp_path)
    path.write_bytes(content.replace(b"\n", b"\nx", 1))
    with pytest.raises(DataError, match=r"u\.item:2: item must be an integer of at least 1"):
        load_100k(tmp_path)


@pytest.mark.parametrize("quote", ["", '"'])
def test_the_longest_value_is_the_same_in_both_files(tmp_path: Path, quote: str) -> None:
    """An item's was rejected as "field larger than field limit", an interaction's was read."""
    most = csv.field_size_limit()
    fits, longer = (f"{quote}{'x' * length}{quote}" for length in (most - 20, most + 1))
    found = custom(
        tmp_path, f"{LOG}{fits},a,4,1\n{longer},a,5,1\n", f"{CATALOGUE}c,{fits}\nd,{longer}\n"
    ).load()
    assert found.num_rejected == (1, 1)
    assert found.rejected is not None
    for rejected, line in zip(found.rejected, (6, 5)):
        assert rejected.first()[0].endswith(
            f":{line}: a value of more than 131,072 characters, or a quoted value that does not end"
        )


def test_carriage_returns_and_blank_headers_are_named(tmp_path: Path) -> None:
    found = custom(tmp_path, LOG + '"3",a\rb,1,1\n').load()
    assert found.rejected is not None
    assert found.rejected[0].first() == ["log.csv:5: a carriage return in a value without quotes"]
    for blank in ("\n", "  \r\n"):
        with pytest.raises(
            DataError, match=r"log\.csv:1: the first line must name the columns, but is blank"
        ):
            custom(tmp_path, blank + LOG).load()


def test_a_row_over_lines_may_go_on_in_the_next_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bad row ends at its first line, wherever a batch ends, and the line numbers stay."""
    catalogue = 'item,title\n\na,"A\n\n1"\nb,"B""\n2",3\nx,"never\nb,"B"\nc,"C\n'
    for batch_bytes in range(1, 40):
        monkeypatch.setattr(rows, "BATCH_BYTES", batch_bytes)
        found = custom(tmp_path, LOG, catalogue).load()
        assert dict(found.items.select("item", "text").iter_rows()) == {"a": "A 1", "b": "B"}
        assert found.rejected is not None
        assert found.rejected[1].frame()["line"].to_list() == [6, 8, 10]
        assert found.num_listed == 5


def test_an_item_file_takes_the_memory_of_the_texts_that_are_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """457 KB of gzip became 1 GiB: the file was read as a whole, with all of its columns."""
    content = "item,title,more\na,A,x\n" + f'z,"Z",{"x" * 990}\n' * 20_000 + "b,B,x\n"
    files_there = custom(tmp_path, LOG, gzip.compress(content.encode()))
    monkeypatch.setattr(rows, "BATCH_BYTES", 1 << 18)
    tracemalloc.start()
    try:
        found = files_there.load()
        assert tracemalloc.get_traced_memory()[1] < len(content) / 4
    finally:
        tracemalloc.stop()
    assert found.items["text"].to_list() == ["A", "B"]
    assert (found.num_listed, found.repeated_items) == (20_002, 0)


@pytest.mark.parametrize("name", ["log.csv", "items.csv"])
def test_a_file_that_unpacks_without_end_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The process was killed for its memory."""
    loader = custom(tmp_path)
    path, whole = tmp_path / name, (tmp_path / name).read_bytes()
    monkeypatch.setattr(rows, "MIN_BOMB_BYTES", 1 << 17)
    monkeypatch.setattr(rows, "BATCH_BYTES", 1 << 16)
    path.write_bytes(gzip.compress(whole + b"\n" * (1 << 19)))
    with pytest.raises(
        DataError,
        match=rf"{name}: [\d,]+ bytes unpack to [\d,]+ or more, which no log does. If that is meant",
    ):
        loader.load()
    path.write_bytes(whole + b"\n" * (1 << 19))  # nobody hides what is not compressed
    assert loader.load().num_rows == 3


def test_a_line_and_a_row_have_a_longest_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "MAX_LINE_BYTES", 1000)
    monkeypatch.setattr(rows, "BATCH_BYTES", 200)
    with pytest.raises(DataError, match=r"log\.csv:5: a line of more than 1,000 bytes. Shorten it, or leave"):
        custom(tmp_path, LOG + "x" * 2000).load()
    monkeypatch.undo()
    monkeypatch.setattr("dti_model.data.sources.tables.MAX_LINE_BYTES", 100)
    found = custom(tmp_path, LOG, CATALOGUE + 'c,"' + "\n" * 200).load()
    assert found.rejected is not None
    assert found.rejected[1].first() == ["items.csv:4: a row of more than 100 characters"]


def test_parquet_that_unpacks_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "MIN_BOMB_BYTES", 1 << 20)
    path = tmp_path / "log.parquet"
    repeated = {"user": ["1"], "item": ["a"], "timestamp": [1], "liked": [1]}
    pq.write_table(pa.table({name: values * 500_000 for name, values in repeated.items()}), path)
    loader = custom(tmp_path)
    with pytest.raises(DataError, match=r"log\.parquet: [\d,]+ bytes unpack to 10,000,000 or more"):
        CustomFiles(path, loader.items, "{title}", label="liked").load()
    long = pa.table(
        {"item": ["a", "b"], "title": ["x" * (1 << 21), "y" * (1 << 21)], "more": ["z" * 9, "z" * 9]}
    )
    pq.write_table(long, tmp_path / "items.parquet", compression="zstd", use_dictionary=False)
    with pytest.raises(DataError, match=r"items\.parquet: [\d,]+ bytes unpack to"):
        CustomFiles(loader.interactions, tmp_path / "items.parquet", "{title}", label="liked").load()
    assert (
        CustomFiles(loader.interactions, tmp_path / "items.parquet", "{more}", label="liked")
        .load()
        .num_listed
        == 2
    )


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("2020-01-01T12:00:00+05:30", -19_800),
        ("2020-01-01T12:00:00+0530", -19_800),
        ("2020-01-01 12:00:00+05", -18_000),
        ("2020-01-01 12:00:00 -03:30", 12_600),
        ("2020-01-01 12:00+05", -18_000),
        ("2020-01-01t12:00:00z", 0),
        ("2020-01-01 12:00:00 UTC", 0),
        ("2020-01-01T12:00:00.0 GMT", 0),
        ("2020-01-01T12:00:00 +05:30", -19_800),
    ],
)
def test_zones_as_databases_write_them(text: str, seconds: int) -> None:
    """Hours alone, a blank before the zone, and small letters were no times."""
    noon = 1_577_880_000
    times, unit = parsed_times(pl.Series([text]), None)
    assert (times.to_list(), unit) == ([(noon + seconds) * 1_000_000], "microseconds")


def test_rows_without_a_time_do_not_decide_what_times_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the first batch had none, times had to be integers in the whole file."""
    monkeypatch.setattr(rows, "BATCH_BYTES", 60)
    log = "user,item,timestamp,liked\n" + "1,a,soon,1\n" * 10 + "1,a,2020-01-01,1\n1,a,2020-01-02,1\n" * 5
    found = custom(tmp_path, log).load()
    assert found.interactions.height == 10
    assert found.timestamp_unit == "microseconds"
    assert found.rejected is not None
    assert found.rejected[0].first()[0] == (
        "log.csv:2: timestamp must be an integer, a number or an ISO date-time, but is soon"
    )


FAR = {
    "milliseconds": pa.array([2**60, 5, -(2**60)]).cast(pa.timestamp("ms")),
    "a zone": pa.array([2**62, 5, -(2**62)]).cast(pa.timestamp("us", "+05:30")),
    "days": pa.array([2**31 - 1, 5, -(2**31)], pa.int32()).cast(pa.date32()),
}


@pytest.mark.parametrize("kind", FAR)
def test_times_beyond_the_year_9999_are_rejected(tmp_path: Path, kind: str) -> None:
    """Polars panicked where it showed one, and multiplied others beyond 64 bits into wrong times."""
    pq.write_table(
        pa.table({"user": [1, 1, 2], "item": ["a", "b", "a"], "timestamp": FAR[kind], "liked": [1, 0, 1]}),
        tmp_path / "log.parquet",
    )
    pq.write_table(
        pa.table({"item": ["a", "b"], "title": [[FAR[kind][0]], [FAR[kind][1], FAR[kind][2]]]}),
        tmp_path / "items.parquet",
    )
    found = CustomFiles(
        tmp_path / "log.parquet", tmp_path / "items.parquet", "{title}", label="liked", max_rejected=1
    ).load()
    assert found.num_rejected[0] == 2
    assert found.rejected is not None
    assert (
        found.rejected[0]
        .first()[0]
        .endswith("row 1: timestamp must be an ISO date-time, but is empty, or not of the years 1 to 9999")
    )
    assert found.items["titled"].to_list() == [True]


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_what_is_no_file_is_refused(tmp_path: Path, make: Callable[[Path], object]) -> None:
    """A named pipe in the place of Amazon's reviews waited for ever."""
    make(tmp_path / "reviews.json")
    with pytest.raises(DataError, match=r"reviews\.json: not a file$"):
        AmazonFiles(tmp_path / "reviews.json", tmp_path / "meta.json").load()
    with pytest.raises(DataError, match=r"meta\.json: no such file$"):
        list(rows.read_lines(tmp_path / "meta.json"))
    with pytest.raises(DataError, match=r"x: cannot be read \(File name too long\)$"):
        list(rows.read_lines(tmp_path / ("x" * 300)))


def test_more_rejected_rows_than_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message spoke of a `max_rejected` of 0 that nobody had given."""
    monkeypatch.setattr(rows, "MAX_LISTED", 2)
    with pytest.raises(
        DataError, match=r"log\.csv: more than 2 rows cannot be used\. .*The first: log\.csv:5: a row must"
    ):
        custom(tmp_path, LOG + "x\n" * 3).load()


def test_files_read_as_a_whole_have_a_longest_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_folder: Path
) -> None:
    monkeypatch.setattr(files, "_MOST_BYTES", 100)
    with pytest.raises(DataError, match=r"stats\.json: cannot be read \(.* has more than 100 bytes"):
        PreparedData.open(small_folder)
    monkeypatch.setattr(lines, "MAX_BYTES", 100)
    write_1m(tmp_path, RATINGS)
    with pytest.raises(
        DataError, match=r"ratings\.dat: more than 100 bytes, which no file of this data set has"
    ):
        load_1m(tmp_path)


def test_a_long_line_of_requests_is_one_bad_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was read as a whole, however long."""
    monkeypatch.setattr("dti_model.scorer.lines.MAX_LINE_BYTES", 50)
    for length in (51, 100, 101, 102, 153, 1000):
        (tmp_path / "in.jsonl").write_bytes(b'{"user": "1"}\n' + b" " * length + b'\n{"user": "2"}\n')
        with InputFile(tmp_path / "in.jsonl") as opened:
            found = list(opened.lines(0))
        assert [number for number, _ in found] == [1, 2, 3]
        assert fields_of(found[2][1]) == {"user": "2"}
        assert len(found[1][1]) <= 51
        with pytest.raises(ItemError, match="a line of more than 50 bytes: put its candidates into several"):
            fields_of(found[1][1])


def test_a_download_has_a_longest_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "zeros").write_bytes(b"\0" * 1000)
    monkeypatch.setattr(fetch, "GROUPLENS_URL", f"file://{tmp_path}/zeros")
    monkeypatch.setattr(downloads, "MAX_BYTES", 100)
    with pytest.raises(DataError, match=r"/zeros sends more than 100 bytes"):
        fetch.fetch("ml-1m", tmp_path)


TOKENIZER = train_tokenizer(["abc"], 300)


def test_what_is_in_the_way_of_cached_tokens_is_named(tmp_path: Path) -> None:
    """The way out was to make room on the disk."""
    prepare(custom(tmp_path), tmp_path / "out", min_context=0)
    data = PreparedData.open(tmp_path / "out")
    before = set((tmp_path / "out" / "tokens").iterdir())
    data.token_ids(TOKENIZER)
    (cached,) = set((tmp_path / "out" / "tokens").iterdir()) - before
    cached.unlink()
    cached.mkdir()
    with pytest.raises(
        DataError, match=rf"tokens/{cached.name}: cannot write the token cache \(Is a dir.* in the way"
    ):
        data.token_ids(TOKENIZER)


def test_read_only_data_serves_another_tokenizer_and_says_what_that_costs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Every process made the tokens anew, without a word. Root may write anywhere, so the refusal is made up."""
    prepare(custom(tmp_path), tmp_path / "out", min_context=0)
    data, really = PreparedData.open(tmp_path / "out"), os.open

    def refused(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
        if flags & os.O_CREAT:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return really(path, flags, *arguments, **options)

    monkeypatch.setattr(os, "open", refused)
    with caplog.at_level(logging.WARNING):
        offsets, _ = data.token_ids(TOKENIZER)
    assert offsets.size == data.num_items + 1
    assert (
        "tokens may not be written: every process makes the token ids of this tokenizer anew" in caplog.text
    )


def test_nothing_is_made_inside_another_folder_s_own_files(
    small_folder: Path, run_folder: Path, tmp_path: Path
) -> None:
    """It went with the next run, or was taken for a part of the model or the tokenizer."""
    for place in (
        small_folder / "tokenizer" / "new",
        run_folder / "model" / "new",
        run_folder / "checkpoints",
    ):
        with pytest.raises(DataError, match=r"is a place of .*'s own files: choose another name"):
            prepare(custom(tmp_path), place, min_context=0)
        config = TrainConfig(data=small_folder, out=place)
        with pytest.raises(RunExistsError, match=r"is a place of .*'s own files: choose another name"):
            train(config)
        with pytest.raises(RunExistsError, match=r"is a place of .*'s own files: choose another name"):
            search(config, {"window": [3]}, [0])
    assert not (small_folder / "tokenizer" / "new").exists()
