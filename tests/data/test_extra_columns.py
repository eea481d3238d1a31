"""Extra columns of a log on their way in: numbers of distinct values, beside their rows through pruning and sorting."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from dti_model.data.index import index_rows
from dti_model.data.sources import RawData
from dti_model.data.sources.item_frames import ItemTexts
from dti_model.data.sources.rows import Interactions, Rejected
from dti_model.data.texts import Template

# user, item, time, and two extra columns, of which one has the name of a column of every log.
ROWS = [("2", "b", 9, "web", "x"), ("1", "rare", 1, "tv", "y"), ("1", "b", 5, None, "x"), ("1", "a", 3, "web", "z"), ("2", "a", 9, "app", "x")]  # fmt: skip


def raw_data(batch: int) -> RawData:
    interactions = Interactions()
    for start in range(0, len(ROWS), batch):
        users, items, times, devices, others = map(list, zip(*ROWS[start : start + batch]))
        extra = {"device": pl.Series(devices, dtype=pl.String), "user": pl.Series(others)}
        ratings = pl.Series([float(time) for time in times])
        interactions.add(users, items, pl.Series(times), ratings, extra)
    texts = ItemTexts(interactions.items.names(), Template("{title}"))
    texts.add(["a", "b", "rare"], {"title": ["A", "B", "C"]})
    rejected = Rejected(Path(__file__)), Rejected(Path(__file__))
    return RawData(interactions, texts, rejected, len(ROWS), 3, threshold=5, min_item_count=1)


@pytest.mark.parametrize("batch", [5, 2])
def test_extra_values_stay_beside_their_rows(batch: int) -> None:
    indexed = index_rows(raw_data(batch), min_item_count=2)
    assert indexed.item.tolist() == [0, 1, 0, 1]
    assert indexed.timestamp.tolist() == [3, 5, 9, 9]
    found = {name: [values[int(code)] for code in codes] for name, (codes, values) in indexed.extra.items()}
    assert found == {"device": ["web", "", "app", "web"], "user": ["z", "x", "x", "x"]}
    assert all(codes.dtype == np.int32 for codes, _ in indexed.extra.values())
    assert sorted(indexed.extra["device"][1]) == ["", "app", "tv", "web"]


def test_an_extra_column_may_have_the_name_of_another() -> None:
    raw = raw_data(5)
    assert list(raw.extra) == ["device", "user"]
    assert raw.rows().columns[:4] == ["user", "item", "timestamp", "rating"]
    assert raw.rows()["user"].to_list() == ["2", "1", "1", "1", "2"]
