"""The imaginary card of the GPU benchmarks."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from benchmarks import tune_tiles
from benchmarks.attention import gpu as attention_gpu
from benchmarks.gpu import host as host_gpu
from benchmarks.measuring import device_time, rehearsal


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The rehearsal's card, whose host gets ahead of it behind a pause of at least `needed` cycles; `pauses` are those it was given."""
    found = SimpleNamespace(needed=0, pauses=[])

    class Event(rehearsal._Event):
        def query(self) -> bool:
            return found.pauses[-1] < found.needed

    for name, stand_in in rehearsal._STAND_INS.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", found.pauses.append)
    monkeypatch.setattr(device_time, "_flushed", lambda: torch.zeros(1))
    for module in (attention_gpu, host_gpu, tune_tiles):
        monkeypatch.setattr(module, "DEVICE", "cpu")
    return found
