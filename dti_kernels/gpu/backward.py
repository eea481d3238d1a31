"""Backward kernels: dQ over tiles of rows, dK/dV over tiles of keys; probabilities come back from the log-sum-exp.

    p = exp(s - lse)     delta = do . out     dp = do . v~     ds = p (dp - delta)
    dq += scale ds k~    dk += (1 - a) scale ds q    dk_initial += a scale ds q    (dv, dv_initial likewise with p do)
    dslope = -sum ds dist

No atomics: every output element is summed by one program in a fixed order, so two runs are bitwise equal. The heads of a
group are looped inside dK/dV: keys are not expanded. Cost: 7 matmuls per visited tile, O(T) memory.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dti_kernels.gpu.backward_context import ctx_dkv_kernel, ctx_dq_kernel
from dti_kernels.gpu.backward_sum import sum_dkv_kernel, sum_dq_kernel, sum_self_kernel
from dti_kernels.gpu.isolation import KEYS_TILE, ROWS_TILE, isolated_keys_kernel, isolated_rows_kernel
from dti_kernels.gpu.launch import MAX_BLOCK_M, Arguments, Batch, Launch, addressable, strides
from dti_kernels.gpu.tiles import Tile
from dti_kernels.inputs import Gradients, Inputs

# The own keys of [SUM] rows are a matrix-free sum over the heads of a group: memory bound, any small tile serves.
_SELF_TILE = Tile(16, 16, 4, 1)


class Buffers(NamedTuple):
    """Memory that the backward fills, by the names of the kernels' pointers. All is contiguous: dk, dv and dk_sum share their strides."""

    dq: Tensor  # (T, H, D), or (S, H, D)
    dk: Tensor  # (T, G, D), as dv and dk_sum
    dv: Tensor
    dk_sum: Tensor
    dk_initial: Tensor | None  # (C, G, D), as dv_initial
    dv_initial: Tensor | None
    dslopes: Tensor | None  # (H, S) float32, to be summed over the [SUM] rows
    dv_sum: Tensor | None  # (C, G, D), dv of [SUM] rows: float32, or dv itself where no context row has any
    delta: Tensor  # (G, T or S, H / G) float32, flat; `packed_base` says where a key head begins
    lse_tile: Tensor  # likewise, the log-sum-exp in the units that dK/dV exponentiates
    row_marks: Tensor  # (H, T or S), which rows of dq are not finite
    context_marks: Tensor | None  # (G, C), which keys' gradients from context rows are not
    sum_marks: Tensor | None  # likewise from [SUM] rows

    @staticmethod
    def of(batch: Batch) -> Buffers:
        """New buffers, of zeros where no kernel writes (no [SUM] rows, or no queries of context rows)."""

        def like(x: Tensor, written: bool) -> Tensor:
            return (torch.empty if written else torch.zeros)(x.shape, dtype=x.dtype, device=x.device)

        x, of_sums, of_context = batch.x, batch.num_sum > 0, batch.has_context_queries
        (num_queries, num_heads, head_dim), num_groups = x.q.shape, x.k.shape[1]
        assert x.k_sum is not None  # by `Batch`
        dv = like(x.v, of_sums or of_context)
        dv_sum = batch.empty(batch.num_context, num_groups, head_dim) if of_sums else None
        # Zeros behind the lanes: dK/dV reads whole tiles without a mask.
        num_lanes = num_groups * (-(-num_queries * batch.group // 4) * 4) + MAX_BLOCK_M
        delta, lse_tile = batch.empty(2, num_lanes).zero_()
        marks = [
            batch.empty(num_groups, batch.num_context, dtype=torch.int8) if written else None
            for written in (of_context, of_sums)
        ]
        return Buffers(
            dq=like(x.q, True),
            dk=like(x.k, of_context),
            dv=dv,
            dk_sum=like(x.k_sum, of_sums),
            dk_initial=None if x.k_initial is None else like(x.k_initial, of_sums),
            dv_initial=None if x.v_initial is None else like(x.v_initial, of_sums),
            dslopes=None if x.slopes is None else batch.empty(num_heads, batch.num_sum),
            dv_sum=dv_sum if of_context else dv,
            delta=delta,
            lse_tile=lse_tile,
            row_marks=batch.empty(num_heads, num_queries, dtype=torch.int8),
            context_marks=marks[0],
            sum_marks=marks[1],
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
    """Gradients of the inputs from `grad_out`, the gradient of the forward's `out`; that of the slopes only if asked for."""
    batch = Batch(x)
    buffers = Buffers.of(batch)
    batch.run(backward_launches(batch, buffers, addressable(grad_out), out.contiguous(), lse.contiguous()))
    none, dslopes = x.q.new_empty(0), buffers.dslopes
    return Gradients(
        dq=buffers.dq,
        # Kernels read two streams of keys: without `k_sum` both are k, whose gradient is the sum.
        dk=buffers.dk + buffers.dk_sum if x.k_sum is None else buffers.dk,
        dv=buffers.dv,
        dk_sum=none if x.k_sum is None else buffers.dk_sum,
        dk_initial=none if buffers.dk_initial is None else buffers.dk_initial,
        dv_initial=none if buffers.dv_initial is None else buffers.dv_initial,
        dslopes=none if x.slopes is None or dslopes is None or not slopes_grad else dslopes.sum(1).to(x.slopes.dtype),
    )  # fmt: skip
