"""The memory that a file costs has a bound, however it was made; beyond it, it is refused with what to do."""

from __future__ import annotations

import gzip
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dti_model import downloads
from dti_model.data import CustomFiles, DataError, PreparedData
from dti_model.data.sources import delimited, fetch, rows
from dti_model.data.sources.movielens import load_1m
from dti_model.files import checked as files
from dti_model.scorer.items import ItemError
from dti_model.scorer.lines import InputFile, fields_of
from tests.data.log_files import (
    CATALOGUE,
    LOG,
    small_log,
)
from tests.data.movielens_files import some_ratings, write_1m

RATINGS = some_ratings(num_users=4)


def test_an_item_file_takes_the_memory_of_the_texts_that_are_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """457 KB of gzip became 1 GiB: the file was read as a whole, with all of its columns."""
    content = "item,title,more\na,A,x\n" + f'z,"Z",{"x" * 990}\n' * 20_000 + "b,B,x\n"
    files_there = small_log(tmp_path, LOG, gzip.compress(content.encode()))
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
    loader = small_log(tmp_path)
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
        small_log(tmp_path, LOG + "x" * 2000).load()
    monkeypatch.undo()
    monkeypatch.setattr("dti_model.data.sources.csv_parquet.MAX_LINE_BYTES", 100)
    found = small_log(tmp_path, LOG, CATALOGUE + 'c,"' + "\n" * 200).load()
    assert found.rejected[1].first() == ["items.csv:4: a row of more than 100 characters"]


def test_parquet_that_unpacks_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "MIN_BOMB_BYTES", 1 << 20)
    path = tmp_path / "log.parquet"
    repeated = {"user": ["1"], "item": ["a"], "timestamp": [1], "liked": [1]}
    pq.write_table(pa.table({name: values * 500_000 for name, values in repeated.items()}), path)
    loader = small_log(tmp_path)
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


def test_more_rejected_rows_than_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message spoke of a `max_rejected` of 0 that nobody had given."""
    monkeypatch.setattr(rows, "MAX_LISTED", 2)
    with pytest.raises(
        DataError, match=r"log\.csv: more than 2 rows cannot be used\. .*The first: log\.csv:5: a row must"
    ):
        small_log(tmp_path, LOG + "x\n" * 3).load()


def test_files_read_as_a_whole_have_a_longest_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_folder: Path
) -> None:
    monkeypatch.setattr(files, "_MOST_BYTES", 100)
    with pytest.raises(DataError, match=r"stats\.json: cannot be read \(.* has more than 100 bytes"):
        PreparedData.open(small_folder)
    monkeypatch.setattr(delimited, "MAX_BYTES", 100)
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
