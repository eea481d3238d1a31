"""Backward kernels: dQ over tiles of rows, dK/dV over tiles of keys; probabilities come back from the log-sum-exp.

    p = exp(s - lse)     delta = do . out     dp = do . v~     ds = p (dp - delta)
    dq += scale ds k~    dk += (1 - a) scale ds q    dk_initial += a scale ds q    (dv, dv_initial likewise with p do)
    dslope = -sum ds dist

No atomics: every output element is summed by one program in a fixed order, so two runs are bitwise equal. The heads of a
group are looped inside dK/dV: keys are not expanded. Cost: 7 matmuls per visited tile, O(T) memory.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dti_kernels import inputs
from dti_kernels.gpu.backward_context import ctx_dkv_kernel, ctx_dq_kernel
from dti_kernels.gpu.backward_sum import sum_dkv_kernel, sum_dq_kernel, sum_self_kernel
from dti_kernels.gpu.isolation import key_marks, keys_launch, row_marks, rows_launch
from dti_kernels.gpu.tile import MAX_BLOCK_M, Batch, Launch, addressable, run_all, strides
from dti_kernels.gpu.tiles import Tile
from dti_kernels.inputs import Inputs

# The own keys of [SUM] rows are a matrix-free sum over the heads of a group: memory bound, any small tile serves.
_SELF_TILE = Tile(16, 16, 4, 1)


@dataclass(frozen=True)
class Gradients:
    """What the backward fills; contiguous, so that the gradients of keys and values share their strides."""

    dq: Tensor  # (T, H, D), or (S, H, D)
    dk: Tensor  # (T, G, D), as dv and dk_sum
    dv: Tensor
    dk_sum: Tensor
    dk_initial: Tensor | None  # (C, G, D), as dv_initial
    dv_initial: Tensor | None
    dslopes: Tensor | None  # (H, S) float32, to be summed over the [SUM] rows
    # (C, G, D), what [SUM] rows contribute to dv: in float32, or dv itself where no context row contributes.
    dv_sum: Tensor | None
    # (G, T or S, H / G) float32, flat, and zeros behind them: dK/dV reads whole tiles without a mask.
    delta: Tensor
    row_marks: Tensor  # `triton_isolation.py`
    context_marks: Tensor | None
    sum_marks: Tensor | None
    lse_tile: Tensor  # the log-sum-exp likewise, in the units that dK/dV exponentiates

    @staticmethod
    def of(batch: Batch) -> Gradients:
        def empty(x: Tensor) -> Tensor:
            return torch.empty(x.shape, dtype=x.dtype, device=x.device)

        def scratch(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.float32, device=batch.q.device)

        # Where no kernel writes, zeros: no [SUM] rows, or no queries of context rows.
        of_sums = empty if batch.num_sum else _zeros
        of_context = empty if batch.has_context_queries else _zeros
        dv = empty(batch.v) if batch.num_sum or batch.has_context_queries else _zeros(batch.v)
        dv_sum = scratch(batch.num_context, *dv.shape[1:]) if batch.num_sum else None
        num_queries, num_heads = batch.q.shape[:2]
        # `packed_base` in triton_tile.py: every key head's lanes begin at a multiple of 16 bytes.
        per_lane = torch.zeros(
            2,
            batch.k.shape[1] * (-(-num_queries * batch.group // 4) * 4) + MAX_BLOCK_M,
            dtype=torch.float32,
            device=batch.q.device,
        )
        return Gradients(
            dq=empty(batch.q),
            dk=of_context(batch.k),
            dv=dv,
            dk_sum=of_sums(batch.k_sum),
            dk_initial=None if batch.k_initial is None else of_sums(batch.k_initial),
            dv_initial=None if batch.v_initial is None else of_sums(batch.v_initial),
            dslopes=None if batch.slopes is None else scratch(num_heads, batch.num_sum),
            dv_sum=dv_sum if batch.has_context_queries else dv,
            row_marks=row_marks(batch),
            context_marks=key_marks(batch) if batch.has_context_queries else None,
            sum_marks=key_marks(batch) if batch.num_sum else None,
            delta=per_lane[0],
            lse_tile=per_lane[1],
        )


def _zeros(x: Tensor) -> Tensor:
    return torch.zeros(x.shape, dtype=x.dtype, device=x.device)


def backward_launches(
    batch: Batch, grads: Gradients, grad_out: Tensor, out: Tensor, lse: Tensor
) -> list[Launch]:
    """The launches that fill `grads`: delta and dq first, then what [SUM] rows give to keys, then context rows, then what is not finite."""
    saved: dict[str, Any] = {
        "q_ptr": batch.q,
        "v_ptr": batch.v,
        "do_ptr": grad_out,
        "delta_ptr": grads.delta,
    }
    saved |= {"lse_tile_ptr": grads.lse_tile, **strides(q=batch.q, v=batch.v, do=grad_out)}
    of_rows = {**saved, "lse_ptr": lse, "out_ptr": out, "dq_ptr": grads.dq, **strides(o=out)}
    of_rows["marks_ptr"] = grads.row_marks
    of_keys = {**saved, **strides(dk=grads.dk)}
    launches = []
    if batch.has_context_queries:
        tile = batch.tile("ctx_dq")
        arguments = {**of_rows, **batch.context_inputs(), **batch.sizes(tile)}
        launches.append(Launch(ctx_dq_kernel, batch.row_grid(batch.num_context, tile), arguments, tile))
    if batch.num_sum:
        launches += _sum_launches(batch, grads, of_rows, of_keys)
    if batch.has_context_queries:
        tile = batch.tile("ctx_dkv")
        outputs = {"dk_ptr": grads.dk, "dv_ptr": grads.dv, "dv_sum_ptr": grads.dv_sum}
        outputs["marks_ptr"] = grads.context_marks
        arguments = {
            **of_keys,
            **outputs,
            "keys_ptr": batch.keys,
            **batch.context_inputs(),
            **batch.sizes(tile),
        }
        del arguments["rows_ptr"]
        launches.append(Launch(ctx_dkv_kernel, batch.key_grid(tile), arguments, tile))
    of_gradients = {"do_ptr": grad_out, "delta_ptr": grads.delta, **strides(do=grad_out)}
    launches.append(rows_launch(batch, grads.row_marks, grads.dq, lse, **of_gradients))
    if batch.num_context:
        of_gradients |= {name: of_keys[name] for name in ("lse_tile_ptr", "stride_dkt", "stride_dkh")}
        written = ("dk", "dv", "dk_sum", "dk_initial", "dv_initial")
        of_gradients |= {f"{name}_ptr": getattr(grads, name) for name in written}
        launches.append(keys_launch(batch, grads.context_marks, grads.sum_marks, **of_gradients))
    return launches


def _sum_launches(
    batch: Batch, grads: Gradients, of_rows: dict[str, Any], of_keys: dict[str, Any]
) -> list[Launch]:
    inputs = batch.sum_inputs()
    tile = batch.tile("sum_dq")
    arguments = {**of_rows, **inputs, "dslopes_ptr": grads.dslopes, **batch.sizes(tile)}
    launches = [Launch(sum_dq_kernel, batch.row_grid(batch.num_sum, tile), arguments, tile)]

    outputs = {
        "dk_ptr": grads.dk,
        "dk_sum_ptr": grads.dk_sum,
        "dv_ptr": grads.dv,
        "num_queries": batch.q.shape[0],
    }
    arguments = {
        **of_keys,
        **outputs,
        "k_ptr": batch.k_sum,
        **strides(k=batch.k_sum),
        **batch.sizes(_SELF_TILE),
    }
    for unused in ("rows_ptr", "PACK", "BLOCK_N"):
        del arguments[unused]
    grid = (-(-batch.num_sum // _SELF_TILE.block_m), batch.k.shape[1])
    launches.append(Launch(sum_self_kernel, grid, arguments, _SELF_TILE))

    tile = batch.tile("sum_dkv")
    outputs = {
        "dk_ptr": grads.dk_sum,
        "dv_sum_ptr": grads.dv_sum,
        "dk_initial_ptr": grads.dk_initial,
        "dv_initial_ptr": grads.dv_initial,
        "marks_ptr": grads.sum_marks,
    }
    arguments = {**of_keys, **outputs, "keys_ptr": batch.keys, **inputs, **batch.sizes(tile)}
    launches.append(Launch(sum_dkv_kernel, batch.key_grid(tile), arguments, tile))
    return launches


def backward(x: Inputs, grad_out: Tensor, out: Tensor, lse: Tensor, slopes_grad: bool) -> inputs.Gradients:
    """Gradients of the inputs. The kernels read two key streams: without `k_sum` both are k, whose gradient is the sum."""
    batch = Batch.of(x)
    grads = Gradients.of(batch)
    run_all(
        backward_launches(batch, grads, addressable(grad_out), out.contiguous(), lse.contiguous()), x.q.device
    )
    empty, dslopes = x.q.new_empty(0), None
    if grads.dslopes is not None and x.slopes is not None and slopes_grad:
        dslopes = grads.dslopes.sum(1).to(x.slopes.dtype)
    return inputs.Gradients(
        dq=grads.dq,
        dk=grads.dk + grads.dk_sum if x.k_sum is None else grads.dk,
        dv=grads.dv,
        dk_sum=empty if x.k_sum is None else grads.dk_sum,
        dk_initial=empty if grads.dk_initial is None else grads.dk_initial,
        dv_initial=empty if grads.dv_initial is None else grads.dv_initial,
        dslopes=empty if dslopes is None else dslopes,
    )
