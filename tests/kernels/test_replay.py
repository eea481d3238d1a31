"""Calls that launch again what an earlier one compiled launch exactly what the long way would: no GPU is needed to see that."""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from dti_kernels import windowed_attn
from dti_kernels.contract import checked_inputs
from dti_kernels.gpu.tiles import Tile, forced
from dti_kernels.inputs import NUM_TENSORS, Inputs
from tests.cases import CASES, Case, named
from tests.kernels import gpu_calls

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    "TRITON_INTERPRET" in os.environ, reason="interpreted kernels are not launched"
)

from benchmarks.measuring import Door, launches_at_the_door, warm_up  # noqa: E402
from dti_kernels.gpu import Batch, Launch, backward_launches, forward_launches, replay  # noqa: E402
from dti_kernels.gpu.backward import Buffers, Memory  # noqa: E402


def the_long_way(x: Inputs, tensors: replay.Tensors) -> list[Launch]:
    """The launches of a call, from all its tensors."""
    others: Any = tensors[NUM_TENSORS:]
    batch = Batch(x.of_tensors(tensors[:NUM_TENSORS]))
    if len(others) == 3:
        return forward_launches(batch, *others)
    grad_out, out, lse, *memory = others
    return backward_launches(batch, Buffers.of(batch, Memory(*memory)), grad_out, out, lse)


def value_of(argument: Any) -> Any:
    return argument.data_ptr() if isinstance(argument, Tensor) else argument


@contextmanager
def compared(door: Door) -> Iterator[list[bool]]:
    """Inside, every call that launches again is compared with the long way: Triton's binder must choose the very kernels that were launched,
    for the very arguments. The list has whether each call did launch again."""
    again: list[bool] = []
    run_again, plan_of, current = replay.Plan.run_again, replay.plan_of, []

    def remember(kind: str, x: Inputs, saved: tuple[Tensor, ...] = ()) -> replay.Plan:
        current[:] = [x]
        return plan_of(kind, x, saved)

    def compare(plan: replay.Plan, tensors: replay.Tensors) -> bool:
        before = len(door.launched)
        again.append(run_again(plan, tensors))
        launched = door.launched[before:]
        expected = the_long_way(current[0], replay.distinct(tensors)) if again[-1] else []
        assert len(launched) == len(expected)
        for (kernel, grid, arguments), launch in zip(launched, expected):
            num_compiled = len(door.compiled)
            assert kernel is warm_up(launch), launch.kernel.fn.__name__
            assert len(door.compiled) == num_compiled, "Triton would compile another kernel"
            assert grid == (*launch.grid, 1)
            wanted = [value_of(launch.arguments[name]) for name in launch.kernel.arg_names]
            assert list(map(type, arguments)) == list(map(type, wanted))
            assert list(arguments) == wanted
        return again[-1]

    with (
        mock.patch.object(replay.Plan, "run_again", compare),
        mock.patch("dti_kernels.gpu.forward.plan_of", remember),
        mock.patch("dti_kernels.gpu.backward.plan_of", remember),
    ):
        yield again


@pytest.mark.parametrize("arch", ["sm_90", "sm_80"])
def test_every_case_launches_again_what_the_long_way_would(arch: str) -> None:
    with launches_at_the_door(arch) as door, compared(door) as again:
        for dtype in gpu_calls.DTYPES:
            for case in (*CASES, *gpu_calls.REAL_CASES):
                calls: list[Callable[[], None]] = [partial(gpu_calls.run, case, dtype)]
                if not case.name.startswith("no_targets"):
                    calls.append(partial(gpu_calls.run_sums_only, case, dtype))
                for call in calls:
                    call()
                    again.clear()
                    call()
                    assert again == [True, True], case.name


def test_amd_too() -> None:
    """Triton for AMD specialises on more than addresses."""
    with (
        launches_at_the_door("gfx942") as door,
        compared(door) as again,
        mock.patch.object(replay, "_STORAGES_MATTER", True),
    ):
        for _ in range(2):
            again.clear()
            gpu_calls.run(named("gqa_4"), torch.bfloat16)
        assert again == [True, True]


CASE = replace(named("prefix"), num_heads=4, num_groups=2, head_dim=16)


def inputs(case: Case = CASE, dtype: torch.dtype = torch.bfloat16) -> tuple[Inputs, Tensor]:
    x = case.inputs(dtype)
    leaves = {name: leaf.detach() for name, leaf in x.leaves.items()}
    return checked_inputs(replace(x, leaves=leaves).leaves, x.layout, x.reset_settings, 0.25), x.grad_out


def call(x: Inputs, grad_out: Tensor) -> None:
    out, lse = torch.ops.dti.windowed_attn_fwd(*x)
    torch.ops.dti.windowed_attn_bwd(*x, grad_out, out, lse, True)


def shifted(x: Tensor) -> Tensor:
    """The same at an address that is no multiple of 16."""
    moved = x.new_empty(x.numel() + 1)[1:].view(x.shape)
    assert moved.data_ptr() % 16
    return moved.copy_(x)


def strided(x: Tensor) -> Tensor:
    """The same as a part of wider rows."""
    return torch.cat([x, x], 1)[:, : x.shape[1]]


def transposed(x: Tensor) -> Tensor:
    """The same with strides that no kernel addresses."""
    return x.permute(2, 1, 0).contiguous().permute(2, 1, 0)


THREE_DIMENSIONS = ("q", "k", "v", "k_sum", "k_initial", "v_initial", "grad_out", "all")
AWKWARD = [(name, change) for name in THREE_DIMENSIONS for change in (shifted, strided, transposed)]


@pytest.mark.parametrize(("name", "change"), [*AWKWARD, ("slopes", shifted), ("ratios", shifted)])
def test_awkward_tensors(name: str, change: Callable[[Tensor], Tensor]) -> None:
    """Calls with and without them take turns: each finds its own kernels, or goes the long way the first time."""
    x, grad_out = inputs()
    three = [field for field, value in x._asdict().items() if isinstance(value, Tensor) and value.ndim == 3]
    fields = [*three, "grad_out"] if name == "all" else [name]
    awkward = x._replace(**{field: change(getattr(x, field)) for field in fields if field != "grad_out"})
    awkward_grad = change(grad_out) if "grad_out" in fields else grad_out
    with launches_at_the_door("sm_90") as door, compared(door) as again:
        call(x, grad_out)
        call(awkward, awkward_grad)
        again.clear()
        for _ in range(2):
            call(x, grad_out)
            call(awkward, awkward_grad)
        assert again == [True] * 8


def test_misaligned_is_compiled_for_itself() -> None:
    """The comparison above can fail: Triton does compile other kernels for such addresses, and a plan keeps both."""
    x, grad_out = inputs()
    with launches_at_the_door("sm_90") as door:
        call(x, grad_out)
        num_compiled = len(door.compiled)
        call(x._replace(v=shifted(x.v)), grad_out)
        assert len(door.compiled) > num_compiled


def test_a_wrong_kernel_is_found() -> None:
    """The comparison above can fail: a plan that forgot addresses is caught."""
    x, grad_out = inputs()
    with (
        launches_at_the_door("sm_90") as door,
        compared(door),
        mock.patch.object(replay, "_alignment", return_value=0),
    ):
        call(x, grad_out)
        with pytest.raises(AssertionError):
            call(x._replace(v=shifted(x.v)), grad_out)


def test_one_tensor_twice() -> None:
    """The first call's keys were its values too; the second's are not."""
    x, grad_out = inputs()
    with launches_at_the_door("sm_90") as door, compared(door) as again:
        call(x._replace(v=x.k, k_sum=x.k, v_initial=x.k_initial), grad_out)
        call(x, grad_out)
        assert again == [False, False, True, True]


def test_other_tiles_and_settings_are_other_kernels() -> None:
    from triton import knobs

    x, grad_out = inputs()
    tile = Tile(16, 32, 2, 1)
    with launches_at_the_door("sm_90") as door, compared(door) as again:
        for _ in range(2):
            call(x, grad_out)
            with forced({"ctx_fwd": tile, "sum_dkv": tile}):
                call(x, grad_out)
            with mock.patch.object(knobs.runtime, "debug", True):
                call(x, grad_out)
        assert again == [False] * 6 + [True] * 6


def test_nothing_is_kept_alive() -> None:
    x, grad_out = inputs()
    with launches_at_the_door("sm_90") as door:
        door.listening = False
        call(x, grad_out)
        alive = [weakref.ref(tensor) for tensor in (*x[:NUM_TENSORS], grad_out) if tensor is not None]
        ratios = x.ratios  # of a cached table
        del x, grad_out
        gc.collect()
        (table,) = (ref() for ref in alive if ref() is not None)
        assert table is ratios


def test_spans_of_another_layout_are_not_kept() -> None:
    """Two layouts of equal lengths share a plan: their arrays are addresses like all others."""
    x, grad_out = inputs()
    layout = CASE.layout()
    other = x._replace(rows=layout.rows, keys=layout.keys)
    with launches_at_the_door("sm_90") as door, compared(door) as again:
        call(x, grad_out)
        call(other, grad_out)
        assert again == [False, False, True, True]
        arguments = {value for _, _, values in door.launched[-10:] for value in values}
        assert {other.rows.data_ptr(), other.keys.data_ptr()} <= arguments
        assert not {x.rows.data_ptr(), x.keys.data_ptr()} & arguments


def test_plans_are_dropped() -> None:
    x, grad_out = inputs()
    with launches_at_the_door("sm_90"), mock.patch.object(replay, "_MOST_PLANS", 3):
        for scale in (0.1, 0.2, 0.3, 0.4):
            call(x._replace(scale=scale), grad_out)
            assert len(replay._plans) <= 3


def test_what_changes_in_place_is_seen() -> None:
    """A tensor that is resized, or a view of another place, is described anew."""
    x, grad_out = inputs()
    q = x.q.clone()
    with launches_at_the_door("sm_90") as door, compared(door) as again:
        call(x._replace(q=q), grad_out)
        q.set_(shifted(x.q))
        call(x._replace(q=q), grad_out)
        call(x._replace(q=q), grad_out)
        q.resize_(len(q) - 1, *q.shape[1:])
        with pytest.raises(ValueError, match="q must have shape"):
            call(x._replace(q=q), grad_out)
        assert again == [False] * 4 + [True] * 2


WRONG: dict[str, Callable[[Inputs], Inputs]] = {
    "k must have q's": lambda x: x._replace(k=x.k.half()),
    "k must have shape": lambda x: x._replace(k=x.k[1:]),
    "v must have shape": lambda x: x._replace(v=x.v[:, :1]),
    "k_sum must be": lambda x: x._replace(k_sum=x.v[0]),
    "is on meta": lambda x: x._replace(v_initial=x.q[: x.num_context, :2].to("meta")),
    "together": lambda x: x._replace(ratios=None),
    "ratios must be": lambda x: x._replace(ratios=x.k.float()[:, 0, 0]),
    "alibi_slopes must be": lambda x: x._replace(slopes=x.q[0, 0]),
    "rows must be of": lambda x: x._replace(rows=x.rows.long()),
    "keys must have shape": lambda x: x._replace(keys=x.keys[1:]),
}


@pytest.mark.parametrize("message", WRONG)
def test_calls_like_none_before_are_checked(message: str) -> None:
    """On a GPU the operators check only what they have not seen the like of."""
    x, grad_out = inputs()
    with launches_at_the_door("sm_90") as door:
        for _ in range(2):
            call(x, grad_out)
        num_launched = len(door.launched)
        for _ in range(2):
            with pytest.raises((TypeError, ValueError), match=message):
                replay.plan_of("forward", WRONG[message](x))
        out, lse = torch.ops.dti.windowed_attn_fwd(*x)
        for saved in ((grad_out[1:], out, lse), (grad_out, out.half(), lse), (grad_out, out, lse.bfloat16())):
            with pytest.raises((TypeError, ValueError), match="must have"):
                torch.ops.dti.windowed_attn_bwd(*x, *saved, True)
        assert len(door.launched) == num_launched + 3  # of the forward just above


def test_launch_hooks_are_called() -> None:
    """As profilers use them: before and after every launch, with the kernel's name."""
    from triton import knobs

    heard: list[tuple[str, str]] = []
    enter = lambda metadata: heard.append(("enter", metadata.get()["name"]))  # noqa: E731
    leave = lambda metadata: heard.append(("exit", metadata.get()["name"]))  # noqa: E731
    x, grad_out = inputs()
    with launches_at_the_door("sm_90") as door:
        call(x, grad_out)
        knobs.runtime.launch_enter_hook.add(enter)
        knobs.runtime.launch_exit_hook.add(leave)
        try:
            door.launched.clear()
            call(x, grad_out)
        finally:
            knobs.runtime.launch_enter_hook.remove(enter)
            knobs.runtime.launch_exit_hook.remove(leave)
        names = [kernel.name for kernel, _, _ in door.launched]
        assert len(names) == 10
        assert heard == [(when, name) for name in names for when in ("enter", "exit")]
        call(x, grad_out)
        assert len(heard) == 20


def test_the_public_function_launches_again() -> None:
    """With gradients and without."""
    x = CASE.inputs(torch.bfloat16)
    with launches_at_the_door("sm_90") as door, compared(door) as again:
        x.run(windowed_attn)
        with torch.no_grad():
            x.call(windowed_attn)
        x.run(windowed_attn)
        assert again == [False, False, True, True, True]
