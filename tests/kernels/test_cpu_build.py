"""Where the compiled attention is kept and how it gets there: folders that others share or plant, compilers that fail, damage, races.

The compiler is a script that copies a tiny library, so that a build takes milliseconds.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import mmap
import os
import pwd
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
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

GOOD, PLANTED = 1, 666
EXAMPLES = int(os.environ.get("DTI_FUZZ_EXAMPLES", "40"))
SCRIPT = """#!/bin/sh
case "$*" in *--version*) echo fake 1; exit;; esac
echo "$@" >> {log}
while [ "$1" != -o ]; do shift; done
{work}
"""


@dataclass(frozen=True)
class Machine:
    """A user's machine below a folder: home, caches, temporary files, the current folder, and a compiler.

    Attributes:
        place: of all.
        good: the library that the compiler makes.
        planted: another one.
    """

    place: Path
    good: bytes
    planted: bytes

    @property
    def cache(self) -> Path:
        """The first folder that is looked at."""
        return self.place / "xdg" / "dti_kernels"

    @property
    def home_cache(self) -> Path:
        return self.place / "home" / ".cache" / "dti_kernels"

    @property
    def temporary(self) -> Path:
        return self.place / "tmp" / f"dti_kernels-{os.geteuid()}"

    def compiler(self, work: str = 'cp "$LIBRARY" "$2"') -> Path:
        """A program that does some work when it shall compile to $2."""
        path = self.place / "compiler"
        path.write_text(SCRIPT.format(log=shlex.quote(str(self.place / "log")), work=work))
        path.chmod(0o755)
        return path

    @property
    def compiled(self) -> int:
        """How often the compiler was asked to."""
        log = self.place / "log"
        return len(log.read_text().splitlines()) if log.exists() else 0

    def plant(self, folder: Path) -> Path:
        """Another library under the name of a good one."""
        folder.mkdir(parents=True, exist_ok=True)
        build = cpu_build._Build(cpu_build._compiler())
        path = folder / f"{build.name}-{hashlib.sha256(self.planted).hexdigest()}.so"
        path.write_bytes(self.planted)
        return path


def kind_of(library: ctypes.CDLL) -> int:
    return int(library.dti_size_of_arguments())


def loaded() -> Path:
    """Of the good library, where it was loaded from."""
    library = cpu_build.library(lambda _: None)
    assert kind_of(library) == GOOD
    return Path(library._name)


def refused() -> str:
    """Why there is none, one line."""
    with pytest.raises(BuildError) as raised:
        cpu_build.library(lambda _: None)
    message = str(raised.value)
    assert len(message.splitlines()) == 1
    return message


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[int, bytes]:
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


def test_the_first_folder_that_will_do(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert loaded().parent == machine.cache
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert loaded().parent == machine.home_cache
    shutil.rmtree(machine.place / "home")
    (machine.place / "home").touch()
    assert loaded().parent == machine.temporary
    monkeypatch.setenv("DTI_CACHE_DIR", str(machine.place / "chosen" / "here"))
    assert loaded().parent == machine.place / "chosen" / "here"


def test_it_is_built_once(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = loaded()
    assert loaded() == kept
    assert machine.compiled == 1
    monkeypatch.setenv("CXX", f"{machine.place / 'compiler'} -O1")
    other = loaded()
    assert other != kept, "other flags are another library"
    assert sorted(machine.cache.iterdir()) == sorted([kept, other])


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


def linked(folder: Path) -> None:
    shutil.move(folder, folder.with_name("elsewhere"))
    folder.symlink_to(folder.with_name("elsewhere"))


def a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.touch()


def a_pipe(folder: Path) -> None:
    shutil.rmtree(folder)
    os.mkfifo(folder)


FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "others write": (lambda folder: folder.chmod(0o777), "others may write to it"),
    "the group writes": (lambda folder: folder.chmod(0o770), "others may write to it"),
    "sticky": (lambda folder: folder.chmod(0o1777), "others may write to it"),
    "a link": (linked, "it is a link"),
    "a file": (a_file, "it is no folder"),
    "a pipe": (a_pipe, "it is no folder"),
}


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


def a_link(path: Path, machine: Machine) -> None:
    path.symlink_to(machine.place / "good.so")


def a_hard_link(path: Path, machine: Machine) -> None:
    os.link(machine.place / "good.so", path)
    path.chmod(0o666)


PLACES: dict[str, Callable[[Path, Machine], object]] = {
    "cut short": lambda path, machine: path.write_bytes(machine.good[:5000]),
    "empty": lambda path, machine: path.touch(),
    "flipped": lambda path, machine: path.write_bytes(machine.good[:4000] + b"?" + machine.good[4001:]),
    "planted": lambda path, machine: path.write_bytes(machine.planted),
    "pipe": lambda path, machine: os.mkfifo(path),
    "link": a_link,
    "endless link": lambda path, machine: path.symlink_to(path),
    "link to a device": lambda path, machine: path.symlink_to("/dev/zero"),
    "others write": a_hard_link,
}


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
    code = "from dti_kernels import cpu_build; cpu_build.library(lambda _: None)"
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


def test_triton_keeps_nothing_in_the_current_folder(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where HOME was unknown, it kept and ran compiled kernels beneath the current folder."""
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.delenv("TRITON_HOME", raising=False)
    ops._give_triton_a_home()
    assert "TRITON_HOME" not in os.environ
    monkeypatch.setenv("HOME", "relative")
    ops._give_triton_a_home()
    assert os.environ["TRITON_HOME"] == str(machine.cache)


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
    """What a process may meet."""

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
