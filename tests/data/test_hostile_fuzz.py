"""Files made at random, whole and broken, of every source: prepared, or a `DataError`; and every row is kept or counted.

DTI_FUZZ_EXAMPLES sets the number of inputs per surface (default 40, for CI).
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dti_model.data import AmazonFiles, CustomFiles, DataError
from dti_model.data.index import index_rows
from dti_model.data.sources import rows
from dti_model.data.sources.movielens import load_1m, load_100k
from dti_model.data.sources.source import RawData
from tests.data.movielens_files import some_ratings, write_1m, write_100k, write_recbole

EXAMPLES = settings(
    max_examples=int(os.environ.get("DTI_FUZZ_EXAMPLES", "40")),
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
SHARE = st.sampled_from([1.0, 1.0, 0.3])


def spelled(values: list[Any]) -> st.SearchStrategy[str]:
    """Values as somebody may write them."""
    return st.sampled_from([str(value) for value in values])


IDS = spelled(["1", "2", "i1", " 3 ", "", "01", 2**64, "a\0b", "é", "x" * 300, "NaN", "\ufeff1", "-0", "1.0"])
TIMES = spelled(
    [0, 5, -3, 2**63 - 1, 2**63, -(2**63), 1.5, "1e3", "nan", "inf", "", "soon", "٣", "9e12", "1e13"]
)
DATES = spelled(
    [
        "2020-01-01",
        "2020-01-01T12:00:00+05:30",
        "2020-01-01 12:00+05",
        "2020-01-01t12:00:00z",
        "2020-01-01 12:00:00 UTC",
        "0001-01-01T00:00:00+14:00",
        "9999-12-31T23:59:59.999999999-12:00",
        "2020-13-01",
        "99999-01-01",
    ]
)
LABELS = spelled([0, 1, "yes", "No", "TRUE", 2, "", "nan", "1.0", -0.0, "1e400"])
TITLES = spelled(
    ["A", "", 'say "x"', "two\nlines", "a,b\tc", "&lt;b&gt;", "\r", "\0", "é" * 50, "<" * 40, "x" * 140_000]
)


def csv_value(value: str, style: int) -> str:
    """A value of a CSV file: quoted, plain although it needs quotes, or with a quote too many."""
    quoted = '"' + value.replace('"', '""') + '"'
    return (quoted, value, quoted, f'"{value}')[style]


def csv_table(*columns: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """Lines of such values, now and then with a value too many or too few."""
    styles = st.sampled_from([0, 0, 0, 0, 1, 1, 1, 2, 2, 3])
    cells = st.tuples(*(st.builds(csv_value, column, styles) for column in columns))
    row = st.builds(
        lambda cells, cut: ",".join(cells[: len(cells) + cut] + ("9",) * cut),
        cells,
        st.sampled_from([0] * 9 + [1, -1]),
    )
    return st.lists(row, max_size=8).map("\n".join)


def json_lines(*fields: tuple[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[str]:
    """Objects, now and then without a field, beside lines that are none."""
    objects = st.fixed_dictionaries({}, optional={}) | st.fixed_dictionaries(dict(fields))
    broken = st.sampled_from(
        ["", " ", "{", "null", "[]", "\0", "\ufeff{}", '{"asin":"1","asin":"2"}', "[" * 2000]
    )
    return st.lists(objects.map(json.dumps) | objects.map(json.dumps) | broken, max_size=10).map("\n".join)


ENCODINGS: list[Callable[[str], bytes]] = [
    lambda text: text.encode(),
    lambda text: text.encode(),
    lambda text: text.encode(),
    lambda text: b"\xef\xbb\xbf" + text.encode(),
    lambda text: text.encode("utf-16"),
    lambda text: text.encode("utf-16-be"),
    lambda text: text.encode("utf-32"),
    lambda text: text.encode("latin-1", "replace"),
    lambda text: text.replace("\n", "\r\n").encode(),
    lambda text: text.replace("\n", "\r").encode(),
]
PACKINGS: list[Callable[[bytes], bytes]] = [
    bytes,
    bytes,
    gzip.compress,
    lambda content: gzip.compress(content[:20]) + gzip.compress(content[20:]),
    lambda content: gzip.compress(content)[:-6],
    lambda content: gzip.compress(content) + b"more",
    lambda content: gzip.compress(gzip.compress(content)),
    lambda content: content + b"\n",
    lambda content: content[:-1],
    lambda content: b"",
]
CONTENTS = st.tuples(st.sampled_from(ENCODINGS), st.sampled_from(PACKINGS))


def in_bytes(text: str, form: tuple[Callable[[str], bytes], Callable[[bytes], bytes]]) -> bytes:
    return form[1](form[0](text))


def check(load: Callable[[], RawData]) -> bool:
    """Whether files were read; every row of theirs is kept or counted."""
    problem = ""
    try:
        raw = load()
        num_rows, num_rejected = raw.num_rows, raw.num_rejected[0]
        indexed = index_rows(raw, 1)
    except DataError as error:
        problem = str(error)
    if problem:
        assert problem.startswith(
            ("/", "text template")
        )  # it names the file, or the template whose columns are missing
        return False
    assert indexed.item.size + num_rejected == num_rows
    return True


def both_ways(run: Callable[[], None], outcomes: list[bool]) -> None:
    run()
    assert {True, False} <= set(outcomes), "one-sided"


@pytest.mark.parametrize("batch_bytes", [rows.BATCH_BYTES, 50])
def test_csv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_bytes: int) -> None:
    monkeypatch.setattr(rows, "BATCH_BYTES", batch_bytes)
    clicks, items = tmp_path / "clicks.csv", tmp_path / "items.csv"
    outcomes: list[bool] = []

    @EXAMPLES
    @given(
        csv_table(IDS, IDS, TIMES, LABELS) | csv_table(IDS, IDS, DATES, LABELS),
        csv_table(IDS, TITLES),
        CONTENTS,
        CONTENTS,
        SHARE,
    )
    def run(log: str, listed: str, form: Any, other_form: Any, limit: float) -> None:
        clicks.write_bytes(in_bytes(f"user,item,timestamp,liked\n{log}", form))
        items.write_bytes(in_bytes(f"item,title\ni1,B\n1,A\n{listed}", other_form))
        files = CustomFiles(clicks, items, "{title}", label="liked", max_rejected=limit)
        outcomes.append(check(files.load))

    both_ways(run, outcomes)


def test_amazon(tmp_path: Path) -> None:
    reviews, meta = tmp_path / "reviews.json", tmp_path / "meta.json"
    outcomes: list[bool] = []
    numbers = st.sampled_from(
        [1, 5, 5.0, 4.5, -1, 0, 2**62, 2**63, 2**70, 1e300, float("nan"), None, "5", True]
    )
    ids = IDS | st.sampled_from([1, None, "\ud800"])
    texts = TITLES | st.sampled_from([None, 5, ["a"], "\ud800", "var getTime()"])
    review = json_lines(("reviewerID", ids), ("asin", ids), ("overall", numbers), ("unixReviewTime", numbers))
    product = json_lines(
        ("asin", ids), ("title", texts), ("brand", texts), ("category", st.lists(texts, max_size=4) | texts)
    )
    good = '{"reviewerID":"r","asin":"1","overall":5,"unixReviewTime":3}\n'

    @EXAMPLES
    @given(review, product, CONTENTS, CONTENTS, SHARE)
    def run(log: str, listed: str, form: Any, other_form: Any, limit: float) -> None:
        reviews.write_bytes(in_bytes(good + log, form))
        meta.write_bytes(in_bytes('{"asin":"1","title":"A"}\n' + listed, other_form))
        outcomes.append(check(AmazonFiles(reviews, meta, max_rejected=limit).load))

    both_ways(run, outcomes)


MOVIELENS = {
    "ml-100k": (write_100k, load_100k, ("u.data", "u.item"), "\t|"),
    "ml-1m": (write_1m, load_1m, ("ratings.dat", "movies.dat"), ":"),
    "recbole": (write_recbole, load_100k, ("ml-100k.inter", "ml-100k.item"), "\t"),
}


@pytest.mark.parametrize("name", MOVIELENS)
def test_movielens(tmp_path: Path, name: str) -> None:
    """Fields in the place of others, in another encoding; a line is never skipped."""
    write, load, files, separators = MOVIELENS[name]
    write(tmp_path, some_ratings(num_users=3))
    whole = {file: (tmp_path / file).read_bytes().decode("latin-1") for file in files}
    outcomes: list[bool] = []

    @EXAMPLES
    @given(
        st.sampled_from(files),
        st.floats(0, 0.999),
        st.integers(0, 23),
        IDS | TIMES | TITLES.map(lambda title: title[:200]) | st.sampled_from(separators),
        st.tuples(
            st.sampled_from(ENCODINGS[:4] + ENCODINGS[8:]), st.sampled_from(PACKINGS[:2] + PACKINGS[7:])
        )
        | CONTENTS,
    )
    def run(file: str, at: float, field: int, value: str, form: Any) -> None:
        for other, text in whole.items():
            (tmp_path / other).write_bytes(text.encode("latin-1"))
        lines = whole[file].split("\n")
        place = int(at * len(lines))
        separator = next(sign for sign in ("::", "\t", "|") if sign in lines[0])
        fields = lines[place].split(separator)
        fields[field % len(fields)] = value
        lines[place] = separator.join(fields)
        (tmp_path / file).write_bytes(in_bytes("\n".join(lines), form))
        outcomes.append(check(lambda: load(tmp_path)))

    both_ways(run, outcomes)


KINDS: list[pa.DataType] = [
    pa.string(), pa.large_string(), pa.int8(), pa.int64(), pa.uint64(), pa.float32(), pa.float64(), pa.bool_(), pa.date32(),
    pa.date64(), pa.timestamp("ms"), pa.timestamp("us", "+05:30"), pa.timestamp("ns", "Europe/Berlin"), pa.timestamp("s"),
    pa.duration("us"), pa.time64("us"), pa.binary(), pa.binary(3), pa.null(), pa.decimal128(30, 3), pa.decimal256(60, 0),
    pa.struct([("a", pa.int64())]), pa.map_(pa.string(), pa.int64()), pa.list_(pa.int64(), 2),
]  # fmt: skip
KINDS += [
    pa.list_(kind)
    for kind in (pa.string(), pa.float64(), pa.timestamp("us"), pa.date32(), pa.list_(pa.int8()))
]
NUMBERS = st.sampled_from([0, 1, 2, -1, 127, 2**31 - 1, -(2**31), 2**62, 2**63 - 1, -(2**63), 10**15])


def some_array(kind: pa.DataType, number: int, size: int) -> pa.Array:
    """Values near a number, with a null; None: this type has none such."""
    numbers = [number + i if abs(number) < 2**60 else number for i in range(size - 1)] + [None]
    if pa.types.is_nested(kind):
        values = {"struct": [{"a": 1}], "map": [[("a", 1)]], "fixed_size_list": [[1, 2]]}.get(
            str(kind).split("<")[0]
        )
        if values is not None:
            return pa.array(values * size, kind)
        inner = (
            some_array(kind.value_type, number, size)
            if not pa.types.is_nested(kind.value_type)
            else pa.array([[1]] * size, kind.value_type)
        )
        return pa.ListArray.from_arrays(pa.array(range(size + 1), pa.int32()), inner)
    if pa.types.is_date32(kind):
        return pa.array(
            [None if n is None else max(-(2**31), min(n, 2**31 - 1)) for n in numbers], pa.int32()
        ).cast(kind)
    if pa.types.is_temporal(kind):
        return pa.array(numbers, pa.int64()).cast(kind)
    if pa.types.is_null(kind):
        return pa.nulls(size)
    texts = pa.array([None if n is None else str(n)[-3:].rjust(3, "0") for n in numbers])
    if kind == pa.binary() or pa.types.is_fixed_size_binary(kind):
        return texts.cast(pa.binary()).cast(kind)
    if pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_decimal(kind):
        small = pa.array([None if n is None else abs(n) % 100 for n in numbers], pa.int64())
        return pa.array(numbers, kind) if kind == pa.int64() else small.cast(kind)
    return pa.array([None if n is None else float(n) for n in numbers]).cast(kind)


def test_parquet(tmp_path: Path) -> None:
    """A date far beyond the year 9999 ended in a panic of Polars, which no `except Exception` sees."""
    clicks, items = tmp_path / "clicks.parquet", tmp_path / "items.parquet"
    outcomes: list[bool] = []
    column = st.tuples(st.sampled_from(KINDS), NUMBERS, st.booleans())
    plain = {"user": "string", "item": "int64", "timestamp": "int64", "liked": "bool", "title": "string"}

    @EXAMPLES
    @given(
        st.dictionaries(st.sampled_from(sorted(plain)), column, max_size=3),
        st.integers(1, 4),
        st.sampled_from([None, None, None, 1, 40, -9]),
        st.sampled_from(["snappy", "zstd", "gzip"]),
    )
    def run(others: dict[str, Any], size: int, cut: int | None, compression: str) -> None:
        arrays = {}
        for name, usual in plain.items():
            kind, number, packed = others.get(name, (pa.type_for_alias(usual), 1, False))
            array = some_array(kind, number, size)
            is_packed = packed and not pa.types.is_nested(kind) and not pa.types.is_null(kind)
            arrays[name] = array.dictionary_encode() if is_packed else array
        try:
            for path, names in ((clicks, ("user", "item", "timestamp", "liked")), (items, ("item", "title"))):
                table = pa.table({name: arrays[name] for name in names})
                pq.write_table(table, path, compression=compression, row_group_size=2)
        except pa.ArrowException:
            return  # no such file can be made
        if cut is not None:
            clicks.write_bytes(clicks.read_bytes()[:cut])
        outcomes.append(
            check(CustomFiles(clicks, items, "{title}; {item}", label="liked", max_rejected=1).load)
        )

    both_ways(run, outcomes)
