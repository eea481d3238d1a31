"""Small prepared data for tests of prompts, models and runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from dti_model.data import PreparedData, prepare
from tests.model.movielens_files import some_ratings, write_1m


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder of 60 users in MovieLens-1M's format."""
    raw, out = tmp_path_factory.mktemp("raw"), tmp_path_factory.mktemp("prepared") / "data"
    prepare("ml-1m", out, write_1m(raw, some_ratings(num_users=60)), subset=True, vocab_size=400)
    return out


@pytest.fixture(scope="session")
def small_data(small_folder: Path) -> PreparedData:
    return PreparedData.open(small_folder)
