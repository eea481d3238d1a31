"""Launches of the kernels as data: the operators' inputs as kernel arguments, grids, tiles, and how a launch runs."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from dti_kernels.gpu.tile import visible
from dti_kernels.gpu.tiles import MAX_PACK, Tile, choose_tile
from dti_kernels.inputs import Inputs

Arguments = dict[str, Any]  # of a kernel, by name
# Rows of the largest tile. Rows are addressed with 32-bit offsets inside the tile (64-bit between tiles).
MAX_BLOCK_M = 512
_MAX_ROW_STRIDE = 2**31 // MAX_BLOCK_M
_MAX_HEAD_STRIDE = 2**31 // MAX_PACK
# Beyond this an accumulator of 16 rows no longer fits beside its operands.
_MAX_HEAD_DIM = 256


@dataclass(frozen=True)
class Launch:
    """One kernel launch as data, so that the tests, the ahead-of-time compiler and the tuner see exactly what runs."""

    kernel: Any
    grid: tuple[int, int]
    arguments: Arguments
    tile: Tile

    @property
    def options(self) -> dict[str, Any]:
        """The compiler's options."""
        # Triton announces another default for fp fusion; a * b - c is one instruction here whatever the default.
        return {"num_warps": self.tile.warps, "num_stages": self.tile.stages, "enable_fp_fusion": True}

    def run(self) -> Any:
        """Launch on the current stream of the current device; the compiled kernel, nothing from the interpreter."""
        return self.kernel[self.grid](**self.arguments, **self.options)


class Batch:
    """The operators' inputs as kernels take them.

    Attributes:
        x: the inputs; addressable by kernels, and `k_sum` is never None.
        num_rows: `T`.
        num_context: `C`.
        num_sum: `S`.
        has_context_queries: False where q holds the [SUM] rows only, or there are no context rows.
        group: query heads per key head.

    Raises:
        TypeError, ValueError: no kernel takes q's dtype or head_dim.
    """

    def __init__(self, x: Inputs) -> None:
        if x.q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            raise TypeError(
                f"the GPU kernels take float16, bfloat16 or float32, got {x.q.dtype}: "
                "convert the inputs, or use windowed_attn_reference"
            )
        if x.q.shape[2] > _MAX_HEAD_DIM:
            raise ValueError(
                f"the GPU kernels take a head_dim of at most {_MAX_HEAD_DIM}, got {x.q.shape[2]}: "
                "use windowed_attn_reference"
            )
        if interpreting():
            _repair_interpreter()
        x = Inputs._make(addressable(value) if isinstance(value, Tensor) else value for value in x)
        self.x = x = x._replace(k_sum=x.k if x.k_sum is None else x.k_sum)
        self.num_rows, self.num_context = x.rows.shape[1], x.keys.shape[1]
        self.num_sum = self.num_rows - self.num_context
        num_queries, num_heads, head_dim = x.q.shape
        self.has_context_queries = num_queries > self.num_sum
        self.group = num_heads // x.k.shape[1]
        self._arguments: Arguments = {
            **{f"{name}_ptr": value for name, value in x._asdict().items()},
            **strides(q=x.q, k=x.k, v=x.v, ks=x.k_sum, k0=x.k_initial, v0=x.v_initial),
            "num_rows": self.num_rows,
            "num_queries": num_queries,
            "num_context": self.num_context,
            "num_ratios": 0 if x.ratios is None else len(x.ratios),
            "scale": x.scale,
            "GROUP": self.group,
            "HEAD_DIM": head_dim,
            # A tile holds a power of two; matrix units need 16.
            "BLOCK_D": max(16, 1 << (head_dim - 1).bit_length()),
            # float32 inputs get float32 digits; elsewhere the rounding of scale * log2(e) is nothing.
            "NATURAL": x.q.dtype == torch.float32,
        }

    def over_rows(self, kernel: Any, num_rows: int, others: Arguments, tile: Tile | None = None) -> Launch:
        """A program for each tile of rows and pack of query heads.

        Args:
            kernel: takes by name those of its parameters that are inputs, sizes or `others`.
            num_rows: that it works on.
            others: arguments beside inputs and sizes.
            tile: None: the table's for this kernel, batch and device.
        """
        tile = tile or self.tile(kernel)
        pack = tile.heads(self.group)
        grid = -(-num_rows // (tile.block_m // pack)), self.x.q.shape[1] // pack
        return self._launch(kernel, grid, others, tile)

    def over_keys(self, kernel: Any, num_keys: int, others: Arguments, tile: Tile | None = None) -> Launch:
        """A program for each tile of keys and key head; arguments as `over_rows`."""
        tile = tile or self.tile(kernel)
        grid = -(-num_keys // tile.block_n), self.x.k.shape[1]
        return self._launch(kernel, grid, others, tile)

    def _launch(self, kernel: Any, grid: tuple[int, int], others: Arguments, tile: Tile) -> Launch:
        sizes = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "PACK": tile.heads(self.group)}
        found = {**self._arguments, **others, **sizes, "AHEAD": tile.ahead}
        return Launch(kernel, grid, {name: found[name] for name in kernel.arg_names}, tile)

    def tile(self, kernel: Any) -> Tile:
        """The table's tile of a kernel for this batch and device."""
        name, q = kernel.fn.__name__.removesuffix("_kernel"), self.x.q
        return choose_tile(name, q.device, q.shape[2], q.dtype, self.x.mean_span)

    def run(self, launches: list[Launch]) -> list[Any]:
        """Launch in order on the batch's device; a CPU means Triton's interpreter. What `Launch.run` gives for each."""
        device = self.x.q.device
        if device.type == "cpu" and not interpreting():
            raise RuntimeError("set TRITON_INTERPRET=1 before the first kernel is launched, or not at all")
        with on(device):
            return [launch.run() for launch in launches]


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a GPU the current device inside. Costs nothing where it is already, or for a CPU."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def addressable(x: Tensor) -> Tensor:
    """`x` itself, or a contiguous copy; streams `(T, heads, D)` may have strides under which one tile stays below 2**31 elements."""
    if (
        x.ndim == 3
        and x.stride(2) == 1
        and x.stride(0) <= _MAX_ROW_STRIDE
        and x.stride(1) <= _MAX_HEAD_STRIDE
    ):
        return x
    return x.contiguous()


def strides(**tensors: Tensor | None) -> dict[str, int]:
    """Row and head strides as kernel arguments: `strides(q=q)` is `stride_qt`, `stride_qh`; 0 where there is no tensor."""
    result = {}
    for name, x in tensors.items():
        result[f"stride_{name}t"], result[f"stride_{name}h"] = (0, 0) if x is None else x.stride()[:2]
    return result


def interpreting() -> bool:
    """Whether TRITON_INTERPRET was set when Triton was imported."""
    return not isinstance(visible, triton.JITFunction)


@functools.cache
def _repair_interpreter() -> None:
    """Let Triton's interpreter loop over run-time ranges under NumPy 2.4 and later.

    Its scalars are arrays of shape (1,), which `int` refuses since NumPy 2.4; Triton up to 3.8 does not squeeze them.
    """
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_with_index(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_with_index
