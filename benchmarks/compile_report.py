"""Every row of the tile table as the compilers make it, without a GPU.

    python -m benchmarks.compile_report [--arch sm_90] [--head-dim 128] [--bits 16] [--loops] [--record]

Prints registers, spilled bytes and shared memory of each kernel, compiled through the just-in-time path exactly as it is launched; with
`--loops` also the instructions of its inner loops by class; and how much of the visited tiles is visible. `--record` puts the rows of this
version of Triton into results/compile.jsonl in place of its older ones: a new version can halve a kernel, and the tests hold what is
installed to its rows.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.attention import Workload, useful_fraction
from benchmarks.measuring import compile_launch, driver_of, recorded_launches, why_not_compiled
from benchmarks.recording import RESULTS, make_parser, read_rows, replace_rows
from dti_kernels import HiddenStateReset, StreamLayout, windowed_attn
from dti_kernels.gpu import KERNELS, TABLE, Tile, forced

RECORDED = RESULTS / "compile.jsonl"
# The workload whose useful fractions are quoted: Llama-3.1-8B heads, k = 50, n = 20, 35 +- 8 tokens per interaction.
QUOTED = Workload("llama8b_k50_16k", 16384, 50, num_heads=32, num_groups=8, head_dim=128)


@dataclass(frozen=True)
class TableRow:
    """One tile of the table."""

    arch: str
    kernel: str
    head_dim: int
    bits: int
    short_span: bool
    tile: Tile
    group: int = 4  # query heads that share a key head

    @property
    def dtype(self) -> torch.dtype:
        """The element type that the row is compiled for."""
        return torch.bfloat16 if self.bits == 16 else torch.float32


@dataclass(frozen=True)
class Compiled:
    """A kernel as a compiler made it."""

    registers: int
    spilled_bytes: int
    shared_bytes: int
    assembly: str  # PTX, or the AMD assembly
    cubin: bytes
    log: str  # of ptxas

    @property
    def serialized(self) -> bool:
        """Whether ptxas waits for every warp-group instruction before the next (its warnings C7510 to C7519)."""
        return re.search(r"C751\d|wgmma.*serializ", self.log) is not None


def table_rows() -> Iterator[TableRow]:
    """Every tile of the table, where equal rows of two architectures that share an instruction set count once."""
    for arch, rows in TABLE.items():
        for (head_dim, bits, short_span), row in rows.items():
            if arch == "sm_86" and TABLE["sm_80"].get((head_dim, bits, short_span)) == row:
                continue
            for kernel, tile in zip(KERNELS, row):
                yield TableRow(arch, kernel, head_dim, bits, short_span, tile)


# Groups that are compiled beside that of 4: none, of SmolLM2, of Qwen2.5 and of Llama-3.1-70B.
GROUPS = (1, 3, 7, 8)


def rows_of_groups() -> Iterator[TableRow]:
    """Hopper's context kernels in 16 bits with other groups."""
    for row in table_rows():
        if row.arch == "sm_90" and row.kernel.startswith("ctx") and row.bits == 16 and row.head_dim <= 128:
            yield from (replace(row, group=group) for group in GROUPS if not row.short_span)


def compile_row(row: TableRow) -> Compiled:
    """Compile a row's kernel for its architecture through the just-in-time path, with everything switched on: ALiBi, reset, [SUM] rows."""
    with driver_of(row.arch):
        built = compile_launch(_launch(row))
    shared, assembly = built.kernel.metadata.shared, built.kernel.asm
    if row.arch.startswith("gfx"):
        text = assembly["amdgcn"]
        registers = _number(r"\.vgpr_count:\s+(\d+)", text)
        spilled = _number(r"\.private_segment_fixed_size:\s+(\d+)", text)
        return Compiled(registers, spilled, shared, text, b"", "")
    cubin = assembly["cubin"]
    usage = _cuobjdump("--dump-resource-usage", cubin)
    registers, spilled = _number(r"REG:(\d+)", usage), _number(r"STACK:(\d+)", usage)
    return Compiled(registers, spilled, shared, assembly["ptx"], cubin, built.log)


def _launch(row: TableRow) -> Any:
    """A row's launch on a small batch: strides divisible by 16, as those of every model."""
    layout = StreamLayout.build([[3, 3]], [[1, 1]], [1], 2)

    def zeros(rows: int, heads: int) -> torch.Tensor:
        return torch.zeros(rows, heads, row.head_dim, dtype=row.dtype, requires_grad=True)

    q = zeros(layout.num_rows, 2 * row.group)
    k, v, k_sum = (zeros(layout.num_rows, 2) for _ in range(3))
    initial = zeros(layout.num_context, 2), zeros(layout.num_context, 2)
    reset = HiddenStateReset(*initial, alpha_min=0.0, alpha_max=0.5)
    slopes = torch.zeros(2 * row.group, requires_grad=True)
    with recorded_launches(row.arch) as launches, forced({row.kernel: row.tile}):
        windowed_attn(q, k, v, layout, k_sum, slopes, reset).sum().backward()
    return next(x for x in launches if x.kernel.fn.__name__ == f"{row.kernel}_kernel")


def _cuobjdump(option: str, cubin: bytes) -> str:
    import triton

    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([program, option, file.name], capture_output=True, text=True, check=True).stdout


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"no {pattern} in the compiler's output")
    return int(match[1])


_CLASSES = (
    ("tensor", r"HGMMA|HMMA|UTCHMMA|UTCQMMA|IMMA|WARPGROUP|UTC"),
    ("exp2", r"MUFU"),
    ("float", r"F(FMA|MUL|ADD|MNMX|SEL|SETP|2FP)|F2F|HADD2|I2F"),
    (
        "integer",
        r"IMAD|IADD|LEA|ISETP|LOP3|SHF|ISUB|IMNMX|VIADD|VIMNMX|SEL|PRMT|MOV|UIADD|UIMAD|ULEA|USHF|ULOP3|UISETP",
    ),
    ("shared", r"LDSM|LDS|STS|MATCH|LDGDEPBAR|DEPBAR|BAR|SYNCS|FENCE"),
    ("global", r"LDGSTS|LDG|STG|UTMA"),
)


def inner_loops(cubin: bytes) -> list[Counter[str]]:
    """Instruction counts by class of every innermost loop that multiplies matrices, as they lie in the code."""
    code = re.findall(
        r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z0-9_]+)[^;]*?(0x[0-9a-f]+)?\s*;",
        _cuobjdump("-sass", cubin),
    )
    lines = [
        (int(address, 16), opcode, int(target, 16) if target else -1) for address, opcode, target in code
    ]
    loops = [
        (target, address) for address, opcode, target in lines if opcode == "BRA" and 0 <= target < address
    ]
    innermost = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    counts = []
    for first, last in innermost:
        count: Counter[str] = Counter()
        for address, opcode, _ in lines:
            if first <= address <= last:
                count[next((name for name, pattern in _CLASSES if re.match(pattern, opcode)), "other")] += 1
        if count["tensor"]:
            counts.append(count)
    return counts


KEYS = ("arch", "kernel", "head_dim", "bits", "short_span", "group")


def compiled_numbers(row: TableRow, result: Compiled) -> dict[str, Any]:
    """The recorded numbers of a compiled row; `loops` are the instructions of every inner loop that multiplies matrices (NVIDIA)."""
    tile = row.tile
    numbers: dict[str, Any] = {key: getattr(row, key) for key in KEYS}
    numbers["tile"] = [tile.block_m, tile.block_n, tile.warps, tile.stages, tile.pack, tile.ahead]
    numbers |= {key: getattr(result, key) for key in ("registers", "spilled_bytes", "shared_bytes")}
    loops = [sum(count.values()) for count in inner_loops(result.cubin)] if result.cubin else None
    return {**numbers, "loops": loops}


def _is_of(row: dict[str, Any], triton_version: str) -> bool:
    """Whether a row is of this minor version: patches of it count as one."""
    return row["triton"].split(".")[:2] == triton_version.split(".")[:2]  # type: ignore[no-any-return]


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in KEYS)


def recorded_rows(triton_version: str) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Rows of results/compile.jsonl of a version of Triton, by what is compiled."""
    return {_key(row): row for row in read_rows(RECORDED) if _is_of(row, triton_version)}


def record(numbers: list[dict[str, Any]], triton_version: str) -> None:
    """Put the rows of a version in place of its older ones; others stay."""
    replaced = recorded_rows(triton_version) | {_key(row): row for row in numbers}
    rows = [row for row in read_rows(RECORDED) if not _is_of(row, triton_version)]
    rows += ({**row, "triton": triton_version} for row in replaced.values())
    rows.sort(key=lambda row: (row["triton"], *map(str, _key(row))))
    replace_rows(RECORDED, ({"benchmark": "compile", **row} for row in rows))


def main() -> None:
    """Print the report."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--arch", choices=TABLE)
    add("--head-dim", type=int, nargs="+", choices=(64, 128, 256))
    add("--bits", type=int, choices=(16, 32))
    add("--kernel", choices=KERNELS)
    add("--loops", action="store_true", help="instructions of the inner loops (NVIDIA)")
    add("--record", action="store_true", help="keep the rows in benchmarks/results/compile.jsonl")
    options = parser.parse_args()
    if reason := why_not_compiled():
        parser.error(reason)
    import triton

    print(
        f"{'arch':7} {'D':>3} bits {'span':5} group {'kernel':8} {'rows x keys, warps, stages':27} regs spill   shared useful"
    )
    numbers = []
    for row in (*table_rows(), *rows_of_groups()):
        wanted = (options.arch, row.arch), (options.bits, row.bits), (options.kernel, row.kernel)
        if any(value is not None and value != own for value, own in wanted):
            continue
        if options.head_dim and row.head_dim not in options.head_dim:
            continue
        result = compile_row(row)
        numbers.append(compiled_numbers(row, result))
        tile = f"{row.tile.block_m:3} x {row.tile.block_n:3}, {row.tile.warps:2}, {row.tile.stages}"
        print(
            f"{row.arch:7} {row.head_dim:3} {row.bits:4} {'short' if row.short_span else 'any':5} {row.group:5} {row.kernel:8} {tile:27}"
            f" {result.registers:4} {result.spilled_bytes:5} {result.shared_bytes:8}"
            f" {useful_fraction(replace(QUOTED, num_heads=8 * row.group), row.kernel, row.tile):6.2f}"
            f"{'  serialized' if result.serialized else ''}",
            flush=True,
        )
        if options.loops and result.cubin:
            for count in inner_loops(result.cubin):
                print("    loop:", ", ".join(f"{name} {number}" for name, number in count.most_common()))
    if options.record:
        record(numbers, triton.__version__)
        print(f"rows: {RECORDED}")


if __name__ == "__main__":
    main()
