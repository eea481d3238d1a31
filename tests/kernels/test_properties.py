"""The properties of the semantics that hold for the operator itself: isolation, packing, shifts, switches, determinism."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from dti_kernels import HiddenStateReset, StreamLayout, windowed_attn, windowed_attn_reference
from dti_kernels import reset as reset_module
from tests.cases import Case, Inputs, named
from tests.numerics import FLOAT64_RELATIVE

BASE = named("prefix")
IMPLEMENTATIONS = [windowed_attn, windowed_attn_reference]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_k_1_is_dense_causal_attention(implementation) -> None:
    """Property 1: [prefix, window, target, SUM] as one dense causal sequence with the same scores."""
    case = Case(
        "k1",
        [[3, 2, 4]],
        [[1, 1, 0]],
        [1],
        window=2,
        prefix_lengths=[2],
        alibi=False,
        reset=None,
        separate_k_sum=False,
    )
    x = case.inputs(torch.float64)
    q, k, v = (x.leaves[n].detach().transpose(0, 1) for n in ("q", "k", "v"))
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert (x.call(implementation) - dense.transpose(0, 1)).abs().max() < FLOAT64_RELATIVE


@pytest.mark.parametrize("name", ["prefix", "several_blocks", "k_50", "dti_minus"])
def test_what_a_row_may_not_see_cannot_change_it(name: str) -> None:
    """Property 4: bitwise equal rows under any change of invisible keys, values and initial states; gradient exactly 0."""
    case = named(name)
    x = case.inputs(torch.float32)
    out = x.call(windowed_attn)
    visible = x.layout.dense_visibility()
    num_context = x.layout.num_context
    for key in range(0, num_context, max(1, num_context // 7)):
        changed = {n: leaf.detach().clone() for n, leaf in x.leaves.items()}
        for name_ in ("k", "v", "k_sum", "k_initial", "v_initial"):
            if name_ in changed:
                changed[name_][key] += 3.0
        other = dataclasses.replace(x, leaves=changed).call(windowed_attn)
        assert torch.equal(other[~visible[:, key]], out[~visible[:, key]])
        assert not torch.equal(other[visible[:, key]], out[visible[:, key]])


@pytest.mark.parametrize("name", ["prefix", "several_blocks"])
def test_gradient_of_what_a_row_may_not_see_is_exactly_zero(name: str) -> None:
    x = named(name).inputs(torch.float32)
    visible = x.layout.dense_visibility()
    num_context = x.layout.num_context
    for row in range(0, x.layout.num_rows, max(1, x.layout.num_rows // 9)):
        grads = torch.autograd.grad(x.call(windowed_attn)[row].sum(), list(x.leaves.values()))
        for leaf_name, grad in zip(x.leaves, grads):
            if leaf_name in ("k", "v", "k_sum", "k_initial", "v_initial"):
                assert (grad[:num_context][~visible[row]] == 0).all(), leaf_name
        grad_v = grads[list(x.leaves).index("v")]
        assert (grad_v[:num_context][visible[row]] != 0).any()


def test_nobody_else_sees_a_sum() -> None:
    x = BASE.inputs(torch.float32)
    out, num_context = x.call(windowed_attn), x.layout.num_context
    changed = {n: leaf.detach().clone() for n, leaf in x.leaves.items()}
    for name in ("q", "k", "v", "k_sum"):
        changed[name][num_context + 1] += 1.0
    other = dataclasses.replace(x, leaves=changed).call(windowed_attn)
    rows = torch.arange(x.layout.num_rows) != num_context + 1
    assert torch.equal(other[rows], out[rows])
    assert not torch.equal(other[~rows], out[~rows])


def select(x: Inputs, layout: StreamLayout, rows: torch.Tensor) -> torch.Tensor:
    """Run `layout` on the given rows of x's inputs."""
    context = rows[: layout.num_context]
    leaves = {
        n: leaf if n == "alibi_slopes" else leaf[context] if n.endswith("_initial") else leaf[rows]
        for n, leaf in x.leaves.items()
    }
    return dataclasses.replace(x, layout=layout, leaves=leaves).call(windowed_attn)


def test_packing_equals_running_apart_and_targets_do_not_matter() -> None:
    """Property 5."""
    case = named("several_blocks")
    x = case.inputs(torch.float64)
    out, num_context = x.call(windowed_attn), x.layout.num_context
    context_first = sum_first = 0
    for i in range(len(case.item_lengths)):
        parts = [p[i : i + 1] for p in (case.item_lengths, case.label_lengths, case.num_targets)]
        alone = StreamLayout.build(*parts, window=case.window, prefix_lengths=case.prefix_lengths[i : i + 1])
        context = torch.arange(context_first, context_first + alone.num_context)
        sums = torch.arange(num_context + sum_first, num_context + sum_first + alone.num_sum)
        rows = torch.cat([context, sums])
        assert (select(x, alone, rows) - out[rows]).abs().max() < FLOAT64_RELATIVE
        bare = StreamLayout.build(
            *parts[:2], [0], window=case.window, prefix_lengths=case.prefix_lengths[i : i + 1]
        )
        assert (select(x, bare, context) - out[context]).abs().max() < FLOAT64_RELATIVE
        context_first, sum_first = context_first + alone.num_context, sum_first + alone.num_sum


def test_streaming_equals_sliding_windows_in_one_layer() -> None:
    """Property 3 for one attention call: each [SUM] row equals that of its own sliding-window prompt, prefix included."""
    items, labels, window, prefix = [3, 2, 4, 1, 5, 2, 6, 3], [1, 2, 1, 0, 1, 1, 1, 1], 3, 2
    stream = Case("s", [items], [labels], [len(items)], window, [prefix]).inputs(torch.float64)
    out = stream.call(windowed_attn)
    starts = [prefix + sum(items[:t]) + sum(labels[:t]) for t in range(len(items))]
    for t in range(len(items)):
        first = max(0, t - window)
        alone = StreamLayout.build([items[first : t + 1]], [[*labels[first:t], 0]], [1], window, [prefix])
        context = torch.cat([torch.arange(prefix), torch.arange(starts[first], starts[t] + items[t])])
        row = stream.layout.num_context + t
        rows = torch.cat([context, torch.tensor([row])])
        assert (select(stream, alone, rows)[-1] - out[row]).abs().max() < FLOAT64_RELATIVE


def test_zero_ratios_are_no_reset_and_zero_slopes_no_alibi() -> None:
    """Property 6."""
    x = BASE.inputs(torch.float64)
    zeroed = dataclasses.replace(x, reset=(0.0, 0.0, 1.0)).call(windowed_attn)
    without = dataclasses.replace(x, reset=None).call(windowed_attn)
    assert (zeroed - without).abs().max() < FLOAT64_RELATIVE
    flat = dataclasses.replace(
        x, leaves=x.leaves | {"alibi_slopes": torch.zeros_like(x.leaves["alibi_slopes"])}
    )
    none = dataclasses.replace(x, leaves={n: leaf for n, leaf in x.leaves.items() if n != "alibi_slopes"})
    assert (flat.call(windowed_attn) - none.call(windowed_attn)).abs().max() < FLOAT64_RELATIVE


def test_two_runs_are_bitwise_equal() -> None:
    """Property 7."""
    x = named("several_blocks").inputs(torch.float32)
    first, second = x.run(windowed_attn), x.run(windowed_attn)
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_reset_ratios() -> None:
    """a(0) = 0, a(n / 2) halfway, monotone in between (semantics, section 5)."""
    empty = torch.empty(0)
    ratios = HiddenStateReset(empty, empty, 0.2, 0.8).ratios(20, torch.float64, torch.device("cpu"))
    assert ratios.shape == (21,)
    assert ratios[0] == 0
    assert abs(float(ratios[10]) - 0.5) < FLOAT64_RELATIVE
    assert (ratios[1:].diff() > 0).all()


def test_reset_ratios_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU got them with every call of every layer. Tables made in inference must serve training, and tracing must not be kept."""
    layout = named("full_reset").layout()
    monkeypatch.setattr(reset_module, "_tables", {})

    def table(steepness: float = 0.7) -> torch.Tensor:
        reset = HiddenStateReset(torch.empty(0), torch.empty(0), 0.1, 0.8, steepness)
        return reset.ratios(layout.reset_window, torch.float32, layout.device)

    with torch.inference_mode():
        first = table()
    assert table() is first
    assert not first.is_inference()
    other = table(steepness=0.6)
    assert not torch.equal(other, first)
    with FakeTensorMode():
        assert isinstance(table(), FakeTensor)
        assert isinstance(table(steepness=0.123), FakeTensor)
    assert not isinstance(table(steepness=0.123), FakeTensor)
    before = len(reset_module._tables)
    for steepness in range(1, reset_module._MAX_TABLES + 2):
        table(steepness=1000.0 + steepness)
    assert before < len(reset_module._tables) == reset_module._MAX_TABLES
    assert table() is first, "a captured graph may read it"
    monkeypatch.setattr(reset_module, "_tables", {})
    reset = HiddenStateReset(torch.empty(0), torch.empty(0), 0.1, 0.8)
    for farthest in (5000, 6000):  # another table for every length of a batch
        reset.ratios(10**9, torch.float32, layout.device, farthest)
    assert not reset_module._tables


@pytest.mark.parametrize(
    "kwargs", [{"alpha_min": -0.1}, {"alpha_max": 1.1}, {"alpha_min": 0.9}, {"steepness": 0.0}]
)
def test_bad_reset_is_refused(kwargs: dict) -> None:
    empty = torch.empty(0)
    with pytest.raises(ValueError, match="alpha_min|steepness"):
        HiddenStateReset(empty, empty, **({"alpha_min": 0.1, "alpha_max": 0.5} | kwargs))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda x: {"q": x["q"][:-1]}, ValueError, r"q must have shape"),
        (lambda x: {"k": x["k"].float()}, TypeError, r"k must have q's floating point dtype"),
        (lambda x: {"v": x["v"][..., :-1]}, ValueError, r"v must have shape .*got"),
        (lambda x: {"k_sum": x["k_sum"][:, :, None]}, ValueError, r"k_sum must be \(rows, heads, head_dim\)"),
        (lambda x: {"k_initial": x["k"]}, ValueError, r"reset.k_initial must have shape"),
        (
            lambda x: {"alibi_slopes": x["alibi_slopes"][:1]},
            ValueError,
            r"alibi_slopes must be floating point",
        ),
        (
            lambda x: {"q": x["q"][:, :1].expand(-1, 3, -1), "k": x["k"].expand(-1, 2, -1)},
            ValueError,
            "multiple of k's",
        ),
        (lambda x: {"q": None}, TypeError, "q must be a Tensor, got NoneType"),
    ],
)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bad_arguments_are_named(implementation, change, error, message) -> None:
    x = BASE.inputs(torch.float64)
    with pytest.raises(error, match=message):
        dataclasses.replace(x, leaves=x.leaves | change(x.leaves)).call(implementation)
    with pytest.raises(TypeError, match="layout must be a StreamLayout"):
        dataclasses.replace(x, layout=None).call(implementation)


@pytest.mark.parametrize("name", ["prefix", "several_blocks", "gqa_3", "no_targets_in_one"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_queries_of_sum_rows_only(implementation, name: str) -> None:
    """q may hold the [SUM] rows alone: same rows, same gradients as when the context rows' output is not used."""
    x = named(name).inputs(torch.float64)
    num_context = x.layout.num_context
    context_unused = torch.cat([torch.zeros_like(x.grad_out[:num_context]), x.grad_out[num_context:]])
    full = dataclasses.replace(x, grad_out=context_unused).run(implementation)
    q_sum = x.leaves["q"].detach()[num_context:].requires_grad_()
    alone = dataclasses.replace(x, leaves=x.leaves | {"q": q_sum}, grad_out=x.grad_out[num_context:]).run(
        implementation
    )
    full["out"], full["dq"] = full["out"][num_context:], full["dq"][num_context:]
    for leaf in full:
        assert (full[leaf] - alone[leaf]).abs().max() < FLOAT64_RELATIVE * max(1, full[leaf].abs().max()), (
            leaf
        )
