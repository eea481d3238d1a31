"""Paths and real data for the whole suite."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import torch

# One thread a process, unless asked otherwise: tests run beside each other (pytest -n), and tiny tensors only lose time to more.
torch.set_num_threads(int(os.environ.get("DTI_TEST_THREADS", "1")))

ROOT = Path(__file__).resolve().parents[1]


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


@pytest.fixture(scope="session")
def real_data_dir() -> Path:
    """Folder with real data sets (`ml-100k/`, ...): DTI_DATA_DIR, or `../shared/data` beside the checkout; else skip."""
    for candidate in (os.environ.get("DTI_DATA_DIR"), ROOT.parent / "shared" / "data"):
        if candidate and Path(candidate).is_dir():
            return Path(candidate)
    pytest.skip("no real data: set DTI_DATA_DIR to a folder with ml-100k/")
