"""Every row of the tile table compiles ahead of time for its architecture: it fits, and it does not spill. Needs no GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from benchmarks.compile_report import (
    QUOTED,
    SHARED_MEMORY,
    TableRow,
    compile_row,
    table_rows,
    useful_fraction,
)
from dti_kernels import tiles
from dti_kernels.tiles import KERNELS, TABLE, table_tile

ROWS = list(table_rows())
MAX_SPILLED_BYTES = 64  # of a backward kernel; a forward spills nothing
USEFUL = {"ctx": 0.8, "sum": 0.6}  # visible share of the visited tiles, at least


def identify(row: TableRow) -> str:
    return f"{row.arch}-{row.kernel}-{row.head_dim}-{row.bits}{'-short' if row.short_span else ''}"


@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="interpreted kernels are not compiled")
@pytest.mark.parametrize("row", ROWS, ids=identify)
def test_row_fits_and_does_not_spill(row: TableRow) -> None:
    pytest.importorskip("triton")
    result = compile_row(row)
    served = [arch for arch in TABLE if arch == row.arch or (row.arch, arch) == ("sm_80", "sm_86")]
    for arch in served:
        if TABLE[arch] is TABLE[row.arch]:
            assert result.shared_bytes <= SHARED_MEMORY[arch], arch
    if row.head_dim <= 128:
        assert result.spilled_bytes <= (0 if row.kernel.endswith("fwd") else MAX_SPILLED_BYTES)
    if row.arch == "sm_90" and row.kernel.startswith("ctx") and row.bits == 16:
        assert result.uses_wgmma


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("arch", TABLE)
def test_visited_tiles_are_mostly_visible(arch: str, kernel: str, head_dim: int) -> None:
    """k = 50, n = 20, 35 +- 8 tokens an interaction, 4 query heads a key head."""
    tile = table_tile(arch, kernel, head_dim, 16, mean_span=1024)
    assert useful_fraction(QUOTED, kernel, tile) >= USEFUL[kernel[:3]]


def test_every_head_dim_and_dtype_has_a_row() -> None:
    for arch in TABLE:
        for kernel in KERNELS:
            for head_dim in (1, 16, 24, 64, 65, 128, 200, 256):
                for bits in (16, 32):
                    for mean_span in (256, 512, 1024):
                        table_tile(arch, kernel, head_dim, bits, mean_span)


def test_unknown_hardware_takes_safe_tiles_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (12, 7))
    tiles.architecture.cache_clear()
    chosen = {tiles.choose_tile("ctx_fwd", device, 64, torch.bfloat16, 512) for _ in range(3)}
    tiles.architecture.cache_clear()
    assert chosen == {table_tile("sm_86", "ctx_fwd", 64, 16, 512)}
    assert [str(w.message).split(":")[0] for w in recwarn] == ["no tiles are tuned for sm_127"]


def test_triton_is_imported_only_to_launch() -> None:
    """The package imports, runs and differentiates on CPU where triton cannot be imported at all."""
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from dti_kernels import windowed_attn\n"
        "from tests.cases import CASES\n"
        "CASES[1].inputs(torch.float32).run(windowed_attn)\n"
        "assert not any(name.startswith('dti_kernels.triton') for name in sys.modules)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)
