"""How the compiled attention comes into its folder: compilers that fail, damage, races."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dti_kernels.cpu import build as cpu_build
from dti_kernels.cpu.build import BuildError
from tests.kernels.user_machine import PLACES, Machine, loaded, refused


def test_it_is_built_once(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = loaded()
    assert loaded() == kept
    assert machine.compiled == 1
    monkeypatch.setenv("CXX", f"{machine.place / 'compiler'} -O1")
    other = loaded()
    assert other != kept, "other flags are another library"
    assert sorted(machine.cache.iterdir()) == sorted([kept, other])


@pytest.mark.parametrize("name", PLACES)
def test_what_is_no_library_is_built_again(machine: Machine, name: str) -> None:
    """Cut short it ended the process with SIGBUS, always; a pipe was waited for."""
    kept = loaded()
    kept.unlink()
    PLACES[name](kept, machine)
    other = kept.with_name(f"{kept.name[:40]}other.so")
    PLACES[name](other, machine)
    assert loaded() == kept
    assert machine.compiled == 2
    assert list(machine.cache.iterdir()) == [kept]
    assert loaded() == kept
    assert machine.compiled == 2, "a whole one stays"


def test_a_folder_in_the_place_of_the_library(machine: Machine) -> None:
    kept = loaded()
    kept.unlink()
    (kept / "mine").mkdir(parents=True)
    assert loaded().parent == machine.home_cache
    assert (kept / "mine").is_dir()


def test_a_library_that_does_not_load_is_built_once_more(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then the next folder is tried with what was compiled, and the reasons are said."""
    first = loaded()
    load, failing = ctypes.CDLL, [1]

    def failing_load(path: str) -> ctypes.CDLL:
        if failing[0] > 0:
            failing[0] -= 1
            raise OSError(f"{path}: cannot map")
        return load(path)

    monkeypatch.setattr(ctypes, "CDLL", failing_load)
    assert loaded() == first
    assert machine.compiled == 2
    failing[0] = 2
    assert loaded().parent == machine.home_cache
    assert machine.compiled == 3
    failing[0] = 100
    assert refused().count("cannot map") == 3
    assert machine.compiled == 4


def test_a_library_of_other_arguments(machine: Machine) -> None:
    def check(_: ctypes.CDLL) -> None:
        raise AttributeError("it was built for other arguments")

    def other_bytes(_: ctypes.CDLL) -> None:
        b"\xff".decode()  # as ctypes does with a reason that names a path

    with pytest.raises(BuildError, match="built for other arguments.*DTI_CACHE_DIR"):
        cpu_build.library(check)
    assert machine.compiled == 1
    with pytest.raises(BuildError, match="can't decode byte 0xff"):
        cpu_build.library(other_bytes)


SAYS = {
    "exit 1": "failed with status 1 (it said nothing)",
    "echo one; echo here: error: two >&2; echo three; exit 3": "failed with status 3 (here: error: two)",
    "echo no words; exit 1": "failed with status 1 (no words)",
    "printf 'err\\377or \\000'; exit 1": "failed with status 1 (err",
    "kill -9 $$": "was ended by Killed",
    "true": "ended well, but made no shared library",
    'echo garbage > "$2"': "ended well, but made no shared library",
    'mkdir "$2"': "ended well, but made no shared library",
    'mkfifo "$2"': "ended well, but made no shared library",
    'head -c 9000 "$LIBRARY" > "$2"': "ended well, but made no shared library",
    'head -c 64 "$LIBRARY" > "$2"': "ended well, but made no shared library",
    "sleep 99": "did not end within 1 s",
    "sleep 99 & exit 1": "did not end within 1 s",
    "exec >/dev/null 2>&1; sleep 99": "did not end within 1 s",
    "yes error": "did not end within 1 s",
}


@pytest.mark.parametrize("work", SAYS)
def test_compilers_that_fail(machine: Machine, monkeypatch: pytest.MonkeyPatch, work: str) -> None:
    """Each is named with what it did; one that hung was waited for, also after its time was up where it had started another."""
    monkeypatch.setattr(cpu_build, "_TIMEOUT_S", 1)
    machine.compiler(work)
    message = refused()
    assert f"the C++ compiler {str(machine.place / 'compiler')!r} {SAYS[work]}" in message
    assert message.endswith("install one (g++ or clang++), or name one in CXX")
    assert machine.compiled == 1
    assert list(machine.cache.iterdir()) == [], "something is left"


def test_a_compiler_that_hangs_is_ended_with_what_it_started(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_build, "_TIMEOUT_S", 1)
    started = machine.place / "started"
    machine.compiler(f"sleep 99 & echo $! > {started}; wait")
    refused()
    place = Path("/proc") / started.read_text().strip() / "stat"
    deadline = time.monotonic() + 20
    while place.exists() and place.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline, "it goes on"
        time.sleep(0.01)


def test_a_compiler_asks_nobody(machine: Machine) -> None:
    """It reads nothing of the terminal, and is not read without end."""
    reading, writing, before = *os.pipe(), os.dup(0)
    os.dup2(reading, 0)
    try:
        machine.compiler("cat; exit 1")
        assert "failed with status 1 (it said nothing)" in refused()
    finally:
        os.dup2(before, 0)
        for descriptor in (reading, writing, before):
            os.close(descriptor)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(cpu_build, "_OUTPUT_BYTES", 10)
        assert cpu_build._output(["printf", "x" * 100], 20) == "x" * 10


@pytest.mark.parametrize(
    ("cxx", "reason"),
    [
        ("'c++", 'CXX="\'c++" cannot be read (No closing quotation)'),
        ("c++\\", "CXX='c++\\\\' cannot be read (No escaped character)"),
        ("/", "'/' cannot be run (Permission denied)"),
        ("/dev/null", "'/dev/null' cannot be run (Permission denied)"),
        ("''", "'' cannot be run ("),
        ("no\udcffsuch", "'no\\udcffsuch' cannot be run (No such file or directory)"),
        ("false", "'false' failed with status 1"),
        ("x" * 5000, "cannot be run (File name too long)"),
    ],
)
def test_values_of_cxx(machine: Machine, monkeypatch: pytest.MonkeyPatch, cxx: str, reason: str) -> None:
    """A quote without its other one was a ValueError of attention."""
    monkeypatch.setenv("CXX", cxx)
    assert reason in refused()


def test_an_empty_cxx_is_none(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first option was taken for the compiler."""
    for text in ("", "  "):
        monkeypatch.setenv("CXX", text)
        assert cpu_build._compiler() == ("c++",)
    monkeypatch.setenv("CXX", f"'{machine.place / 'compiler'}' \"-D x\" --sysroot=/")
    loaded()
    assert "-D x --sysroot=/ -std=c++17" in (machine.place / "log").read_text()


def test_other_files_among_the_sources(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """An editor's file, or Python's, ended in another error."""
    kept = loaded()
    sources = shutil.copytree(cpu_build.SOURCES, machine.place / "sources")
    (sources / "__pycache__").mkdir()
    (sources / ".attention.cpp.swp").write_bytes(b"\xff\0")
    sources.chmod(0o500)
    monkeypatch.setattr(cpu_build, "SOURCES", sources)
    assert loaded() == kept
    monkeypatch.setattr(cpu_build, "SOURCES", sources / "missing")
    assert f"No such file or directory: '{sources / 'missing'}'" in refused()


def test_several_at_once(machine: Machine) -> None:
    """Each builds under a name of its own, and all end up with one."""
    machine.compiler('sleep 0.2; cp "$LIBRARY" "$2"')
    with ThreadPoolExecutor(6) as pool:
        found = set(pool.map(lambda _: loaded(), range(6)))
    assert len(found) == 1
    assert list(machine.cache.iterdir()) == [*found]


def test_a_killed_build_leaves_nothing_for_long(machine: Machine) -> None:
    """The next build removes it; one that is running is left alone."""
    machine.compiler('touch "$2"; sleep 60')
    code = "from dti_kernels.cpu import build; build.library(lambda _: None)"
    process = subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )
    try:
        while not list(machine.cache.glob("building-*/made.so")):
            assert process.poll() is None
            time.sleep(0.05)
        with cpu_build._scratch_folder(machine.cache):
            assert len(list(machine.cache.glob("building-*/made.so"))) == 1, "somebody is building it"
    finally:
        process.kill()
        process.wait()
    assert len(list(machine.cache.glob("building-*/made.so"))) == 1
    machine.compiler()
    assert list(machine.cache.iterdir()) != [loaded()]
    assert [path.suffix for path in machine.cache.iterdir()] == [".so"]


def test_a_library_is_on_the_disk_before_it_has_its_name(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut left a name without content."""
    events: list[str] = []
    rename, sync = Path.rename, os.fsync

    def named(descriptor: int) -> str:
        return Path(os.readlink(f"/proc/self/fd/{descriptor}")).name

    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(named(fd)), sync(fd)))
    monkeypatch.setattr(Path, "rename", lambda path, target: (events.append("rename"), rename(path, target)))
    loaded()
    assert events == ["probe", "kept.so", "rename", "dti_kernels"]
