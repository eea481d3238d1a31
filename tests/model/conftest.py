"""What captures passes in tests of CUDA graphs."""

from __future__ import annotations

import pytest

from tests.model.packed_passes import Watched


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Watched]:
    captures: list[Watched] = []
    monkeypatch.setattr(Watched, "made", captures, raising=False)
    return captures
