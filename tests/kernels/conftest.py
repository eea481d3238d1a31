"""Which CPU implementation a test runs."""

from __future__ import annotations

import os
import shlex
import shutil

import pytest


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
