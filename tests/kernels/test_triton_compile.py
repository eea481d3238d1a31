"""Every row of the tile table compiles ahead of time for its architecture: it fits, and it does not spill unless it is measured to be the
fastest all the same. Needs no GPU."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.attention import numbers_of, useful_fraction
from benchmarks.compile_report import (
    KEYS,
    QUOTED,
    TableRow,
    compile_row,
    compiled_numbers,
    recorded_rows,
    rows_of_groups,
    table_rows,
)
from benchmarks.recording import RESULTS, read_rows
from dti_kernels.gpu import tiles
from dti_kernels.gpu.tiles import KERNELS, TABLE, Tile, table_tile

ROWS = [*table_rows(), *rows_of_groups()]
# Shared memory that one program may have (CUDA programming guide, ISA manual of CDNA3).
SHARED_KIB = {"sm_80": 163, "sm_86": 99, "sm_90": 227, "sm_100": 227, "gfx942": 64}
MAX_SPILLED_BYTES = 64  # of a backward kernel; a forward spills nothing
# Of a tile that was the fastest of its kernel on a card, spills counted: some versions of Triton spill it and some do not.
MAX_SPILLED_BYTES_MEASURED = 160
USEFUL = {"ctx": 0.8, "sum": 0.6}  # visible share of the visited tiles, at least
# Of the instructions and registers that were recorded of this version of Triton. More is another kernel: record it, and say why.
MAX_GROWTH = 1.03


def identify(row: TableRow) -> str:
    group = "" if row.group == 4 else f"-group{row.group}"
    return f"{row.arch}-{row.kernel}-{row.head_dim}-{row.bits}{'-short' if row.short_span else ''}{group}"


@functools.cache
def winners() -> set[tuple[str, str, int, tuple[int, ...]]]:
    """Architecture, kernel, head_dim and numbers of every tile that won a sweep in the recorded rows of a card."""
    rows = [row for path in sorted(RESULTS.glob("gpu-*.jsonl")) for row in read_rows(path) if row.get("won")]
    return {(row["arch"], row["kernel"], row["head_dim"], tuple(row["tile"])) for row in rows}


def won_on_a_card(row: TableRow) -> bool:
    return (row.arch, row.kernel, row.head_dim, tuple(numbers_of(row.tile))) in winners()


def test_only_recorded_winners_may_spill_more() -> None:
    """The allowance is for the tile, kernel and head_dim of a row that was measured."""
    won = TableRow("sm_90", "ctx_dkv", 128, 16, False, Tile(32, 64, 4, 3))
    assert won_on_a_card(won)
    for change in ({"tile": Tile(32, 64, 4, 2)}, {"head_dim": 64}, {"kernel": "ctx_dq"}, {"arch": "sm_80"}):
        assert not won_on_a_card(dataclasses.replace(won, **change))


@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="interpreted kernels are not compiled")
@pytest.mark.parametrize("row", ROWS, ids=identify)
def test_row_fits_and_does_not_spill(row: TableRow) -> None:
    triton = pytest.importorskip("triton")
    result = compile_row(row)
    served = [arch for arch in TABLE if arch == row.arch or (row.arch, arch) == ("sm_80", "sm_86")]
    for arch in served:
        if TABLE[arch] is TABLE[row.arch]:
            assert result.shared_bytes <= SHARED_KIB[arch] << 10, arch
    if row.head_dim <= 128:
        most = 0 if row.kernel.endswith("fwd") else MAX_SPILLED_BYTES
        assert result.spilled_bytes <= (MAX_SPILLED_BYTES_MEASURED if won_on_a_card(row) else most)
    if row.arch == "sm_90" and row.kernel.startswith("ctx") and row.bits == 16:
        assert "wgmma.mma_async" in result.assembly  # Hopper's warp-group matrix instructions
        assert "ptxas" in result.log, "nothing to read the warnings from"
        assert not result.serialized
    numbers = compiled_numbers(row, result)
    recorded = recorded_rows(triton.__version__).get(tuple(numbers[key] for key in KEYS))
    if recorded is not None:
        assert numbers["tile"] == recorded["tile"], (
            "the table changed: python -m benchmarks.compile_report --record"
        )
        for name in ("registers", "loops"):
            now, then = (np.atleast_1d(x[name] or 0) for x in (numbers, recorded))
            assert now.shape == then.shape
            assert (now <= MAX_GROWTH * then + 1).all(), f"{name}: {now}, recorded {then}"


def test_every_tested_version_of_triton_is_recorded() -> None:
    """All rows in 16 bits of head_dim 64 and 128, of every version that the project allows."""
    expected = {identify(row) for row in ROWS if row.bits == 16 and row.head_dim <= 128}
    for version in ("3.6.0", "3.7.1", "3.8.0", "3.9.0"):
        rows = [dict(zip(KEYS, key)) for key in recorded_rows(version)]
        found = {identify(TableRow(**row, tile=Tile(16, 16, 4, 1))) for row in rows}
        assert expected <= found, version


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


def tiles_file(path: Path, **changes: object) -> Path:
    entry = {"arch": "sm_90", "kernel": "ctx_dq", "head_dim": 128, "bits": 16, "short_span": False}
    path.write_text(json.dumps([entry | {"tile": [64, 32, 4, 2, 16]} | changes]))
    return path


@pytest.fixture
def tuned(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], None]]:
    """Uses a file of tuned tiles."""
    tiles._tuned_tiles.cache_clear()
    yield lambda path: monkeypatch.setenv("DTI_TILES", str(path))
    tiles._tuned_tiles.cache_clear()


def test_tuned_tiles_replace_those_of_the_table(tuned: Callable[[Path], None], tmp_path: Path) -> None:
    tuned(tiles_file(tmp_path / "tiles.json"))
    assert table_tile("sm_90", "ctx_dq", 128, 16, 1024) == Tile(64, 32, 4, 2)
    assert table_tile("sm_90", "ctx_dq", 64, 16, 1024) == TABLE["sm_90"][64, 16, False][1]
    assert table_tile("sm_80", "ctx_dq", 128, 16, 1024) == TABLE["sm_80"][128, 16, False][1]


def test_tuned_tiles_of_long_spans_leave_short_ones(tuned: Callable[[Path], None], tmp_path: Path) -> None:
    tuned(tiles_file(tmp_path / "tiles.json", head_dim=64, tile=[128, 32, 8, 3, 16, True]))
    assert table_tile("sm_90", "ctx_dq", 64, 16, 1024) == Tile(128, 32, 8, 3, ahead=True)
    assert table_tile("sm_90", "ctx_dq", 64, 16, 256) == TABLE["sm_90"][64, 16, True][1]


@pytest.mark.parametrize(
    "changes",
    [{"arch": "sm_1"}, {"kernel": "x"}, {"tile": [48, 32, 4, 2, 16]}, {"tile": [64, 32]}, {"tile": "x"}, {"bits": 8}],
)  # fmt: skip
def test_bad_tuned_tiles_are_refused(tuned: Callable[[Path], None], tmp_path: Path, changes: dict) -> None:
    tuned(tiles_file(tmp_path / "tiles.json", **changes))
    with pytest.raises(ValueError, match=r"DTI_TILES=.*tiles\.json"):
        table_tile("sm_90", "ctx_dq", 128, 16, 1024)


@pytest.mark.parametrize("content", [b"\xff", b"[" * 100_000, b"", b"{}[", b"3", b'[{"arch": []}]', None])
def test_what_is_no_file_of_tiles_is_refused(
    tuned: Callable[[Path], None], tmp_path: Path, content: bytes | None
) -> None:
    """A pipe was waited for, and deep nesting was an error of its own."""
    path = tmp_path / "tiles.json"
    os.mkfifo(path) if content is None else path.write_bytes(content)
    tuned(path)
    with pytest.raises(ValueError, match=r"DTI_TILES=.*tiles\.json is no file of tiles.*unset it"):
        table_tile("sm_90", "ctx_dq", 128, 16, 1024)


def test_triton_is_imported_only_to_launch() -> None:
    """The package imports, runs and differentiates on CPU where triton cannot be imported at all."""
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from dti_kernels import windowed_attn\n"
        "from tests.cases import CASES\n"
        "CASES[1].inputs(torch.float32).run(windowed_attn)\n"
        "assert not any(name.startswith('dti_kernels.gpu') for name in sys.modules)\n"
        "from dti_kernels.gpu import Tile, forced\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)
