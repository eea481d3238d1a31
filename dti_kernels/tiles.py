"""Which tile each kernel runs with: a frozen table by architecture, kernel, head_dim, dtype and mean span.

No autotuning at run time: nothing is specialised on a length, results do not depend on what ran before, and the first batch
costs what the hundredth does. Every row compiles without spills that matter (tests/kernels/test_triton_compile.py);
`benchmarks/tune_tiles.py` times candidates on a GPU and prints rows to paste here.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tile:
    """Rows and keys of a tile, and how the compiler lays it out.

    Attributes:
        block_m: rows of the query side, of tokens times packed heads: a tile holds `block_m // heads` tokens.
        block_n: keys.
        warps: per program.
        stages: of the software pipeline.
        pack: most heads of a group that share a tile.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    pack: int = 16


KERNELS = ("ctx_fwd", "ctx_dq", "ctx_dkv", "sum_fwd", "sum_dq", "sum_dkv")
# Rows of the table by head_dim (up to), bits of the dtype, and whether the mean span is short (below 362 tokens, where long
# tiles are mostly mask). A row that does not depend on the span is written once, under False.
_Rows = dict[tuple[int, int, bool], tuple[Tile, Tile, Tile, Tile, Tile, Tile]]


def _row(*tiles: tuple[int, int, int, int]) -> tuple[Tile, Tile, Tile, Tile, Tile, Tile]:
    """Six (rows, keys, warps, stages) in the order of KERNELS."""
    first, second, third, fourth, fifth, sixth = (Tile(*tile) for tile in tiles)
    return first, second, third, fourth, fifth, sixth


# float32 runs on the ordinary units, which hold operands in registers: small tiles, more warps.
_FLOAT32: _Rows = {
    (64, 32, False): _row(
        (32, 32, 8, 1), (16, 32, 4, 1), (32, 16, 4, 1), (16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 4, 1)
    ),
    (128, 32, False): _row(
        (16, 32, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)
    ),
    (256, 32, False): _row(
        (16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)
    ),
}
_SM80: _Rows = _FLOAT32 | {
    (64, 16, False): _row(
        (128, 64, 8, 3), (64, 64, 4, 2), (32, 128, 8, 2), (32, 64, 4, 2), (32, 64, 4, 2), (32, 32, 4, 2)
    ),
    (128, 16, False): _row(
        (128, 32, 8, 3), (64, 64, 8, 2), (64, 64, 8, 2), (32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2)
    ),
    (256, 16, False): _row(
        (64, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1), (16, 32, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1)
    ),
}
# 99 KiB of shared memory where sm_80 has 163: the rows above fit both.
_SM86: _Rows = _SM80
_SM90: _Rows = _FLOAT32 | {
    (64, 16, True): _row(
        (128, 64, 8, 3), (64, 64, 4, 2), (64, 64, 4, 2), (32, 32, 4, 2), (32, 64, 4, 2), (32, 32, 4, 2)
    ),
    (64, 16, False): _row(
        (128, 128, 8, 3), (128, 64, 8, 2), (64, 128, 8, 2), (32, 32, 4, 2), (32, 64, 4, 2), (32, 32, 4, 2)
    ),
    (128, 16, False): _row(
        (128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 8, 2), (32, 32, 4, 2), (32, 32, 4, 2), (16, 32, 4, 2)
    ),
    (256, 16, False): _row(
        (128, 64, 8, 2), (64, 64, 8, 1), (64, 64, 8, 1), (16, 32, 4, 2), (16, 16, 4, 1), (16, 16, 4, 1)
    ),
}
# 128 keys of head_dim 64 spill 8 bytes with Triton 3.9.
_SM100: _Rows = _SM90 | {
    (64, 16, False): _row(
        (128, 64, 8, 3), (128, 64, 8, 2), (64, 128, 8, 2), (32, 32, 4, 2), (32, 64, 4, 2), (32, 32, 4, 2)
    ),
}
# 64 KiB of local memory, waves of 64, and matrix units that take float32.
_GFX942: _Rows = {
    (64, 32, False): _row(
        (32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1)
    ),
    (128, 32, False): _row(
        (32, 32, 4, 1), (16, 32, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1)
    ),
    (256, 32, False): _row(
        (16, 16, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1)
    ),
    (64, 16, False): _row(
        (128, 64, 4, 2), (64, 64, 4, 1), (64, 64, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1)
    ),
    (128, 16, False): _row(
        (128, 32, 4, 2), (64, 32, 4, 1), (32, 64, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1)
    ),
    (256, 16, False): _row(
        (64, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1), (16, 32, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1)
    ),
}
TABLE: dict[str, _Rows] = {
    "sm_80": _SM80,
    "sm_86": _SM86,
    "sm_90": _SM90,
    "sm_100": _SM100,
    "gfx942": _GFX942,
}
_CAPABILITIES = {
    (8, 0): "sm_80",
    (8, 6): "sm_86",
    (8, 9): "sm_86",
    (9, 0): "sm_90",
    (10, 0): "sm_100",
    (10, 3): "sm_100",
}
# Little shared memory, plain tensor cores: what runs wherever Triton runs.
SAFE = {"cuda": "sm_86", "hip": "gfx942"}
_INTERPRETED = Tile(16, 16, 4, 1)
_forced: dict[str, Tile] = {}


def choose_tile(kernel: str, device: torch.device, head_dim: int, dtype: torch.dtype, mean_span: int) -> Tile:
    """The tile of one of `KERNELS` on `device`."""
    if tile := forced_tile(kernel):
        return tile
    if device.type == "cpu":
        return _INTERPRETED
    return table_tile(architecture(device), kernel, head_dim, dtype.itemsize * 8, mean_span)


def table_tile(arch: str, kernel: str, head_dim: int, bits: int, mean_span: int) -> Tile:
    """The tile of one of `KERNELS` in the table's rows for `arch`."""
    rows = TABLE[arch]
    largest = 64 if head_dim <= 64 else 128 if head_dim <= 128 else 256
    row = rows.get((largest, bits, mean_span <= 256)) or rows[largest, bits, False]
    return row[KERNELS.index(kernel)]


@functools.cache
def architecture(device: torch.device) -> str:
    """Name of the table's rows for a GPU; unknown hardware takes safe rows and says so once."""
    if torch.version.hip:
        name = torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
        known = name if name in TABLE else None
    else:
        capability = torch.cuda.get_device_capability(device)
        name = "sm_{}{}".format(*capability)
        known = _CAPABILITIES.get(capability)
    if known is not None:
        return known
    safe = SAFE["hip" if torch.version.hip else "cuda"]
    warnings.warn(
        f"no tiles are tuned for {name}: windowed_attn uses those of {safe}. "
        "python -m benchmarks.tune_tiles prints better ones for this GPU.",
        stacklevel=2,
    )
    return safe


def forced_tile(kernel: str) -> Tile | None:
    """The tile of `forced`, where one is."""
    return _forced.get(kernel)


@contextmanager
def forced(tiles: dict[str, Tile]) -> Iterator[None]:
    """Use these tiles instead of the table's, to test and to tune."""
    before = dict(_forced)
    _forced.update(tiles)
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)
