"""Which folder compiled code is kept in: never one that others share or plant, never one beneath the current folder."""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import pwd
import shutil
import signal
import stat
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dti_kernels import ops, private_folders
from dti_kernels.cpu import build as cpu_build
from dti_kernels.cpu.build import BuildError
from tests.kernels.user_machine import FOLDERS, GOOD, PLACES, Machine, kind_of, loaded, refused


def test_the_first_folder_that_will_do(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert loaded().parent == machine.cache
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert loaded().parent == machine.home_cache
    shutil.rmtree(machine.place / "home")
    (machine.place / "home").touch()
    assert loaded().parent == machine.temporary
    monkeypatch.setenv("DTI_CACHE_DIR", str(machine.place / "chosen" / "here"))
    assert loaded().parent == machine.place / "chosen" / "here"


def test_the_system_knows_a_home_too(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Services have no HOME."""
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(pwd, "getpwuid", lambda _: SimpleNamespace(pw_dir=str(machine.place / "home")))
    monkeypatch.setenv("HOME", "")
    assert loaded().parent == machine.home_cache
    monkeypatch.delenv("HOME")
    assert loaded().parent == machine.home_cache


@pytest.mark.parametrize("name", ["HOME", "XDG_CACHE_HOME", "TMPDIR"])
@pytest.mark.parametrize("value", [".", "~", "cache", "../current", ""])
def test_nothing_in_the_current_folder_is_run(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    """Without HOME a folder `~` of the current one was used, with the library that somebody had put there."""
    current = machine.place / "current"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv(name, value)
    monkeypatch.setattr(pwd, "getpwuid", lambda _: (_ for _ in ()).throw(KeyError()))
    for place in ("dti_kernels", ".cache/dti_kernels", f"dti_kernels-{os.geteuid()}"):
        for below in {value or ".", "~"}:
            machine.plant(current / below / place)
    if name == "TMPDIR":
        monkeypatch.setenv("XDG_CACHE_HOME", "relative")
        monkeypatch.delenv("HOME")
        if value:
            message = refused()
            assert message.count("no absolute path") == 3
            assert message.endswith("Name a folder of your own in DTI_CACHE_DIR")
    else:
        assert current not in loaded().parents
    shutil.rmtree(current)
    current.mkdir()


def test_a_relative_folder_that_was_chosen_is_refused(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DTI_CACHE_DIR", "~/cache")
    assert "~/cache (no absolute path). Name a folder of your own in DTI_CACHE_DIR" in refused()


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_that_others_share_is_not_used(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Owner and mode were not looked at: what anybody had put there was run."""
    change, reason = FOLDERS[name]
    machine.plant(machine.cache)
    change(machine.cache)
    assert loaded().parent == machine.home_cache
    monkeypatch.setenv("DTI_CACHE_DIR", str(machine.cache))
    assert f"{machine.cache} ({reason}" in refused()


def test_what_belongs_to_another_user_is_not_used(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder, a home (that of `sudo`) and a library."""
    kept = loaded()
    theirs: set[int] = set()

    def owned(function: Callable[..., os.stat_result]) -> Callable[..., os.stat_result]:
        def status(*arguments: Any, **options: Any) -> os.stat_result:
            found = function(*arguments, **options)
            if found.st_ino not in theirs:
                return found
            return os.stat_result((*found[:4], os.geteuid() + 1, *found[5:10]))

        return status

    for function in ("lstat", "stat", "fstat"):
        monkeypatch.setattr(os, function, owned(getattr(os, function)))
    theirs.add((kept).stat().st_ino)
    assert loaded().parent == machine.cache
    assert machine.compiled == 2, "another user's library is replaced"
    theirs.add((machine.cache).stat().st_ino)
    assert loaded().parent == machine.home_cache
    theirs.add((machine.place / "home").stat().st_ino)
    assert loaded().parent == machine.temporary
    theirs.add((machine.temporary).stat().st_ino)
    message = refused()
    assert message.count("belongs to another user") == 3


def test_new_folders_are_private_whatever_the_umask(machine: Machine) -> None:
    before = os.umask(0)
    try:
        kept = loaded()
    finally:
        os.umask(before)
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    for folder in (kept.parent, kept.parent.parent):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_folders_that_run_or_keep_nothing(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache without the right to run files, and a full one, were the end: "install a compiler"."""
    map_file, write = mmap.mmap, cpu_build._write
    refusing = {machine.cache}

    def mapped(descriptor: int, *arguments: Any, **options: Any) -> mmap.mmap:
        if any(folder in Path(os.readlink(f"/proc/self/fd/{descriptor}")).parents for folder in refusing):
            raise PermissionError(errno.EPERM, "Operation not permitted")
        return map_file(descriptor, *arguments, **options)

    def written(path: Path, content: bytes) -> None:
        if machine.home_cache in path.parents:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, content)

    monkeypatch.setattr(mmap, "mmap", mapped)
    monkeypatch.setattr(cpu_build, "_write", written)
    assert loaded().parent == machine.temporary
    refusing.add(machine.temporary)
    shutil.rmtree(machine.temporary)
    message = refused()
    assert f"{machine.cache} (files there cannot be run (Operation not permitted))" in message
    assert f"{machine.home_cache} (No space left on device)" in message
    assert str(machine.temporary) in message
    assert machine.compiled == 1, "time was spent for nothing"
    assert "compiler" not in message
    assert [*machine.cache.iterdir(), *machine.home_cache.iterdir()] == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(machine: Machine) -> None:
    machine.cache.mkdir(parents=True, mode=0o500)
    assert loaded().parent == machine.home_cache


def test_triton_keeps_nothing_in_the_current_folder(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a known HOME, it kept and ran compiled kernels beneath the current folder."""
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.delenv("TRITON_HOME", raising=False)
    ops._give_triton_a_home()
    assert "TRITON_HOME" not in os.environ
    monkeypatch.setenv("HOME", "relative")
    ops._give_triton_a_home()
    assert os.environ["TRITON_HOME"] == str(machine.cache)


EXAMPLES = int(os.environ.get("DTI_FUZZ_EXAMPLES", "40"))


FOLDER_STATES: dict[str, Callable[[Path], object]] = {
    **{name: change for name, (change, _) in FOLDERS.items()},
    "private": lambda folder: None,
    "missing": shutil.rmtree,
    "read-only": lambda folder: folder.chmod(0o500),
    "unreadable": lambda folder: folder.chmod(0o300),
    "without rights": lambda folder: folder.chmod(0),
    "readable": lambda folder: folder.chmod(0o755),
}


VALUES = [
    "",
    "{}",
    "{}/",
    "relative",
    "~",
    ".",
    "/dev/null",
    "/proc/none",
    "/" + 300 * "x",
    "{}" + 400 * "/a",
    "{}/\udcff \n$LIB",
    None,
]


WORKS = [
    "{}",
    "true",
    "exit 1",
    "exit 1; {}",
    "kill -9 $$",
    "echo x > $2",
    "mkdir $2",
    "head -c 9000 $LIBRARY > $2",
    "yes | head -c 3000000; {}",
]


@dataclass(frozen=True)
class State:
    """A machine that a process may meet."""

    values: dict[str, str | None]
    folders: list[str]
    places: list[str | None]
    work: str
    umask: int
    options: str


@st.composite
def states(draw: st.DrawFn) -> State:
    names = ("DTI_CACHE_DIR", "XDG_CACHE_HOME", "HOME", "TMPDIR")
    likely = {"DTI_CACHE_DIR": None}
    values = {
        name: draw(st.one_of(st.just(likely.get(name, "{}")), st.sampled_from(VALUES))) for name in names
    }
    return State(
        values,
        [draw(st.sampled_from(sorted(FOLDER_STATES))) for _ in range(4)],
        [draw(st.sampled_from([None, *sorted(PLACES)])) for _ in range(4)],
        draw(st.one_of(st.just("{}"), st.sampled_from(WORKS))).format('cp "$LIBRARY" "$2"'),
        draw(st.sampled_from([0, 0o022, 0o027, 0o077, 0o777])),
        draw(st.one_of(st.just(""), st.text("'\"\\ \n-a\udcff#$;", max_size=6))),
    )


def test_any_state_of_a_machine(machine: Machine) -> None:
    """A library of one's own or a reason in one line: nothing planted, nothing left over, nothing beneath the current folder."""

    @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(states())
    def check(state: State) -> None:
        with (
            pytest.MonkeyPatch.context() as monkeypatch,
            tempfile.TemporaryDirectory(dir=machine.place) as made,
        ):
            _check_state(Machine(Path(made), machine.good, machine.planted), state, monkeypatch)

    check()


def _check_state(machine: Machine, state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    signal.alarm(60)
    chosen = machine.place / "chosen"
    for name, value in state.values.items():
        below = {"DTI_CACHE_DIR": "chosen", "XDG_CACHE_HOME": "xdg", "HOME": "home", "TMPDIR": "tmp"}[name]
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value.replace("{}", str(machine.place / below)))
    monkeypatch.setattr(
        private_folders, "_home", lambda: Path(os.environ.get("HOME") or machine.place / "home")
    )
    monkeypatch.setenv("CXX", f"{machine.compiler(state.work)} {state.options}")
    folders = (chosen, machine.cache, machine.home_cache, machine.temporary)
    (machine.place / "good.so").write_bytes(machine.good)
    kept = None
    with suppress(BuildError):
        kept = cpu_build._Build(cpu_build._compiler()).name
    for folder, state_of_folder, place in zip(folders, state.folders, state.places):
        folder.mkdir(parents=True, mode=0o700)
        if kept is not None and place is not None:
            PLACES[place](folder / f"{kept}-{hashlib.sha256(machine.good).hexdigest()}.so", machine)
        if kept is not None and state_of_folder in FOLDERS:
            machine.plant(folder)
        FOLDER_STATES[state_of_folder](folder)
    before = os.umask(state.umask)
    library, reason = None, ""
    try:
        library = cpu_build.library(lambda _: None)
    except BuildError as error:
        reason = str(error)
    finally:
        os.umask(before)
        for folder in folders:
            if folder.is_dir():
                folder.chmod(stat.S_IMODE(folder.stat().st_mode) | 0o700)
    if library is None:
        assert len(reason.splitlines()) == 1
    else:
        assert kind_of(library) == GOOD
        folder = Path(library._name).parent
        assert folder.is_absolute()
        assert not folder.is_symlink()
        assert folder.stat().st_mode & 0o022 == 0
        assert Path(library._name).stat().st_mode & 0o022 == 0
    assert not list(machine.place.rglob("building-*"))
    assert list(Path.cwd().iterdir()) == []
