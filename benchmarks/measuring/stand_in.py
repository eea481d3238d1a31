"""Triton's just-in-time path without a GPU: everything between `windowed_attn` and a launch, but the launch.

A driver stands in that only says which GPU it is. Kernels then bind their arguments, are specialised and compiled exactly as on that
GPU, with the tiles of its architecture, from operators that run on CPU tensors. Needs triton, and no TRITON_INTERPRET.
"""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from dti_kernels import gpu, ops


def target_of(arch: str) -> Any:
    """Triton's target for an architecture of the tile table."""
    from triton.backends.compiler import GPUTarget

    return GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch[3:]), 32)


class _Driver:
    """The driver's part that the just-in-time compiler asks before it launches."""

    def __init__(self, arch: str, device: int | None) -> None:
        self._target = target_of(arch)
        # Compiled kernels are kept by device: one device an architecture.
        self._device = list(gpu.TABLE).index(arch) if device is None else device

    def get_current_device(self) -> int:
        return self._device

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self._target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, type_: str) -> str:
        return type_


@contextlib.contextmanager
def driver_of(arch: str, device: int | None = None) -> Iterator[None]:
    """Kernels are compiled for `arch` inside. `device`: its number; None: one for each architecture."""
    from triton.runtime import driver

    before = driver._active
    driver.set_active(_Driver(arch, device))
    try:
        yield
    finally:
        driver._active = before


@contextlib.contextmanager
def table_tiles(arch: str) -> Iterator[None]:
    """Batches on CPUs get the tiles of `arch` inside."""

    def choose(batch: gpu.Batch, kernel: Any) -> gpu.Tile:
        name, q = kernel.fn.__name__.removesuffix("_kernel"), batch.x.q
        return gpu.forced_tile(name) or gpu.table_tile(
            arch, name, q.shape[2], q.dtype.itemsize * 8, batch.x.mean_span
        )

    with mock.patch.object(gpu.Batch, "tile", choose):
        yield


@contextlib.contextmanager
def recorded_launches(arch: str) -> Iterator[list[Any]]:
    """Inside, operators on CPU tensors take the GPU's path with the tiles of `arch`, and their launches are written into the list instead of
    launched: outputs hold anything."""
    launches: list[Any] = []

    def record(_: gpu.Batch, new: list[Any]) -> list[Any]:
        launches.extend(new)
        return [None] * len(new)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(gpu.Batch, "run", record))
        stack.enter_context(table_tiles(arch))
        stack.enter_context(mock.patch.object(ops, "_interpreting", return_value=True))
        stack.enter_context(mock.patch.object(ops, "_widened", list))
        yield launches


def warm_up(launch: Any) -> Any:
    """The kernel that the just-in-time compiler makes of a launch inside `driver_of`; raises what it would raise before launching."""
    return launch.kernel.warmup(**launch.arguments, **launch.options, grid=launch.grid)


@dataclass(frozen=True)
class Key:
    """A compilation: kernel, what its arguments were specialised to, and options. Equal keys are one compilation."""

    kernel: str
    key: str

    def __str__(self) -> str:
        return self.kernel


@contextlib.contextmanager
def _without_compiling(found: Callable[[str], None]) -> Iterator[None]:
    """The just-in-time compiler stops where it would compile, and says the key."""
    from triton import knobs

    def stop(*, key: str, **_: Any) -> bool:
        found(key)
        return True

    with mock.patch.object(knobs.runtime, "jit_cache_hook", stop):
        yield


@contextlib.contextmanager
def _nothing_compiled(kernel: Any) -> Iterator[None]:
    """Inside, a kernel's compilations of this process are put aside."""
    before = dict(kernel.device_caches)
    kernel.device_caches.clear()
    try:
        yield
    finally:
        kernel.device_caches.clear()
        kernel.device_caches.update(before)


def distinct_launches(launches: Iterable[Any]) -> dict[Key, Any]:
    """The first launch of every compilation, inside `driver_of`. Binds and specialises all of them and compiles nothing: fractions of a
    millisecond each.

    Raises:
        KeyError, TypeError: a launch's arguments are not its kernel's.
    """
    launches = list(launches)
    result: dict[Key, Any] = {}
    keys: list[str] = []
    with contextlib.ExitStack() as stack:
        # A kernel that this process has compiled already is bound from its cache, which asks for no key.
        for kernel in {id(launch.kernel): launch.kernel for launch in launches}.values():
            stack.enter_context(_nothing_compiled(kernel))
        stack.enter_context(_without_compiling(keys.append))
        for launch in launches:
            keys.clear()
            warm_up(launch)
            result.setdefault(Key(launch.kernel.fn.__name__, keys[0]), launch)
    return result


@dataclass(frozen=True)
class Build:
    """A compiled kernel and what the assembler said about it."""

    kernel: Any
    log: str


def compile_launch(launch: Any) -> Build:
    """Compile a launch inside `driver_of`, whatever caches hold, and keep ptxas' remarks."""
    from triton import knobs

    launch.kernel.device_caches.clear()
    said = io.StringIO()
    with (
        mock.patch.object(knobs.compilation, "always_compile", True),
        mock.patch.object(knobs.nvidia, "dump_ptxas_log", True),
        contextlib.redirect_stdout(said),
    ):
        kernel = warm_up(launch)
    launch.kernel.device_caches.clear()
    return Build(kernel, said.getvalue())


@functools.cache
def why_not_compiled() -> str:
    """Why kernels cannot be compiled here, or nothing."""
    try:
        interpreting = gpu.interpreting()
    except ImportError as error:
        return f"triton is not installed: {error}"
    return "TRITON_INTERPRET is set: kernels are interpreted" if interpreting else ""
