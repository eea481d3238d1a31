"""Hostile arguments of the public names: taken as what they are, or a TypeError or ValueError that names the argument. Nothing else.

Whatever was given once ended the process (SIGFPE, SIGSEGV), gave memory that nobody wrote, or was taken for a number that it is not.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from dti_kernels import (
    HiddenStateReset,
    StreamLayout,
    candidate_layout,
    default_alibi_slopes,
    testing,
    windowed_attn,
    windowed_attn_reference,
)
from dti_kernels.layout import START, STOP, check_spans
from tests.cases import named

NO_INTEGERS = [
    None,
    True,
    3.7,
    float("nan"),
    "3",
    "",
    b"\x02",
    1j,
    [1],
    np.float32(1.5),
    np.bool_(True),
    np.array(3),
    torch.tensor(3),
]
NO_COUNTS = [-1, -(2**63), 2**30, 2**62, 2**70, -(10**5000), np.uint64(2**63 + 5)]
NO_SEQUENCES = [
    *(None, True, 3, 2.5, "12", b"\x01\x02", {1: 2}, {1, 2}, iter([1]), torch.tensor([1, 2])),
    *(np.array(3), np.array([1.0, 2.0]), np.array([True]), np.array(["1"]), np.array([[1, 2]])),
    np.ma.masked_array([1, 2], [0, 1]),
]
LAYOUT = {
    "item_lengths": [[2, 2]],
    "label_lengths": [[1, 1]],
    "num_targets": [1],
    "window": 2,
    "prefix_lengths": [1],
}
CANDIDATES = {**LAYOUT, "candidate_lengths": [[1, 1]]}
del CANDIDATES["num_targets"]
NESTED = ("item_lengths", "label_lengths", "candidate_lengths")
CONSTRUCTORS = [(StreamLayout.build, LAYOUT), (candidate_layout, CANDIDATES)]


def refused(error: type[Exception] | tuple[type[Exception], ...], name: str, call: Callable[[], Any]) -> None:
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert name in message
    assert "\n" not in message
    assert len(message) < 250


@pytest.mark.parametrize(("build", "good"), CONSTRUCTORS, ids=["build", "candidates"])
def test_counts_are_integers(build: Callable, good: dict) -> None:
    """3.7 was taken as 3, "3" as 3 and True as 1."""
    for name in good:
        place = {"window": "window", **dict.fromkeys(NESTED, f"{name}[0][1]")}.get(name, f"{name}[0]")
        for value in NO_INTEGERS:
            wrong = value if name == "window" else [[1, value]] if name in NESTED else [value]
            refused(TypeError, place, lambda name=name, wrong=wrong: build(**(good | {name: wrong})))


@pytest.mark.parametrize(("build", "good"), CONSTRUCTORS, ids=["build", "candidates"])
def test_counts_fit(build: Callable, good: dict) -> None:
    """Four of 2**62 added up to 0 rows, whose memory was written behind (SIGSEGV); 64 bits gave an OverflowError."""
    for name in good:
        for value in NO_COUNTS:
            if name in ("window", "num_targets") and 0 < value < 2**63:
                continue  # everything, and all of them
            wrong = value if name == "window" else [[1, value]] if name in NESTED else [value]
            refused(ValueError, name, lambda name=name, wrong=wrong: build(**(good | {name: wrong})))
    many = {**good, "item_lengths": [[2**29, 2**29]]}
    refused(ValueError, "fewer than 2**30 rows", lambda: build(**many))


def test_candidates_fit() -> None:
    """A layout of 1.6 thousand million rows was made: 42 GiB."""
    refused(ValueError, "fewer than 2**30 rows", lambda: candidate_layout([[2]], [[1]], [[2**29] * 3], 20))
    refused(ValueError, "fewer than 2**30 rows", lambda: StreamLayout.build([[2**30 - 2]], [[1]], [1], 20))


@pytest.mark.parametrize(("build", "good"), CONSTRUCTORS, ids=["build", "candidates"])
def test_sequences_are_sequences(build: Callable, good: dict) -> None:
    """At the depth that they are asked for: tensors, strings and sets are none."""
    for name in good:
        if name == "window":
            continue
        for value in NO_SEQUENCES:
            if value is None and name == "prefix_lengths":
                continue
            if name not in NESTED:
                refused(TypeError, name, lambda name=name, value=value: build(**(good | {name: value})))
                continue
            inner = good | {name: [value]}
            refused(TypeError, f"{name}[0]", lambda inner=inner: build(**inner))
            if not (isinstance(value, np.ndarray) and value.ndim == 2):
                refused(TypeError, name, lambda name=name, value=value: build(**(good | {name: value})))
        refused(TypeError, name, lambda name=name: build(**(good | {name: [[[1]]]})))


def test_what_counts_may_be() -> None:
    """NumPy's integers of any width, arrays, tuples and ranges; an empty array is of floats."""
    expected = StreamLayout.build([[2, 3], [], [1]], [[1, 0], [], [0]], [2, 0, 1], 4, [1, 1, 0])
    alike = [
        (
            [np.array([2, 3], np.uint8), np.array([]), np.array([1])],
            [np.array([1, 0]), np.array([]), np.array([0])],
        ),
        ([(2, np.int16(3)), range(0), [np.uint64(1)]], [[1, 0], (), np.array([0], np.uint64)]),
        (np.array([[2, 3], [], [1]], dtype=object), [np.array([1, 0]), [], [0]]),
    ]
    for items, labels in alike:
        layout = StreamLayout.build(items, labels, np.array([99, 0, 2**62]), np.int8(4), (1, 1, 0))
        assert torch.equal(layout.rows, expected.rows)
        assert torch.equal(layout.keys, expected.keys)
    assert StreamLayout.build(np.array([[2, 3]]), np.array([[1, 0]]), [2**63 - 1], 2**62).num_sum == 2


def test_random_arguments_of_layouts() -> None:
    """Any of these in any place."""
    rng = random.Random(3)
    pool = [*NO_INTEGERS, *NO_COUNTS, *NO_SEQUENCES, 0, 1, 2, [], [[]], (), [1, 2], np.int64(1), np.array([])]

    def spoilt(value: Any) -> Any:
        if not isinstance(value, list) or not value or rng.random() < 0.3:
            return rng.choice(pool)
        place = rng.randrange(len(value))
        return [*value[:place], spoilt(value[place]), *value[place + 1 :]]

    outcomes = {"made": 0, "refused": 0}
    for _ in range(600):
        build, good = rng.choice(CONSTRUCTORS)
        name = rng.choice(list(good))
        arguments = good | {name: spoilt(good[name])}
        try:
            layout = build(**arguments)
        except (TypeError, ValueError):
            outcomes["refused"] += 1
        else:
            check_spans(layout.rows, layout.keys)
            outcomes["made"] += 1
    assert min(outcomes.values()) > 20


@pytest.mark.parametrize("value", [0, -1, 2**16, 2**70])
def test_heads_of_slopes_fit(value: int) -> None:
    """2**40 heads asked for memory until the process was ended."""
    refused(ValueError, "num_heads", lambda: default_alibi_slopes(value))


def test_heads_of_slopes_are_an_integer() -> None:
    for value in NO_INTEGERS:
        refused(TypeError, "num_heads", lambda value=value: default_alibi_slopes(value))


@pytest.mark.parametrize("name", ["alpha_min", "alpha_max", "steepness", "alpha_own"])
def test_settings_of_the_reset_are_numbers(name: str) -> None:
    """A tensor was taken, and its gradient lost; 10**400 ended in an OverflowError."""
    good = {"alpha_min": 0.1, "alpha_max": 0.8, "steepness": 1.0, "alpha_own": 0.0}
    empty = torch.empty(0)
    for value in (None, True, "0.5", 1j, [0.5], np.array(0.5), torch.tensor(0.5), np.bool_(True)):
        refused(TypeError, name, lambda value=value: HiddenStateReset(empty, empty, **(good | {name: value})))
    for value in (-0.1, float("nan"), float("inf"), 10**400, -(10**5000), np.float32("nan")):
        refused(
            ValueError, name, lambda value=value: HiddenStateReset(empty, empty, **(good | {name: value}))
        )
    HiddenStateReset(empty, empty, **(good | {name: np.float32(good[name])}))


X = named("prefix").inputs(torch.float32)
WRONG_TENSORS: dict[str, Callable[[torch.Tensor], Any]] = {
    "none of another device": lambda x: x.to("meta"),
    "no list": lambda x: x.tolist(),
    "no array": lambda x: x.numpy(),
    "no integers": lambda x: x.int(),
    "no bools": lambda x: x > 0,
    "no complex numbers": lambda x: x.to(torch.complex64),
    "none of 8 bits": lambda x: x.to(torch.float8_e4m3fn),
    "none quantised": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
    "none sparse": lambda x: x.to_sparse(),
    "none nested": lambda x: torch.nested.as_nested_tensor([x, x]),
    "no scalar": lambda x: x.sum(),
    "no rows too few": lambda x: x[:-1],
    "no dimension too many": lambda x: x[None],
    "no heads of 0": lambda x: x[:, :0] if x.ndim == 3 else x[:0],
    "no head_dim of 0": lambda x: x[..., :0],
}


@pytest.mark.parametrize("implementation", [windowed_attn, windowed_attn_reference])
@pytest.mark.parametrize("wrong", WRONG_TENSORS.values(), ids=WRONG_TENSORS)
@pytest.mark.filterwarnings("ignore::UserWarning")  # nested tensors are a prototype
def test_tensors_are_refused(implementation: Callable, wrong: Callable[[torch.Tensor], Any]) -> None:
    """No heads: SIGFPE. Slopes of another device: memory that nobody wrote. As a list: AttributeError. head_dim 0: ZeroDivisionError."""
    for name, leaf in X.leaves.items():
        changed = dataclasses.replace(X, leaves=X.leaves | {name: wrong(leaf.detach())})
        refused((TypeError, ValueError), "", lambda changed=changed: changed.call(implementation))


@pytest.mark.parametrize("implementation", [windowed_attn, windowed_attn_reference])
def test_what_is_no_tensor_is_refused(implementation: Callable) -> None:
    x, layout = X.leaves["q"].detach(), X.layout
    for value in (*NO_INTEGERS[1:-1], object(), 3):
        for name in ("k_sum", "alibi_slopes", "reset"):
            refused(
                TypeError,
                name,
                lambda name=name, value=value: implementation(x, x, x, layout, **{name: value}),
            )
        for name in "qkv":
            arguments = {"q": x, "k": x, "v": x} | {name: value}
            refused(TypeError, name, lambda arguments=arguments: implementation(**arguments, layout=layout))
    for value in (True, "0.5", 1j, [0.5], torch.tensor(0.5)):
        refused(TypeError, "scale", lambda value=value: implementation(x, x, x, layout, scale=value))
    for value in (-1, float("nan"), 10**400):
        refused(ValueError, "scale", lambda value=value: implementation(x, x, x, layout, scale=value))


def test_layouts_made_by_hand_are_checked() -> None:
    """By their constructor, `dataclasses.replace` included; what was changed later, by the operators."""
    layout = X.layout
    rows, keys = layout.rows, layout.keys
    for name, value in (
        *(("rows", value) for value in (None, rows.tolist(), rows.numpy(), rows.long(), rows.float())),
        *(("window", value) for value in NO_INTEGERS),
        *(("reset_window", value) for value in NO_INTEGERS),
        *(("mean_span", value) for value in NO_INTEGERS),
    ):
        refused(TypeError, name, lambda name=name, value=value: dataclasses.replace(layout, **{name: value}))
    for name, value in (
        *(("rows", value) for value in (rows[:6], rows[0], rows[..., None], rows[:, :3], rows.to("meta"))),
        *(("keys", value) for value in (rows, keys[:3], keys + 1000, keys - 1000)),
        *(("rows", value) for value in (rows + 1, rows - 1, rows.flip(1), rows * 0)),
        *(("window", value) for value in (-1, 2**63)),
        ("mean_span", 0),
    ):
        refused(ValueError, name, lambda name=name, value=value: dataclasses.replace(layout, **{name: value}))
    assert dataclasses.replace(layout, mean_span=256).mean_span == 256


@pytest.mark.parametrize("choice", ["native", "torch"])
@pytest.mark.parametrize(("field", "value"), [(STOP, 10**6), (START, -5), (STOP, 1)])
def test_a_layout_that_was_changed_is_refused(
    choice: str, field: int, value: int, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Keys were read where there are none: SIGSEGV. In PyTorch, also behind a plan that was made before."""
    if choice == "native":
        request.getfixturevalue("native")
    monkeypatch.setenv("DTI_CPU", choice)
    layout = named("prefix").layout()
    changed = dataclasses.replace(X, layout=layout)
    out = changed.call(windowed_attn)
    layout.rows.numpy()[field, -1] = value  # which autograd does not notice
    with pytest.raises(
        ValueError, match=r"^rows\[:, \d+\] is of no layout of \d+ context keys.*Use StreamLayout.build"
    ):
        changed.call(windowed_attn)
    with pytest.raises(ValueError, match=r"^rows\[:, "):
        out.sum().backward()


def test_without_data() -> None:
    """A layout and inputs on the meta device have a shape: they ended in a RuntimeError about autocast."""
    x = X.leaves["q"].detach().to("meta")
    out = windowed_attn(x, x, x, X.layout.to("meta"))
    assert out.is_meta
    assert out.shape == x.shape
    refused(ValueError, "q's heads", lambda: windowed_attn(x[:, :0], x, x, X.layout.to("meta")))


def test_views_of_any_kind() -> None:
    """Expanded, flipped, conjugated, without memory of their own, subclasses: computed like their copies."""

    class Subclass(torch.Tensor):
        pass

    x, layout = X.leaves["q"].detach(), X.layout
    for view in (
        x[:1].expand(x.shape),
        x.flip(0),
        x.permute(2, 1, 0).contiguous().permute(2, 1, 0),
        torch.complex(x, x).conj().imag,
        torch._efficientzerotensor(x.shape),
        x.as_subclass(Subclass),
        torch.nn.Parameter(x),
    ):
        copy = torch.zeros(x.shape) + view
        assert torch.equal(windowed_attn(view, view, view, layout), windowed_attn(copy, copy, copy, layout))


@pytest.mark.parametrize(
    ("change", "error", "name"),
    [
        ({"dtype": torch.int32}, TypeError, "dtype"),
        ({"dtype": "float32"}, TypeError, "dtype"),
        ({"layout": None}, TypeError, "layout"),
        ({"scale": "1"}, TypeError, "scale"),
        ({"grad_out": None}, TypeError, "grad_out"),
        ({"grad_out": X.grad_out[:-1]}, ValueError, "grad_out"),
        ({"reset": None}, ValueError, "'k_initial', 'v_initial'] unknown"),
        ({"inputs": {"q": X.leaves["q"]}}, ValueError, "'k', 'v', 'k_initial', 'v_initial'] missing"),
        ({"inputs": X.leaves | {"k": X.leaves["k"][:-1]}}, ValueError, "k must have shape"),
        ({"inputs": X.leaves | {"k": [1.0]}}, TypeError, "k must be a Tensor, got list"),
    ],
)
def test_budgets_name_what_is_wrong(change: dict, error: type[Exception], name: str) -> None:
    """A KeyError, an AttributeError or a message about matmuls, which name no argument."""
    good = {"inputs": X.leaves, "grad_out": X.grad_out, "layout": X.layout}
    good |= {"dtype": torch.float32, "reset": X.reset_settings}
    refused(error, name, lambda: testing.error_budgets(**(good | change)))


def test_shares_name_what_is_wrong() -> None:
    one = {"out": torch.ones(2, 1, 4)}
    budgets = {"out": testing.Budget(torch.ones(2, 1, 4), torch.zeros(2, 1, 4))}
    assert testing.shares(one, one, budgets, torch.float32) == {"out": 0.0}
    refused(ValueError, "budgets", lambda: testing.shares(one, one, {}, torch.float32))
    refused(TypeError, "out", lambda: testing.shares({"out": [1.0]}, one, budgets, torch.float32))
    refused(TypeError, "golden out", lambda: testing.shares(one, {"out": 1.0}, budgets, torch.float32))
    refused(TypeError, "out", lambda: testing.shares({"out": one["out"].int()}, one, budgets, torch.float32))
    refused(TypeError, "dtype", lambda: testing.shares(one, one, budgets, torch.int64))


@pytest.mark.parametrize("num_bytes", [0, 64])
@pytest.mark.usefixtures("implementation")
def test_memory_that_was_freed_is_not_read(num_bytes: int) -> None:
    """As sharded training frees it: the tensor keeps its shape. SIGSEGV."""
    x, layout = X.leaves["q"].detach(), X.layout
    for name in ("q", "k", "v"):
        for like in (x, x.permute(2, 1, 0).contiguous().permute(2, 1, 0)):
            freed = like.clone()
            freed.untyped_storage().resize_(num_bytes)
            arguments = {"q": x, "k": x, "v": x, name: freed}
            refused(
                ValueError,
                f"{name} must have",
                lambda arguments=arguments: windowed_attn(**arguments, layout=layout),
            )
