"""Which CPU implementation a test runs, and the imaginary card of the GPU benchmarks."""

from __future__ import annotations

import os
import shlex
import shutil
from types import SimpleNamespace

import pytest
import torch


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled one: skipped where there is no compiler, an error where there is one that cannot build it."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
    if shutil.which(compiler) is None:
        pytest.skip(f"no C++ compiler ({compiler}): the compiled CPU attention is not tested")
    monkeypatch.setenv("DTI_CPU", "native")


@pytest.fixture(params=["native", "torch"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each CPU implementation, where it can run."""
    monkeypatch.setenv("DTI_CPU", request.param)
    if request.param == "native":
        request.getfixturevalue("native")
    name: str = request.param
    return name


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The rehearsal's card, whose host gets ahead of it behind a pause of at least `needed` cycles; `pauses` are those it was given."""
    # Here, so that a kernel's test needs no benchmark.
    from benchmarks import tune_tiles
    from benchmarks.attention import gpu as attention_gpu
    from benchmarks.gpu import host as host_gpu
    from benchmarks.measuring import device_time, rehearsal

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
