"""Launches without a GPU: all that the host does for a call of `windowed_attn`, up to the driver's door.

The stand-in driver says which GPU it is, operators on CPU tensors take the GPU's path, and Triton binds arguments and finds kernels as ever.
Nothing is compiled: a kernel that does nothing stands in for each compilation. So what is launched can be looked at, and the host's time
be measured without a device. Needs triton, and no TRITON_INTERPRET.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from benchmarks.measuring.stand_in import driver_of, table_tiles
from dti_kernels import gpu, ops

Launched = tuple[Any, tuple[int, ...], tuple[Any, ...]]  # kernel, grid, arguments


@dataclass
class Door:
    """What arrived at the driver's door.

    Attributes:
        launched: every launch, while `listening`.
        compiled: what Triton would have compiled, in order.
    """

    listening: bool = True
    launched: list[Launched] = field(default_factory=list)
    compiled: list[Any] = field(default_factory=list)


@functools.cache
def _kernel_class() -> Any:
    from triton.compiler import CompiledKernel

    class Kernel(CompiledKernel):  # type: ignore[misc]
        """A compilation that does nothing when it is launched."""

        def __init__(self, name: str, key: str, door: Door) -> None:
            self.name, self.key, self.door = name, key, door
            self.src, self.function, self.packed_metadata = None, 0, ()
            self._run = self._launched

        def _init_handles(self) -> None:
            pass

        def __del__(self) -> None:
            pass

        def _launched(self, *args: Any) -> None:
            x, y, z, _stream, _function, _packed, metadata, enter, leave, *arguments = args
            if enter is not None:
                enter(metadata)
            if self.door.listening:
                self.door.launched.append((self, (x, y, z), tuple(arguments)))
            if leave is not None:
                leave(metadata)

    return Kernel


@contextlib.contextmanager
def launches_at_the_door(arch: str) -> Iterator[Door]:
    """Inside, operators on CPU tensors take the GPU's path on a GPU of `arch`; outputs hold anything."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    door, touched = Door(), []

    def compile_nothing(kernel: Any, key: str, *_: Any, **__: Any) -> Any:
        made = _kernel_class()(kernel.fn.__name__, key, door)
        kernel.device_caches[driver.active.get_current_device()][0][key] = made
        door.compiled.append(made)
        touched.append(kernel)
        return made

    def run(_: gpu.Batch, launches: list[gpu.Launch]) -> list[Any]:
        return [launch.run() for launch in launches]

    with contextlib.ExitStack() as stack:
        # A device of its own: what is compiled here must not be found elsewhere.
        stack.enter_context(driver_of(arch, device=1000))
        stack.enter_context(table_tiles(arch))
        stack.enter_context(mock.patch.object(JITFunction, "_do_compile", compile_nothing))
        stack.enter_context(mock.patch.object(gpu.Batch, "run", run))
        gpu.forget_plans()
        stack.callback(gpu.forget_plans)
        # The registered implementations for CPUs become those for GPUs.
        for cpu, gpus in ((ops._fwd_cpu, ops._fwd_gpu), (ops._bwd_cpu, ops._bwd_gpu)):
            stack.callback(setattr, cpu, "__code__", cpu.__code__)
            cpu.__code__ = gpus.__code__
        try:
            yield door
        finally:
            for kernel in touched:
                kernel.device_caches.pop(1000, None)
