"""A user's machine below a folder, its compiler a script that copies a tiny library: a build takes milliseconds."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from dti_kernels.cpu import build as cpu_build
from dti_kernels.cpu.build import BuildError

GOOD, PLANTED = 1, 666
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
