"""Damaged input files end in success or in a `DataError`, and no row is lost without a word.

DTI_FUZZ_EXAMPLES sets the number of mutated inputs per loader (default 100, for CI).
"""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dti_model.data import AmazonFiles, CustomFiles, DataError
from dti_model.data.index import index_rows
from dti_model.data.sources.movielens import load_1m, load_100k
from dti_model.data.sources.source import RawData
from tests.data.log_files import (
    write_amazon,
    write_amazon_2023,
    write_custom,
)
from tests.data.movielens_files import some_ratings, write_1m, write_100k, write_recbole

RATINGS = some_ratings(num_users=4)
FRAGMENTS = [
    '"',
    "\n",
    "\r",
    "\r\n",
    "\0",
    "\t",
    ",",
    "::",
    "|",
    "{",
    "}",
    "[",
    "]",
    " ",
    "null",
    "NaN",
    "inf",
]
FRAGMENTS += [
    "true",
    "-1",
    "1e400",
    "99999999999999999999",
    "\\ud800",
    "\ufeff",
    "🎬",
    "\x85",
    "&amp;",
    "<b>",
    "1.5",
]
FRAGMENTS += ["2018-06-17", "é"]


@dataclass(frozen=True)
class Mutation:
    """One change of a file: at a share of its length, over a number of bytes."""

    kind: str
    at: float
    length: int
    fragment: bytes

    def apply(self, content: bytes) -> bytes:
        """The changed content."""
        place = int(self.at * len(content))
        before, span, after = (
            content[:place],
            content[place : place + self.length],
            content[place + self.length :],
        )
        if self.kind == "line":  # the line at the place goes to the end
            start = content.rfind(b"\n", 0, place) + 1
            stop = content.find(b"\n", place) + 1 or len(content)
            return content[:start] + content[stop:] + content[start:stop]
        flipped = bytes(byte ^ 1 << self.length % 8 for byte in span[:1]) + span[1:]
        changed = {
            "insert": self.fragment + span,
            "replace": self.fragment,
            "delete": b"",
            "repeat": span + span,
            "flip": flipped,
        }
        return before if self.kind == "cut" else before + changed[self.kind] + after


MUTATIONS = st.builds(
    Mutation,
    st.sampled_from(["insert", "replace", "delete", "repeat", "flip", "line", "cut"]),
    st.floats(0, 1),
    st.integers(1, 30),
    st.sampled_from([*(fragment.encode() for fragment in FRAGMENTS), b"\xff", b"\xe9"]),
)


def _load_custom(folder: Path, ending: str, max_rejected: float) -> RawData:
    files = CustomFiles(
        folder / f"clicks{ending}",
        folder / f"items{ending}",
        "{title} ({year}); {genres}",
        label="liked",
        max_rejected=max_rejected,
    )
    return files.load()


def _load_amazon(folder: Path, max_rejected: float) -> RawData:
    files = AmazonFiles(
        folder / "CDs_and_Vinyl_5.json.gz", folder / "meta_CDs_and_Vinyl.json.gz", max_rejected=max_rejected
    )
    return files.load()


def _lines(path: Path) -> list[bytes]:
    content = path.read_bytes()
    if content[:2] == b"\x1f\x8b":
        content = gzip.decompress(content)
    return content.replace(b"\r\n", b"\n").split(b"\n")


def _count_csv_rows(path: Path) -> int:
    lines = (path.read_bytes() + b"\n").replace(b"\r\n", b"\n").split(b"\n")
    return sum(line != b"" for line in lines[1:])


LOADERS: dict[
    str, tuple[Callable[[Path], object], Callable[[Path, float], RawData], Callable[[Path], int]]
] = {
    "ml-100k": (
        lambda folder: write_100k(folder, RATINGS),
        lambda folder, _: load_100k(folder),
        lambda path: len(_lines(path)) - 1,
    ),
    "ml-1m": (
        lambda folder: write_1m(folder, RATINGS),
        lambda folder, _: load_1m(folder),
        lambda path: len(_lines(path)) - 1,
    ),
    "recbole": (
        lambda folder: write_recbole(folder, RATINGS),
        lambda folder, _: load_100k(folder),
        lambda path: len(_lines(path)) - 2,
    ),
    "amazon": (
        lambda folder: write_amazon(folder, RATINGS, zipped=False),
        _load_amazon,
        lambda path: sum(bool(line.strip()) for line in _lines(path)),
    ),
    "amazon, gzip": (
        lambda folder: write_amazon(folder, RATINGS),
        _load_amazon,
        lambda path: sum(bool(line.strip()) for line in _lines(path)),
    ),
    "amazon 2023": (
        lambda folder: write_amazon_2023(folder, RATINGS, zipped=False),
        lambda folder, max_rejected: AmazonFiles(
            folder / "CDs_and_Vinyl.jsonl", folder / "meta_CDs_and_Vinyl.jsonl", max_rejected=max_rejected
        ).load(),
        lambda path: sum(bool(line.strip()) for line in _lines(path)),
    ),
    "custom, csv": (
        lambda folder: write_custom(folder, ".csv", RATINGS),
        lambda folder, limit: _load_custom(folder, ".csv", limit),
        _count_csv_rows,
    ),
    "custom, parquet": (
        lambda folder: write_custom(folder, ".parquet", RATINGS),
        lambda folder, limit: _load_custom(folder, ".parquet", limit),
        lambda path: pq.read_metadata(path).num_rows,
    ),
}


@pytest.mark.parametrize("name", LOADERS)
def test_damaged_files(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    write, load, count_rows = LOADERS[name]
    folder = tmp_path_factory.mktemp("fuzz")
    write(folder)
    whole = {path: path.read_bytes() for path in sorted(folder.iterdir())}
    assert load(folder, 0).num_rows == len(RATINGS)
    outcomes = {"used": 0, "refused": 0}

    @settings(
        max_examples=int(os.environ.get("DTI_FUZZ_EXAMPLES", "100")),
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(
        which=st.sampled_from(sorted(whole)),
        mutations=st.lists(MUTATIONS, min_size=1, max_size=4),
        max_rejected=st.sampled_from([1.0, 0.05]),
        min_item_count=st.sampled_from([1, 4]),
    )
    def check(which: Path, mutations: list[Mutation], max_rejected: float, min_item_count: int) -> None:
        for path, content in whole.items():
            for mutation in mutations if path == which else []:
                content = mutation.apply(content)
            path.write_bytes(content)
        try:
            raw = load(folder, max_rejected)
            rejected = raw.num_rejected[0]
            num_rows = count_rows(raw.interactions_path)
            indexed = index_rows(raw, min_item_count)
        except DataError:
            outcomes["refused"] += 1
            return
        outcomes["used"] += 1
        assert raw.num_rows == num_rows
        assert indexed.item.size + indexed.num_pruned + raw.duplicates_dropped + rejected == num_rows

    check()
    assert min(outcomes.values()) > 0, f"one-sided: {outcomes}"
