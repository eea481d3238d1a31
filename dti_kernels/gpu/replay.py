"""Calls whose like has run before launch the same compiled kernels again: nothing is checked, laid out or bound a second time.

A call's kernels, grids, tiles, compilations and numbers follow from the description of its tensors (shapes, strides, dtypes, devices), its
numbers, and which addresses are multiples of 16. A plan keeps what follows from a description, so the layers of a model share one. It holds
no tensor and no address. The first call of its kind goes the long way, through `Launch.run` and Triton's binder, which stays the only place
that knows what Triton specialises on: a plan's description is finer.

Addresses go to the driver as numbers: of a tensor, Triton would ask it whether it is a GPU's, which the contract has checked.

Triton's hooks of launches are called; `JITFunction.pre_run_hooks` see only the first call of a kind. A plan does not notice kernels' globals
that change in a running process, nor variables of Triton's that do, except for those in `_settings`.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver

from dti_kernels.contract import check_inputs, check_saved
from dti_kernels.gpu.launch import Launch, addressable, on
from dti_kernels.gpu.tiles import all_forced
from dti_kernels.inputs import Inputs

Tensors = tuple[Tensor | None, ...]

# Beyond this many, all are forgotten: lengths change from batch to batch, and every batch has two.
_MOST_PLANS = 1024
# Triton for AMD also specialises on storages of less than 2 GiB.
_STORAGES_MATTER = torch.version.hip is not None


class _Ready(NamedTuple):
    """Launches with everything but addresses."""

    parts: tuple[tuple[int, int], ...]  # of buffers: which tensor of the call, and bytes from its beginning
    constants: tuple[Any, ...]
    launches: tuple[tuple[CompiledKernel, int, int, Callable[[tuple[Any, ...]], tuple[Any, ...]]], ...]


class Plan:
    """What calls of one description share."""

    def __init__(self, tensors: Tensors) -> None:
        self._copied = [i for i, x in enumerate(tensors) if x is not None and addressable(x) is not x]
        self._ready: dict[Hashable, _Ready] = {}  # by which addresses are multiples of 16

    def addressable(self, tensors: Tensors) -> Tensors:
        """The call's tensors, copied where kernels cannot address them."""
        if not self._copied:
            return tensors
        copied: list[Any] = list(tensors)
        for i in self._copied:
            copied[i] = copied[i].contiguous()
        return tuple(copied)

    def run_again(self, tensors: Tensors) -> bool:
        """Launch what `keep` kept, on the current stream of the tensors' device; whether it kept anything for such addresses.

        Args:
            tensors: every tensor of the call, addressable inputs and what it allocated, in the order that `keep` got.
        """
        pointers = [0 if x is None else x.data_ptr() for x in tensors]
        ready = self._ready.get(_alignment(pointers))
        if ready is None:
            return False
        parts = [pointers[i] + offset for i, offset in ready.parts]
        values = (*pointers, *parts, *ready.constants)
        first: Any = tensors[0]
        with on(first.device):
            stream = driver.active.get_current_stream(driver.active.get_current_device())
            if _hooked():
                for kernel, grid_x, grid_y, pick in ready.launches:
                    kernel[grid_x, grid_y, 1](*pick(values), stream=stream)
                return True
            # What that does, but for two calls of empty hooks and their argument.
            for kernel, grid_x, grid_y, pick in ready.launches:
                function, metadata = kernel.function, kernel.packed_metadata
                kernel.run(grid_x, grid_y, 1, stream, function, metadata, None, None, None, *pick(values))
        return True

    def keep(self, tensors: Tensors, launches: list[Launch], kernels: list[Any]) -> None:
        """Keep a call's launches, unless they were not compiled (an interpreter has no kernels) or a tensor of theirs is not among `tensors`.

        Args:
            tensors: as `run_again`, no object twice.
            launches: what the call launched.
            kernels: what Triton compiled each to.
        """
        if not all(isinstance(kernel, CompiledKernel) for kernel in kernels):
            return
        places: dict[Hashable, int] = {id(x): i for i, x in enumerate(tensors) if x is not None}
        parts = _parts(tensors, launches, places)
        if parts is None:
            return
        constants: list[Any] = []
        picks = []
        for launch in launches:
            picked = []
            for value in (launch.arguments[name] for name in launch.kernel.arg_names):
                place = id(value) if isinstance(value, Tensor) else (type(value), value)
                if place not in places:
                    places[place] = len(tensors) + len(parts) + len(constants)
                    constants.append(value)
                picked.append(places[place])
            picks.append(operator.itemgetter(*picked))
        pointers = [0 if x is None else x.data_ptr() for x in tensors]
        again = tuple((kernel, *launch.grid, pick) for kernel, launch, pick in zip(kernels, launches, picks))
        ready = _Ready(tuple(parts), tuple(constants), again)
        self._ready[_alignment(pointers)] = ready


def plan_of(kind: str, x: Inputs, saved: tuple[Tensor, ...] = ()) -> Plan:
    """The plan of calls like this one. Checks arguments that no call before was like.

    Args:
        kind: which operator, and what else its launches depend on.
        x: the operators' inputs.
        saved: the other tensors of the backward: `grad_out`, `out` and `lse`.

    Raises:
        TypeError, ValueError: as `check_inputs` and `check_saved`.
    """
    tensors = (*x.tensors, *saved)
    key = (kind, x.scale, x.mean_span, all_forced(), _settings(), described(tensors))
    plan = _plans.get(key)
    if plan is None:
        check_inputs(x)
        if saved:
            check_saved(x, *saved)
        if len(_plans) >= _MOST_PLANS:
            forget_plans()
        plan = _plans.setdefault(key, Plan(tensors))
    return plan


_plans: dict[Hashable, Plan] = {}


def forget_plans() -> None:
    """Drop all plans: the next call of each kind goes the long way."""
    _plans.clear()


def described(tensors: Tensors) -> Hashable:
    """What launches and checks depend on beside addresses."""
    found = tuple([x if x is None else (x.shape, x.stride(), x.dtype, x.device) for x in tensors])
    if not _STORAGES_MATTER:
        return found
    return found, tuple([x if x is None else x.untyped_storage().nbytes() < 2**31 for x in tensors])


def distinct(tensors: Tensors) -> Tensors:
    """The same with no object twice: `keep` tells an argument's tensor by its object, and the next call may have two where this one has one."""
    seen: set[int] = set()
    result: list[Tensor | None] = []
    for x in tensors:
        if x is not None and id(x) in seen:
            x = x.view_as(x)
        seen.add(id(x))
        result.append(x)
    return tuple(result)


def _alignment(pointers: list[int]) -> Hashable:
    """Which addresses are multiples of 16: 0 where all are."""
    if not functools.reduce(operator.or_, pointers) & 15:
        return 0
    return tuple([not pointer & 15 for pointer in pointers])


def _hooked() -> bool:
    """Whether somebody listens to launches, as profilers do."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def _settings() -> Hashable:
    """Triton's settings that a launch is compiled by and that programs change."""
    runtime, compilation = knobs.runtime, knobs.compilation
    return runtime.debug, runtime.add_stages_inspection_hook, compilation.instrumentation_mode


def _parts(
    tensors: Tensors, launches: list[Launch], places: dict[Hashable, int]
) -> list[tuple[int, int]] | None:
    """Arguments that are views of the call's memory, entered into `places`; None where one is neither that nor one of its tensors."""
    owners = {x.untyped_storage().data_ptr(): i for i, x in enumerate(tensors) if x is not None}
    parts: list[tuple[int, int]] = []
    for launch in launches:
        for value in launch.arguments.values():
            if isinstance(value, Tensor) and id(value) not in places:
                owner = owners.get(value.untyped_storage().data_ptr())
                if owner is None:
                    return None
                whole: Any = tensors[owner]
                places[id(value)] = len(tensors) + len(parts)
                parts.append((owner, _begins(value) - _begins(whole)))
    return parts


def _begins(x: Tensor) -> int:
    """Bytes from the beginning of the storage: an empty tensor has no address."""
    return int(x.storage_offset()) * x.element_size()
