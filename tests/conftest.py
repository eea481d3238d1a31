"""Paths and real data for the whole suite."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

# One thread a process: tests run beside each other (pytest -n), and tiny tensors only lose time to more threads.
torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def real_data_dir() -> Path:
    """Folder with real data sets (`ml-100k/`, ...): DTI_DATA_DIR, or `../shared/data` beside the checkout; else skip."""
    for candidate in (os.environ.get("DTI_DATA_DIR"), ROOT.parent / "shared" / "data"):
        if candidate and Path(candidate).is_dir():
            return Path(candidate)
    pytest.skip("no real data: set DTI_DATA_DIR to a folder with ml-100k/")
