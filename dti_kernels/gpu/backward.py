"""Backward kernels: dQ over tiles of rows, dK/dV over tiles of keys; probabilities come back from the log-sum-exp.

    p = exp(s - lse)     delta = do . out     dp = do . v~     ds = p (dp - delta)
    dq += scale ds k~    dk += (1 - a) scale ds q    dk_initial += a scale ds q    (dv, dv_initial likewise with p do)
    dslope = -sum ds dist

No atomics: every output element is summed by one program in a fixed order, so two runs are bitwise equal. The heads of a
group are looped inside dK/dV: keys are not expanded. Cost: 7 matmuls per visited tile, O(T) memory.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dti_kernels.gpu.backward_context import ctx_dkv_kernel, ctx_dq_kernel
from dti_kernels.gpu.backward_sum import sum_dkv_kernel, sum_dq_kernel, sum_self_kernel
from dti_kernels.gpu.isolation import KEYS_TILE, ROWS_TILE, isolated_keys_kernel, isolated_rows_kernel
from dti_kernels.gpu.launch import MAX_BLOCK_M, Arguments, Batch, Launch, strides
from dti_kernels.gpu.replay import distinct, plan_of
from dti_kernels.gpu.tiles import Tile
from dti_kernels.inputs import NUM_TENSORS, Gradients, Inputs

# The own keys of [SUM] rows are a matrix-free sum over the heads of a group: memory bound, any small tile serves.
_SELF_TILE = Tile(16, 16, 4, 1)
# Bytes that parts of the scratch begin at multiples of: what an allocator gives, and vectors need.
_ALIGNMENT = 256


class Memory(NamedTuple):
    """What a backward allocates: gradients, which outlive it, and scratch. All is contiguous."""

    dq: Tensor  # (T, H, D), or (S, H, D)
    dk: Tensor  # (T, G, D), as dv and dk_sum
    dv: Tensor
    dk_sum: Tensor
    dk_initial: Tensor | None  # (C, G, D), as dv_initial
    dv_initial: Tensor | None
    dslopes: Tensor | None  # (H, S) float32, to be summed over the [SUM] rows
    lanes: Tensor  # (2, lanes) float32, zeros
    scratch: Tensor  # bytes

    @staticmethod
    def of(x: Inputs) -> Memory:
        """New memory, of zeros where no kernel writes (no [SUM] rows, or no queries of context rows)."""
        scratch = Scratch.of(x)
        of_context, of_sums = scratch.of_context, scratch.num_sum > 0
        return Memory(
            dq=_like(x.q, True),
            dk=_like(x.k, of_context),
            dv=_like(x.v, of_sums or of_context),
            dk_sum=_like(x.k if x.k_sum is None else x.k_sum, of_sums),
            dk_initial=None if x.k_initial is None else _like(x.k_initial, of_sums),
            dv_initial=None if x.v_initial is None else _like(x.v_initial, of_sums),
            dslopes=None if x.slopes is None else x.q.new_empty(scratch.dslopes, dtype=torch.float32),
            lanes=x.q.new_zeros((2, scratch.num_lanes), dtype=torch.float32),
            scratch=x.q.new_empty(scratch.num_bytes, dtype=torch.uint8),
        )


def _like(x: Tensor, written: bool) -> Tensor:
    return (torch.empty_like if written else torch.zeros_like)(x, memory_format=torch.contiguous_format)


_Part = tuple[int, tuple[int, ...], torch.dtype]  # first byte, shape and dtype


class Scratch(NamedTuple):
    """Sizes of what a backward allocates beside gradients."""

    of_context: bool  # whether context rows have queries
    num_sum: int
    dslopes: tuple[int, int]
    num_lanes: int
    num_bytes: int
    parts: dict[str, _Part]  # of `Memory.scratch`

    @staticmethod
    def of(x: Inputs) -> Scratch:
        """The sizes for a batch."""
        return _scratch(*x.q.shape, x.k.shape[1], x.rows.shape[1], x.keys.shape[1])


@functools.lru_cache
def _scratch(
    num_queries: int, num_heads: int, head_dim: int, num_groups: int, num_rows: int, num_context: int
) -> Scratch:
    num_sum = num_rows - num_context
    of_context = num_queries > num_sum
    wanted: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "row_marks": ((num_heads, num_queries), torch.int8)
    }
    if of_context:
        wanted["context_marks"] = (num_groups, num_context), torch.int8
    if num_sum:
        wanted["sum_marks"] = (num_groups, num_context), torch.int8
    if of_context and num_sum:
        wanted["dv_sum"] = (num_context, num_groups, head_dim), torch.float32
    num_bytes, parts = 0, {}
    for name, (shape, dtype) in wanted.items():
        parts[name] = num_bytes, shape, dtype
        num_bytes += -(-math.prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
    # Zeros behind the lanes: dK/dV reads whole tiles without a mask.
    num_lanes = num_groups * (-(-num_queries * (num_heads // num_groups) // 4) * 4) + MAX_BLOCK_M
    return Scratch(of_context, num_sum, (num_heads, num_sum), num_lanes, num_bytes, parts)


class Buffers(NamedTuple):
    """Memory that the backward fills, by the names of the kernels' pointers. All is contiguous: dk, dv and dk_sum share their strides."""

    dq: Tensor  # these as `Memory` has them
    dk: Tensor
    dv: Tensor
    dk_sum: Tensor
    dk_initial: Tensor | None
    dv_initial: Tensor | None
    dslopes: Tensor | None
    dv_sum: Tensor | None  # (C, G, D), dv of [SUM] rows: float32, or dv itself where no context row has any
    delta: Tensor  # (G, T or S, H / G) float32, flat; `packed_base` says where a key head begins
    lse_tile: Tensor  # likewise, the log-sum-exp in the units that dK/dV exponentiates
    row_marks: Tensor  # (H, T or S), which rows of dq are not finite
    context_marks: Tensor | None  # (G, C), which keys' gradients from context rows are not
    sum_marks: Tensor | None  # likewise from [SUM] rows

    @staticmethod
    def of(batch: Batch, memory: Memory | None = None) -> Buffers:
        """The buffers in `memory`; None: in new memory."""
        memory, sizes = memory or Memory.of(batch.x), Scratch.of(batch.x)
        parts: dict[str, Tensor] = {
            name: memory.scratch[first : first + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
            for name, (first, shape, dtype) in sizes.parts.items()
        }
        delta, lse_tile = memory.lanes
        return Buffers(
            dq=memory.dq,
            dk=memory.dk,
            dv=memory.dv,
            dk_sum=memory.dk_sum,
            dk_initial=memory.dk_initial,
            dv_initial=memory.dv_initial,
            dslopes=memory.dslopes,
            dv_sum=parts.get("dv_sum") if sizes.of_context else memory.dv,
            delta=delta,
            lse_tile=lse_tile,
            row_marks=parts["row_marks"],
            context_marks=parts.get("context_marks"),
            sum_marks=parts.get("sum_marks"),
        )


def backward_launches(
    batch: Batch, buffers: Buffers, grad_out: Tensor, out: Tensor, lse: Tensor
) -> list[Launch]:
    """The launches that fill `buffers`: delta and dq, gradients of keys from [SUM] rows, then from context rows, then what is not finite."""
    arguments: Arguments = {
        **{f"{name}_ptr": buffer for name, buffer in buffers._asdict().items()},
        **{"do_ptr": grad_out, "out_ptr": out, "lse_ptr": lse, "written_ptr": buffers.dq},
        **strides(do=grad_out, o=out, dk=buffers.dk),
    }
    launches = []
    if batch.has_context_queries:
        launches.append(batch.over_rows(ctx_dq_kernel, batch.num_context, arguments))
    if batch.num_sum:
        launches.append(batch.over_rows(sum_dq_kernel, batch.num_sum, arguments))
        launches.append(batch.over_keys(sum_self_kernel, batch.num_sum, arguments, _SELF_TILE))
        launches.append(batch.over_keys(sum_dkv_kernel, batch.num_context, arguments))
    if batch.has_context_queries:
        launches.append(batch.over_keys(ctx_dkv_kernel, batch.num_context, arguments))
    launches.append(batch.over_rows(isolated_rows_kernel, len(buffers.dq), arguments, ROWS_TILE))
    if batch.num_context:
        launches.append(batch.over_keys(isolated_keys_kernel, batch.num_context, arguments, KEYS_TILE))
    return launches


def run_backward(x: Inputs, grad_out: Tensor, out: Tensor, lse: Tensor, slopes_grad: bool) -> Gradients:
    """Gradients of the inputs from `grad_out`, the gradient of the forward's `out`; that of the slopes only if asked for.

    Raises:
        TypeError, ValueError: as `check_inputs` and `check_saved`, or no kernel takes q's dtype or head_dim.
    """
    saved = grad_out, out.contiguous(), lse.contiguous()
    plan = plan_of("backward", x, saved)
    tensors = plan.addressable((*x.tensors, *saved))
    memory = Memory.of(x)
    if not plan.run_again((*tensors, *memory)):
        tensors = distinct(tensors)
        batch = Batch(x.of_tensors(tensors[:NUM_TENSORS]))
        others: Any = tensors[NUM_TENSORS:]
        launches = backward_launches(batch, Buffers.of(batch, memory), *others)
        plan.keep((*tensors, *memory), launches, batch.run(launches))
    none, dslopes = x.q.new_empty(0), memory.dslopes
    return Gradients(
        dq=memory.dq,
        # Kernels read two streams of keys: without `k_sum` both are k, whose gradient is the sum.
        dk=memory.dk.add_(memory.dk_sum) if x.k_sum is None else memory.dk,
        dv=memory.dv,
        dk_sum=none if x.k_sum is None else memory.dk_sum,
        dk_initial=none if memory.dk_initial is None else memory.dk_initial,
        dv_initial=none if memory.dv_initial is None else memory.dv_initial,
        dslopes=none if x.slopes is None or dslopes is None or not slopes_grad else dslopes.sum(1).to(x.slopes.dtype),
    )  # fmt: skip
