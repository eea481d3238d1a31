"""Raw files of MovieLens, and the prepared folder of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.movielens_files import some_ratings, write_1m
from tests.data.prepared_folders import prepare_small


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return write_1m(tmp_path / "raw", [*some_ratings(), (1, 7, 3, 1)])


@pytest.fixture
def out(tmp_path: Path, raw: Path) -> Path:
    prepare_small(tmp_path / "out", raw)
    return tmp_path / "out"
