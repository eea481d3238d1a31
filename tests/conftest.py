"""Paths, real data and small runs for the whole suite. The imports of fixtures wait for their use: kernels are tested without them."""

from __future__ import annotations

import os
import random
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from dti_model.data import PreparedData
    from dti_model.scorer import Scorer

# One thread a process, unless asked otherwise: tests run beside each other (pytest -n), and tiny tensors only lose time to more.
torch.set_num_threads(int(os.environ.get("DTI_TEST_THREADS", "1")))

ROOT = Path(__file__).resolve().parents[1]
# What torch.compile takes by itself is g++.
needs_torch_compile = pytest.mark.skipif(
    shutil.which(shlex.split(os.environ.get("CXX", "g++"))[0]) is None,
    reason="no C++ compiler for torch.compile",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Any order of tests must do; the seed of a red one is on its command line."""
    parser.addoption("--order-seed", type=int, help="run the tests in a random order that follows this seed")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Shuffles files, and the tests of each: fixtures of a file are made once all the same."""
    seed = config.getoption("--order-seed")
    if seed is None:
        return
    rng = random.Random(seed)
    by_file: dict[Path, list[pytest.Item]] = {}
    for item in items:
        by_file.setdefault(item.path, []).append(item)
    files = list(by_file.values())
    rng.shuffle(files)
    for tests in files:
        rng.shuffle(tests)
    items[:] = [item for tests in files for item in tests]


@pytest.fixture(scope="session", autouse=True)
def processor_without_bfloat16() -> Iterator[None]:
    """Precision `auto` is float32 in tests, on every machine, unless they make up a processor that knows bfloat16."""
    from dti_model import precision

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision, "_CPU_INFO", Path(os.devnull))
        yield


@pytest.fixture(scope="session")
def real_data_dir() -> Path:
    """Folder with real data sets (`ml-100k/`, ...): DTI_DATA_DIR, or `../shared/data` beside the checkout; else skip."""
    for candidate in (os.environ.get("DTI_DATA_DIR"), ROOT.parent / "shared" / "data"):
        if candidate and Path(candidate).is_dir():
            return Path(candidate)
    pytest.skip("no real data: set DTI_DATA_DIR to a folder with ml-100k/")


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder of 60 users in MovieLens-1M's format."""
    from dti_model.data import prepare
    from tests.data.movielens_files import some_ratings, write_1m

    raw, out = tmp_path_factory.mktemp("raw"), tmp_path_factory.mktemp("prepared") / "data"
    prepare("ml-1m", out, write_1m(raw, some_ratings(num_users=60)), subset=True, vocab_size=400)
    return out


@pytest.fixture(scope="session")
def small_data(small_folder: Path) -> PreparedData:
    from dti_model.data import PreparedData

    return PreparedData.open(small_folder)


@pytest.fixture(scope="session")
def run_folder(small_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run as `dti train` leaves it, untrained."""
    from tests.scorer.scoring_jobs import untrained_run

    return untrained_run(tmp_path_factory.mktemp("runs") / "run", small_folder)


@pytest.fixture(scope="session")
def run_scorer(run_folder: Path) -> Scorer:
    """Of `run_folder`."""
    from dti_model.scorer import Scorer

    return Scorer.from_run(run_folder, device="cpu")


@pytest.fixture
def requests_file(tmp_path: Path) -> Path:
    """Four chunks of requests, the last one short."""
    from dti_model.scorer.file import CHUNK_LINES
    from tests.scorer.scoring_jobs import requests, write_jsonl

    write_jsonl(tmp_path / "in.jsonl", requests(3 * CHUNK_LINES + 5))
    return tmp_path / "in.jsonl"


@pytest.fixture
def whole_scores(run_scorer: Scorer, requests_file: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The output of an unbroken job."""
    from tests.scorer.scoring_jobs import score

    output = tmp_path_factory.mktemp("whole") / "out.jsonl"
    score(run_scorer, requests_file, output)
    return output.read_bytes()
