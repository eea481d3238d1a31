"""Calls of the registered operators, right ones and wrong ones: what a caller may pass who does not go through `windowed_attn`.

A wrong call differs from a right one in one thing. Those in `READ_ELSEWHERE` are such that the compiled implementation would read memory that
is not theirs, or divide by zero, if nobody refused them: the sanitizers' proof that they arrive there is in test_raw_operators.py.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dti_kernels import HiddenStateReset, StreamLayout, candidate_layout
from dti_kernels.inputs import Inputs
from dti_kernels.layout import PREFIX_STOP, PROMPT_FIRST, RESET_ID, START, STOP
from tests.cases import CASES

KEY_LIKE = ("k", "v", "k_sum")
INITIAL = ("k_initial", "v_initial")
EXTREMES = (-(2**31), -1000, -1, 0, 1, 2**30, 2**30 + 1, 2**31 - 1)


@dataclass(frozen=True)
class Call:
    """Tensors by the names of the schema, and what the backward gets besides."""

    tensors: dict[str, Tensor | None]
    grad_out: Tensor

    @property
    def inputs(self) -> Inputs:
        return Inputs(**self.tensors, scale=0.25, mean_span=512)

    def forward(self) -> tuple[Tensor, Tensor]:
        return torch.ops.dti.windowed_attn_fwd(*self.inputs)

    def backward(self, out: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
        return torch.ops.dti.windowed_attn_bwd(*self.inputs, self.grad_out, out, lse, True)

    def changed(self, **tensors: Tensor | None) -> Call:
        return replace(self, tensors=self.tensors | tensors)

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.tensors[name]
        assert tensor is not None
        return tensor


def right_call(rng: random.Random, dtype: torch.dtype, layout: StreamLayout | None = None) -> Call:
    """Any layout, heads and switches; inputs of any strides."""
    layout = random_layout(rng) if layout is None else layout
    groups, per_group, depth = rng.choice([1, 2]), rng.choice([1, 3]), rng.choice([1, 4, 5, 16])
    num_rows, num_context = layout.num_rows, layout.num_context
    queries = layout.num_sum if rng.random() < 0.2 else num_rows

    def draw(rows: int, heads: int) -> Tensor:
        shape, strides = (rows, heads, depth), rng.random()
        if strides < 0.1:
            return torch.randn(1, 1, depth).to(dtype).expand(shape)
        if strides < 0.2:
            return torch.randn(depth, heads, rows).to(dtype).permute(2, 1, 0)
        return torch.randn(shape).to(dtype)

    heads = groups * per_group
    tensors: dict[str, Tensor | None] = {"q": draw(queries, heads)}
    tensors |= {name: draw(num_rows, groups) for name in KEY_LIKE}
    tensors |= {name: draw(num_context, groups) for name in INITIAL}
    wide = torch.promote_types(dtype, torch.float32)
    reset = HiddenStateReset(torch.empty(0), torch.empty(0), 0.1, 0.8)
    tensors["ratios"] = reset.ratios(layout.reset_window, wide, layout.device, num_context)
    tensors |= {"slopes": torch.rand(heads), "rows": layout.rows, "keys": layout.keys}
    if rng.random() < 0.3:
        tensors["k_sum"] = None
    if rng.random() < 0.3:
        tensors |= dict.fromkeys((*INITIAL, "ratios"))
    if rng.random() < 0.3:
        tensors["slopes"] = None
    return Call(tensors, draw(queries, heads))


def random_layout(rng: random.Random) -> StreamLayout:
    if rng.random() < 0.2:
        return rng.choice(CASES).layout()
    prompts = rng.randint(0, 4)
    sizes = [rng.randint(0, 6) for _ in range(prompts)]
    items = [[rng.randint(1, 7) for _ in range(n)] for n in sizes]
    labels = [[rng.randint(0, 2) for _ in range(n)] for n in sizes]
    prefix = [rng.choice([0, 0, 1, 5]) for _ in range(prompts)]
    if rng.random() < 0.3:
        candidates = [[rng.randint(1, 5) for _ in range(rng.randint(0, 4))] for _ in range(prompts)]
        return candidate_layout(items, labels, candidates, 6, prefix)
    targets = [rng.randint(0, 7) for _ in range(prompts)]
    return StreamLayout.build(items, labels, targets, rng.randint(0, 4), prefix)


def tampered(call: Call, rng: random.Random) -> Call:
    """One or a few numbers of the layout's arrays replaced: nearly always of no layout any more."""
    rows, keys = call["rows"].clone(), call["keys"].clone()
    for _ in range(rng.choice([1, 1, 2, 5])):
        array = rows if rng.random() < 0.9 else keys
        if not array.numel():
            continue
        row, field = rng.randrange(array.shape[1]), rng.randrange(array.shape[0])
        nearby = int(array[field, row]) + rng.randint(-3, 3)
        value = rng.choice([nearby, rng.choice(EXTREMES), keys.shape[1], keys.shape[1] + 1])
        array[field, row] = max(-(2**31), min(value, 2**31 - 1))
    return call.changed(rows=rows, keys=keys)


def _cut(name: str, dim: int) -> Callable[[Call], Call]:
    """One less, in memory of its own: behind a view there is more of the tensor."""

    def change(call: Call) -> Call:
        shorter = call[name].narrow(dim, 0, call[name].shape[dim] - 1)
        return call.changed(**{name: shorter.clone(memory_format=torch.contiguous_format)})

    return change


def _with(field: int, row: int, value: Callable[[int], int]) -> Callable[[Call], Call]:
    def change(call: Call) -> Call:
        rows = call["rows"].clone()
        rows[field, row] = value(call["keys"].shape[1])
        return call.changed(rows=rows)

    return change


def _other_prefix(call: Call) -> Call:
    """Beside the span of a segment's first row, a later one sees a longer prefix: more keys than the segment has."""
    rows, num_context = call["rows"].clone(), call["keys"].shape[1]
    rows[PROMPT_FIRST, num_context:] = rows[PREFIX_STOP, num_context:] = 0
    rows[START, num_context:], rows[STOP, num_context:] = num_context - 2, num_context
    rows[PREFIX_STOP, num_context + 1 :] = num_context - 3
    return call.changed(rows=rows)


# Of a call that has everything, heads in two groups and no [SUM] rows, so that what lies behind the keys is nobody's.
READ_ELSEWHERE: dict[str, Callable[[Call], Call]] = {
    **{f"{name} has a row too few": _cut(name, 0) for name in ("k", "v")},
    **{f"{name} has a head too few": _cut(name, 1) for name in ("v",)},
    **{f"{name} has a number too few": _cut(name, 2) for name in ("k", "v")},
    "no query heads": lambda call: call.changed(q=call["q"][:, :0]),
    "no key heads": lambda call: call.changed(k=call["k"][:, :0]),
    "a row of the layout too few": lambda call: call.changed(rows=call["rows"][:, :-1].contiguous()),
    "fields of the layout too few": lambda call: call.changed(rows=call["rows"][:3].clone()),
    "a key of the layout too many": lambda call: call.changed(
        keys=torch.cat([call["keys"], call["keys"][:, :1]], 1)
    ),
    "a span that ends behind the keys": _with(STOP, -1, lambda num_context: num_context + 1),
    "a span that begins before the keys": _with(START, 0, lambda _: -1),
    "a prefix before the keys": _with(PROMPT_FIRST, 0, lambda _: -1),
    "spans that go back": _with(STOP, -1, lambda _: 1),
}
# Of a call with [SUM] rows.
READ_ELSEWHERE_OF_SUMS: dict[str, Callable[[Call], Call]] = {
    **{f"{name} has a row too few": _cut(name, 0) for name in ("k_sum", *INITIAL)},
    **{f"{name} has a number too few": _cut(name, 2) for name in INITIAL},
    "a prefix longer than the segment's": _other_prefix,
    "slopes of a head too few": _cut("slopes", 0),
    "an empty table of ratios": lambda call: call.changed(ratios=call["ratios"][:0]),
    "no table of ratios": lambda call: call.changed(ratios=None),
    "initial keys without initial values": lambda call: call.changed(v_initial=None),
    "a reset id that overflows": lambda call: _with(RESET_ID, 0, lambda _: -(2**31))(
        _with(RESET_ID, -1, lambda _: 2**31 - 1)(call)
    ),
}
# Wrong besides: what would be converted without a word, and what no CPU can read.
REFUSED: dict[str, Callable[[Call], Call]] = {
    "q has a row too few": _cut("q", 0),
    "keys of another dtype": lambda call: call.changed(
        k=call["k"].to(torch.float64 if call["k"].dtype == torch.float32 else torch.float32)
    ),
    "integers": lambda call: call.changed(q=call["q"].int()),
    "complex numbers": lambda call: call.changed(q=call["q"].to(torch.complex64)),
    "four dimensions": lambda call: call.changed(q=call["q"][None]),
    "one dimension": lambda call: call.changed(k=call["k"].reshape(-1)),
    "no head_dim": lambda call: call.changed(
        q=call["q"][..., :0], k=call["k"][..., :0], v=call["v"][..., :0]
    ),
    "a layout of int64": lambda call: call.changed(rows=call["rows"].long()),
    "a key without data": lambda call: call.changed(k=call["k"].to("meta")),
    "a layout without data": lambda call: call.changed(rows=call["rows"].to("meta")),
    "more keys than rows": lambda call: call.changed(rows=call["rows"][:, : call["keys"].shape[1] - 1]),
}


def full_call(dtype: torch.dtype, with_sums: bool, seed: int = 0) -> Call:
    """A call that has everything, where every wrong one differs."""
    torch.manual_seed(seed)
    targets = [10, 2] if with_sums else [0, 0]
    layout = StreamLayout.build([[9] * 10, [5, 1]], [[1] * 10, [1, 0]], targets, 1, [4, 0])
    for trial in range(1000):
        call = right_call(random.Random(trial), dtype, layout)
        q = call.tensors["q"]
        assert q is not None
        if None not in call.tensors.values() and len(q) == layout.num_rows and q.shape[1:] == (6, 16):
            return call
    raise AssertionError("no such call was drawn")
