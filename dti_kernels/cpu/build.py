"""Compiles `native/attention.cpp` and keeps it in a folder of this user's own (`private_folders.py`).

The C++ has no dependencies (no PyTorch headers, so one build serves every PyTorch). It is compiled once per machine, in about seven
seconds, for the machine's own vector instructions. CXX names the compiler. A kept library is loaded only if it is a regular file of
this user whose name ends with the sha256 of its content; any other is built again.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import mmap
import os
import platform
import select
import shlex
import shutil
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dti_kernels.private_folders import check_owner, in_private_folder

SOURCES = Path(__file__).parent / "native"
FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC", "-pthread")
_VERSION_TIMEOUT_S, _TIMEOUT_S = 30, 300
_OUTPUT_BYTES = 2**20  # kept of a compiler's output, which may have no end
_PROBE_BYTES = 2**21  # several times the size of the library
_ANOTHER = "install one (g++ or clang++), or name one in CXX"


class BuildError(RuntimeError):
    """There is no library; the message says why, and the way out, in one line."""


def library(check: Callable[[ctypes.CDLL], None]) -> ctypes.CDLL:
    """The library, built where no folder has it.

    Args:
        check: raises AttributeError for a library of another interface.

    Raises:
        BuildError: it cannot be compiled, or no folder will do.
    """
    if sys.platform != "linux":
        raise BuildError(f"it is built on Linux only, and this is {sys.platform}")
    try:
        build = _Build(_compiler())
        return in_private_folder(lambda folder: _library_in(folder, build, check))
    except OSError as error:
        raise BuildError(" ".join(str(error).split())) from error


class _Build:
    """The sources, a compiler and its options, for this machine.

    Attributes:
        command: the compiler and its options, without the files.
        name: the library's file name begins with it; every source, compiler and processor has its own.
    """

    def __init__(self, compiler: tuple[str, ...]) -> None:
        native = "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"
        self.command = [*compiler, *FLAGS, native]
        version = _output([compiler[0], "--version"], _VERSION_TIMEOUT_S)
        files = sorted(path for path in SOURCES.iterdir() if path.suffix in (".cpp", ".h"))
        sources = [path.read_text(encoding="utf-8") for path in files]
        identity = "\n".join([*sources, *self.command, version, _processor()])
        self.name = f"cpu_native-{hashlib.sha256(identity.encode(errors='surrogateescape')).hexdigest()[:20]}"
        self._content = b""

    def content(self, scratch: Path) -> bytes:
        """The library's bytes, compiled by the first call only. The compiler writes into `scratch` and nowhere else."""
        if not self._content:
            made = scratch / "made.so"
            command = [*self.command, "-o", str(made), str(SOURCES / "attention.cpp")]
            _output(command, _TIMEOUT_S, TMPDIR=str(scratch))
            content = made.read_bytes() if made.is_file() else b""
            if not _is_whole_library(content):
                raise BuildError(f"{_shown(command)} ended well, but made no shared library: {_ANOTHER}")
            self._content = content
        return self._content


def _compiler() -> tuple[str, ...]:
    text = os.environ.get("CXX", "")
    try:
        return tuple(shlex.split(text)) or ("c++",)
    except ValueError as error:
        raise BuildError(f"CXX={text!r} cannot be read ({error}): it is a compiler and its options") from None


def _shown(command: list[str]) -> str:
    return f"the C++ compiler {command[0]!r}"


def _processor() -> str:
    """The processor that `native` stands for: machines with different processors may share a home folder."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _is_whole_library(content: bytes) -> bool:
    """Whether an ELF file has its end, the table of its sections: loading half of one would end the process with SIGBUS."""
    if len(content) < 64 or content[:5] != b"\x7fELF\x02":
        return False
    (offset,) = struct.unpack_from("=Q", content, 0x28)
    size, number = struct.unpack_from("=HH", content, 0x3A)
    return bool(offset + size * number <= len(content))


def _output(command: list[str], seconds: float, **environment: str) -> str:
    """A compiler's output.

    Raises:
        BuildError: it cannot be run, fails, or takes too long. It is then killed with all processes that it started.
    """
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "LC_ALL": "C", **environment},
            process_group=0,
        )
    except OSError as error:
        raise BuildError(f"{_shown(command)} cannot be run ({error.strerror}): {_ANOTHER}") from error
    with process:
        try:
            output = _read(process, time.monotonic() + seconds)
        except BaseException as error:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                raise BuildError(
                    f"{_shown(command)} did not end within {seconds:.0f} s: {_ANOTHER}"
                ) from error
            raise
    if process.returncode:
        raise BuildError(f"{_shown(command)} {_failure(process.returncode, output)}: {_ANOTHER}")
    return output


def _read(process: subprocess.Popen[bytes], deadline: float) -> str:
    assert process.stdout is not None
    output, waiting = bytearray(), select.poll()
    waiting.register(process.stdout)
    while True:
        if not waiting.poll(max(0, 1000 * (deadline - time.monotonic()))) or time.monotonic() > deadline:
            raise subprocess.TimeoutExpired(process.args, 0)
        chunk = os.read(process.stdout.fileno(), 2**16)
        output += chunk[: _OUTPUT_BYTES - len(output)]
        if not chunk:
            process.wait(max(0, deadline - time.monotonic()))
            return output.decode(errors="replace")


def _failure(status: int, output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()] or ["it said nothing"]
    said = next((line for line in lines if "error" in line.lower()), lines[-1])[:300]
    if status < 0:
        return f"was ended by {signal.strsignal(-status) or f'signal {-status}'} ({said})"
    return f"failed with status {status} ({said})"


def _library_in(folder: Path, build: _Build, check: Callable[[ctypes.CDLL], None]) -> ctypes.CDLL:
    """The library of a folder, built into it first if it holds none that loads.

    Raises:
        OSError: the folder cannot keep or run it.
    """
    unusable = []
    for name in sorted(os.listdir(folder)):
        if name.startswith(f"{build.name}-") and name.endswith(".so"):
            try:
                return _load(folder / name, check)
            except OSError:
                unusable.append(folder / name)
    kept = _keep(folder, build)
    for other in unusable:
        if other != kept:
            with suppress(OSError):
                other.unlink()
    return _load(kept, check)


def _load(path: Path, check: Callable[[ctypes.CDLL], None]) -> ctypes.CDLL:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # a pipe would be waited for
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(f"{path.name} is no regular file")
        check_owner(status)
        if not path.stem.endswith(f"-{hashlib.file_digest(file, 'sha256').hexdigest()}"):
            raise OSError(f"{path.name} is damaged")
    try:
        loaded = ctypes.CDLL(str(path))
        check(loaded)
    except (AttributeError, UnicodeDecodeError) as error:  # ctypes decodes a reason that may name any path
        raise OSError(f"{path.name} cannot be loaded ({error})") from error
    return loaded


def _keep(folder: Path, build: _Build) -> Path:
    """Put the library into a folder, which several processes may do at once."""
    with _scratch_folder(folder) as scratch:
        _probe(scratch / "probe")
        content = build.content(scratch)
        made, kept = scratch / "kept.so", folder / f"{build.name}-{hashlib.sha256(content).hexdigest()}.so"
        _write(made, content)
        made.rename(kept)
        _flush(folder)
    return kept


def _probe(path: Path) -> None:
    """Raise OSError where files cannot be kept or not be run (noexec), before time is spent on compiling."""
    _write(path, bytes(_PROBE_BYTES))
    with path.open("rb") as file:
        try:
            mmap.mmap(
                file.fileno(), mmap.PAGESIZE, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_EXEC
            ).close()
        except OSError as error:
            raise OSError(f"files there cannot be run ({error.strerror})") from error
    path.unlink()


def _write(path: Path, content: bytes) -> None:
    """A new file for this user alone, synced: after a power cut a file may have its name without its content."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(descriptor)


def _flush(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _scratch_folder(parent: Path) -> Iterator[Path]:
    """A folder to build in. Its lock ends with this process, so that the next build removes the folder of a killed one."""
    for leftover in parent.glob("building-*"):
        _remove_unlocked(leftover)
    scratch = Path(tempfile.mkdtemp(dir=parent, prefix="building-"))
    descriptor = os.open(scratch, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks: then leftovers stay
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        os.close(descriptor)


def _remove_unlocked(folder: Path) -> None:
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Between a folder's creation and its lock there is nothing in it.
            if any(folder.iterdir()):
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(descriptor)
