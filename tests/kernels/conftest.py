"""Which CPU implementation a test runs, and a user's machine to build it on."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernels.user_machine import GOOD, PLANTED, Machine


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


@pytest.fixture(scope="session")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[int, bytes]:
    """Two tiny libraries that say which they are."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder, made = tmp_path_factory.mktemp("libraries"), {}
    for kind in (GOOD, PLANTED):
        source, library = folder / "tiny.cpp", folder / f"{kind}.so"
        source.write_text(f'extern "C" long dti_size_of_arguments() {{ return {kind}; }}')
        subprocess.run([compiler, "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
        made[kind] = library.read_bytes()
    return made


@pytest.fixture
def machine(
    tmp_path: Path, libraries: dict[int, bytes], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Machine]:
    """A machine whose environment and current folder are this process's."""
    for name in ("home", "tmp", "current"):
        (tmp_path / name).mkdir(mode=0o700)
    (tmp_path / "good.so").write_bytes(libraries[GOOD])
    made = Machine(tmp_path, libraries[GOOD], libraries[PLANTED])
    monkeypatch.chdir(tmp_path / "current")
    for name, value in (
        ("HOME", "home"),
        ("XDG_CACHE_HOME", "xdg"),
        ("TMPDIR", "tmp"),
        ("LIBRARY", "good.so"),
    ):
        monkeypatch.setenv(name, str(tmp_path / value))
    monkeypatch.setenv("CXX", str(made.compiler()))
    monkeypatch.delenv("DTI_CACHE_DIR", raising=False)
    signal.alarm(120)  # what waits for ever ends the tests
    yield made
    signal.alarm(0)
    assert list((tmp_path / "current").iterdir()) == [], "something was put into the current folder"
