"""Small prepared data for tests of prompts, models and runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from dti_model.data import PreparedData, prepare
from dti_model.scorer import Scorer
from dti_model.scorer.file import CHUNK_LINES
from tests.data.movielens_files import some_ratings, write_1m
from tests.scorer.scoring_jobs import requests, score, untrained_run, write_jsonl


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder of 60 users in MovieLens-1M's format."""
    raw, out = tmp_path_factory.mktemp("raw"), tmp_path_factory.mktemp("prepared") / "data"
    prepare("ml-1m", out, write_1m(raw, some_ratings(num_users=60)), subset=True, vocab_size=400)
    return out


@pytest.fixture(scope="session")
def small_data(small_folder: Path) -> PreparedData:
    return PreparedData.open(small_folder)


@pytest.fixture(scope="session")
def run_folder(small_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run as `dti train` leaves it, untrained."""
    return untrained_run(tmp_path_factory.mktemp("runs") / "run", small_folder)


@pytest.fixture(scope="session")
def run_scorer(run_folder: Path) -> Scorer:
    """Of `run_folder`."""
    return Scorer.from_run(run_folder, device="cpu")


@pytest.fixture
def requests_file(tmp_path: Path) -> Path:
    """Four chunks of requests, the last one short."""
    write_jsonl(tmp_path / "in.jsonl", requests(3 * CHUNK_LINES + 5))
    return tmp_path / "in.jsonl"


@pytest.fixture
def whole_scores(run_scorer: Scorer, requests_file: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What an unbroken job writes."""
    output = tmp_path_factory.mktemp("whole") / "out.jsonl"
    score(run_scorer, requests_file, output)
    return output.read_bytes()
