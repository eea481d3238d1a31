"""Which tile each kernel runs with: a frozen table by architecture, kernel, head_dim, dtype and mean span.

No autotuning at run time: nothing is specialised on a length, results do not depend on what ran before, and the first batch
costs what the hundredth does. Every row compiles without spills that matter (tests/kernels/test_triton_compile.py);
`python -m benchmarks.tune_tiles --winners FILE` times candidates on a GPU. The variable DTI_TILES names a file of winners, which then stand in
the table's place.
"""

from __future__ import annotations

import functools
import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Tile:
    """Rows and keys of a tile, and how the compiler lays it out.

    Attributes:
        block_m: rows of the query side, of tokens times packed heads.
        block_n: keys.
        warps: per program.
        stages: of the software pipeline.
        pack: most heads of a group that share a tile.
        ahead: the forward of context rows multiplies the next tile of keys while this one's softmax runs. Hopper's matrix units work on
            by themselves, so both take their time at once; elsewhere the second tile of scores only costs registers.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    pack: int = 16
    ahead: bool = False

    def heads(self, group: int) -> int:
        """How many heads of a group of `group` share a tile: the largest divisor of the group within the tile's limit."""
        limit = min(group, self.pack, self.block_m)
        return max(pack for pack in range(1, limit + 1) if group % pack == 0)


# Most heads of a group in a tile: strides between them are multiplied in 32 bits.
MAX_PACK = 32
KERNELS = ("ctx_fwd", "ctx_dq", "ctx_dkv", "sum_fwd", "sum_dq", "sum_dkv")
# Rows of the table by head_dim (up to), bits of the dtype, and whether the mean span is short (below 362 tokens, where long
# tiles are mostly mask). A row that does not depend on the span is written once, under False.
_Rows = dict[tuple[int, int, bool], tuple[Tile, ...]]


def _row(*tiles: tuple[int, int, int, int]) -> tuple[Tile, ...]:
    """Six (rows, keys, warps, stages) in the order of KERNELS."""
    return tuple(Tile(*tile) for tile in tiles)


def _ahead(*tiles: tuple[int, int, int, int]) -> tuple[Tile, ...]:
    """A row whose forward of context rows computes ahead."""
    first, *others = _row(*tiles)
    return replace(first, ahead=True), *others


# float32 runs on the ordinary units, which hold operands in registers: small tiles, more warps.
_FLOAT32: _Rows = {
    (64, 32, False): _row(
        (32, 32, 8, 1), (16, 32, 4, 1), (32, 16, 4, 1), (32, 16, 8, 1), (16, 16, 8, 1), (16, 16, 4, 1)
    ),
    (128, 32, False): _row(
        (16, 32, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)
    ),
    (256, 32, False): _row(*[(16, 16, 8, 1)] * 6),
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
_SM90: _Rows = _FLOAT32 | {
    # These three rows are of a sweep on an H200 (benchmarks/results/gpu-h200.jsonl): the fastest tiles, but for the forward of short spans,
    # where 128 x 64 with four warps is 4 % faster and spills. Two programs of four warps on a processor hide each other's softmax
    # better than one of eight.
    (64, 16, True): _row(
        (64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 3), (16, 64, 4, 2), (32, 64, 4, 2), (32, 32, 4, 2)
    ),
    (64, 16, False): _ahead(
        (64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 3), (16, 64, 4, 2), (16, 64, 4, 2), (32, 32, 4, 2)
    ),
    (128, 16, False): _row(
        (64, 64, 4, 3), (128, 64, 8, 3), (32, 64, 4, 3), (16, 64, 4, 2), (16, 64, 4, 2), (32, 32, 4, 2)
    ),
    (256, 16, False): _row(
        (128, 64, 8, 2), (64, 64, 8, 1), (64, 64, 8, 1), (16, 32, 4, 2), (16, 16, 4, 1), (16, 16, 4, 1)
    ),
}
_SM100: _Rows = _FLOAT32 | {
    (64, 16, True): _row(
        (128, 64, 8, 3), (64, 64, 4, 2), (64, 64, 4, 2), (32, 32, 4, 2), (32, 64, 4, 2), (32, 32, 4, 2)
    ),
    (64, 16, False): _row(
        (128, 64, 8, 3), (128, 64, 8, 3), (64, 128, 8, 3), (32, 32, 4, 2), (32, 64, 4, 2), (32, 32, 4, 2)
    ),
    (128, 16, False): _row(
        (128, 64, 8, 3), (128, 64, 8, 3), (32, 128, 8, 3), (32, 32, 4, 2), (32, 32, 4, 2), (16, 32, 4, 2)
    ),
    (256, 16, False): _SM90[256, 16, False],
}
# 64 KiB of local memory, waves of 64, and matrix units that take float32.
_GFX942: _Rows = {
    (64, 32, False): _row(
        (32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1)
    ),
    (128, 32, False): _row(
        (32, 32, 4, 1), (16, 32, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1)
    ),
    (256, 32, False): _row(*[(16, 16, 4, 1)] * 6),
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
    "sm_86": _SM80,  # 99 KiB of shared memory where sm_80 has 163: the rows fit both
    "sm_90": _SM90,
    "sm_100": _SM100,
    "gfx942": _GFX942,
}
_CAPABILITIES = {(8, 0): "sm_80", (8, 6): "sm_86", (8, 9): "sm_86", (9, 0): "sm_90"}
_CAPABILITIES |= {(10, 0): "sm_100", (10, 3): "sm_100"}
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
    """The tile of one of `KERNELS` in the table's rows for `arch`, or what the file in the variable DTI_TILES has in its place."""
    rows = TABLE[arch]
    largest, short_span = 64 if head_dim <= 64 else 128 if head_dim <= 128 else 256, mean_span <= 256
    tuned = _tuned_tiles()
    for key in ((arch, kernel, largest, bits, short_span), (arch, kernel, largest, bits, False)):
        if key in tuned:
            return tuned[key]
        if key[2:] in rows:
            return rows[key[2:]][KERNELS.index(kernel)]
    raise AssertionError(f"no row for {arch}, head_dim {head_dim}, {bits} bits")


@functools.cache
def _tuned_tiles() -> dict[tuple[str, str, int, int, bool], Tile]:
    """The rows of the file in DTI_TILES, read once: as `benchmarks.tune_tiles --winners` writes it, a JSON list of objects with arch, kernel,
    head_dim, bits, short_span and tile.

    Raises:
        ValueError: the file cannot be read, or an entry is not one of these; the message names it.
    """
    path = os.environ.get("DTI_TILES")
    if not path:
        return {}
    try:
        if Path(path).exists() and not Path(path).is_file():  # a pipe would be waited for
            raise OSError("no regular file")
        entries = json.loads(Path(path).read_text())
        return {_tuned_key(entry): _tuned_tile(entry["tile"]) for entry in entries}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"DTI_TILES={path} is no file of tiles ({type(error).__name__}: {error}); unset it to use the table's"
        ) from error


def _tuned_key(entry: dict[str, Any]) -> tuple[str, str, int, int, bool]:
    arch, kernel, head_dim, bits, short_span = (
        entry[name] for name in ("arch", "kernel", "head_dim", "bits", "short_span")
    )
    if arch not in TABLE or kernel not in KERNELS or head_dim not in (64, 128, 256) or bits not in (16, 32):
        raise ValueError(f"{entry} names no row of the table")
    return arch, kernel, head_dim, bits, bool(short_span)


def _tuned_tile(numbers: list[int]) -> Tile:
    block_m, block_n, warps, stages, pack, *ahead = numbers
    if len(ahead) > 1:
        raise ValueError(f"{numbers}: a tile is five numbers, and whether its forward computes ahead")
    tile = Tile(block_m, block_n, warps, stages, pack, bool(ahead and ahead[0]))
    for size, least, most in (
        (tile.block_m, 16, 512), (tile.block_n, 16, 512), (tile.warps, 1, 16), (tile.stages, 1, 8), (tile.pack, 1, MAX_PACK),
    ):  # fmt: skip
        if not least <= size <= most:
            raise ValueError(f"{numbers}: {size} is not in [{least}, {most}]")
    if any(size & (size - 1) for size in (tile.block_m, tile.block_n, tile.warps)):
        raise ValueError(f"{numbers}: rows, keys and warps must be powers of two")
    return tile


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
        f"no tiles are tuned for {name}: windowed_attn uses those of {safe}. python -m benchmarks.tune_tiles --winners tiles.json finds "
        "better ones for this GPU, and DTI_TILES=tiles.json uses them.",
        stacklevel=2,
    )
    return safe


def all_forced() -> tuple[tuple[str, Tile], ...]:
    """The tiles of `forced`, none where it is not in use."""
    return tuple(_forced.items())


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
