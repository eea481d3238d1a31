"""Compile every kernel that the GPU benchmarks and tests will launch into Triton's cache, in parallel, before the first is launched.

    python -m benchmarks.gpu.precompile [--set smoke tests tune bench train score] [--jobs 16] [--arch sm_90] [--flex 90] [--list]
        [--out ROWS.jsonl]

Compiled one by one as they are met, they take minutes of a GPU that waits. Operators and models run on small CPU tensors with the heads,
dtypes and tiles of the real ones; their launches go through Triton's just-in-time path up to the launch (`benchmarks/measuring/stand_in.py`), so
the cache's keys are those of the real run. Needs no GPU where `--arch` says which one. `--flex` compiles the baseline's options at the same
time, on the GPU: it takes longer than all of ours.
"""

from __future__ import annotations

import dataclasses
import importlib
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import torch

from benchmarks.attention import AttentionInputs, Warming, Workload, candidates_of
from benchmarks.measuring import (
    REHEARSING,
    Key,
    distinct_launches,
    driver_of,
    recorded_launches,
    warm_up,
    why_not_compiled,
)
from benchmarks.recording import make_parser, parse_measuring
from benchmarks.shapes import HEADS, shape
from benchmarks.synthetic import random_model
from dti_kernels import StreamLayout, candidate_layout, windowed_attn
from dti_kernels.gpu import KERNELS, TABLE, Tile, forced
from dti_model.config import DTIConfig
from dti_model.model import apply_dti, token_logits

Call = Callable[[], object]
# One of each row of the table.
MEAN_SPANS = (256, 1024)
# Calls of the tests for GPUs: `calls()` of this module, which lives beside them.
TESTS = "tests.kernels.gpu_calls"


def inputs(heads: str, reset: bool, mean_span: int = 1024) -> AttentionInputs:
    """A small batch with a model's heads in bfloat16."""
    workload = Workload(
        heads, 300, 3, *HEADS[heads], window=2, mean_tokens=9, reset=reset, dtype=torch.bfloat16
    )
    x = AttentionInputs.of(workload)
    return dataclasses.replace(x, layout=dataclasses.replace(x.layout, mean_span=mean_span))


def run_alone(x: AttentionInputs) -> None:
    """Forward and backward without what only [SUM] rows have."""
    windowed_attn(x.q, x.k, x.v, x.layout).backward(x.grad_out)


def smoke() -> Iterator[Call]:
    """The calls of `benchmarks.gpu.smoke`: slopes take a gradient."""
    for heads in HEADS:
        for reset in (True, False):
            for span in MEAN_SPANS:
                x = inputs(heads, reset, span)
                x = dataclasses.replace(x, alibi_slopes=x.alibi_slopes.requires_grad_())
                yield partial(x.run, windowed_attn)


def bench() -> Iterator[Call]:
    """The calls of the attention benchmark and the host's times."""
    for heads in HEADS:
        for span in MEAN_SPANS:
            for reset in (True, False):
                yield partial(inputs(heads, reset, span).run, windowed_attn)
            yield partial(run_alone, inputs(heads, False, span))


def tune() -> Iterator[Call]:
    """The tiles that a sweep tries."""

    def with_tile(kernel: str, tile: Tile, x: AttentionInputs) -> None:
        with forced({kernel: tile}):
            x.run(windowed_attn)

    for heads, (_, _, head_dim) in HEADS.items():
        for kernel in KERNELS:
            for tile in candidates_of(kernel, head_dim):
                for reset in (True, False):
                    yield partial(with_tile, kernel, tile, inputs(heads, reset))


def logits(heads: str, dti: DTIConfig, layout: StreamLayout, mean_span: int) -> torch.Tensor:
    """Of a model with these heads on made-up tokens; attention is called as in one of full width and depth."""
    num_heads, num_groups, head_dim = HEADS[heads]
    narrow = shape(2, num_heads, num_heads, num_groups, 16, 64)  # bfloat16 is slow on a CPU
    model = apply_dti(random_model({**narrow, "head_dim": head_dim}, torch.bfloat16), dti)
    layout = dataclasses.replace(layout, mean_span=mean_span)
    return token_logits(model, torch.zeros(layout.num_rows, dtype=torch.long), layout, dti)


def step(heads: str, dti: DTIConfig, layout: StreamLayout, mean_span: int) -> None:
    """Forward and backward of such a model."""
    logits(heads, dti, layout, mean_span).sum().backward()


@torch.inference_mode()
def request(dti: DTIConfig, layout: StreamLayout, mean_span: int) -> None:
    """The forward of such a model, as scoring calls it."""
    logits("smollm", dti, layout, mean_span)


# With and without a reset in the last layer.
CONFIGS = (DTIConfig(), DTIConfig(alpha_max=0.0), DTIConfig("dti-position"), DTIConfig("dti-minus"))


def train() -> Iterator[Call]:
    """The calls of training steps and of scoring streaming prompts."""
    layout = Workload("train", 60, 3, 1, 1, 1, window=2, mean_tokens=5, std_tokens=1).layout()
    for heads in HEADS:
        for dti in CONFIGS:
            for span in MEAN_SPANS:
                yield partial(step, heads, dti, layout, span)


def score() -> Iterator[Call]:
    """The calls of scoring candidates."""
    layout = candidate_layout([[3] * 4], [[1] * 4], [[3] * 5], window=4)
    for dti in CONFIGS:
        for span in MEAN_SPANS:
            yield partial(request, dti, layout, span)


def tests() -> Iterator[Call]:
    """The calls of the tests for GPUs."""
    yield from importlib.import_module(TESTS).calls()


SETS: dict[str, Callable[[], Iterator[Call]]] = {
    "smoke": smoke,
    "tests": tests,
    "tune": tune,
    "bench": bench,
    "train": train,
    "score": score,
}


def gather(names: list[str], arch: str) -> dict[Key, Any]:
    """The distinct kernels of sets, inside `driver_of(arch)`."""
    found: dict[Key, Any] = {}
    for name in names:
        with recorded_launches(arch) as launches:
            for call in SETS[name]():
                call()
        for key, launch in distinct_launches(launches).items():
            found.setdefault(key, launch)
    return found


def compile_launcher(kernel: Any) -> None:
    """Compile the C extension through which Triton launches a kernel, where it has one for each signature: .4 s each, 32 for all sets.

    Triton 3.9 has none, and without the driver's library there is nothing to link with. What is wrong here is said by the launch itself.
    """
    from triton.runtime import driver

    backend = driver.active.get_current_target().backend
    vendor, launcher = {"cuda": ("nvidia", "CudaLauncher"), "hip": ("amd", "HIPLauncher")}[backend]
    module = importlib.import_module(f"triton.backends.{vendor}.driver")
    if hasattr(module, "make_launcher"):
        with suppress(Exception):
            getattr(module, launcher)(kernel.src, kernel.metadata)


_launches: list[Any] = []  # of the parent, for the children that it forks


def compile_one(index: int) -> tuple[int, float, str]:
    """Compile a launch of the parent's list, and what launches it; its index, the seconds, and what went wrong."""
    start = time.monotonic()
    try:
        compile_launcher(warm_up(_launches[index]))
        error = ""
    except Exception as caught:  # a compiler's refusal: the others still count
        error = f"{type(caught).__name__}: {caught}"[:200]
    return index, time.monotonic() - start, error


def compile_all(launches: list[Any], jobs: int) -> dict[str, Any]:
    """Compile launches in forked processes, inside `driver_of`; a row's numbers."""
    _launches[:] = launches
    start, total, failed = time.monotonic(), 0.0, []
    with multiprocessing.get_context("fork").Pool(max(1, min(jobs, len(launches)))) as pool:
        for index, seconds, error in pool.imap_unordered(compile_one, range(len(launches))):
            total += seconds
            if error:
                launch = launches[index]
                failed.append(
                    {"kernel": launch.kernel.fn.__name__, "tile": repr(launch.tile), "error": error}
                )
    return {
        "kernels": len(launches),
        "seconds": round(time.monotonic() - start, 1),
        "compiling_seconds": round(total, 1),
        "failed": failed,
    }


def architecture_here() -> str:
    """Of this machine's GPU, asked in a process of its own: a process that has opened the device is not forked."""
    if REHEARSING or (torch.version.cuda is None and torch.version.hip is None):
        return "sm_90"
    program = (
        "import torch; from dti_kernels.gpu import architecture; print(architecture(torch.device('cuda', 0)))"
    )
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout.split()[-1]


def main() -> None:
    """Gather, compile, and keep a row; exit with 1 if a kernel of the table was refused."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--set", nargs="+", choices=SETS, default=list(SETS), help="default: all")
    add("--jobs", type=int, default=os.cpu_count(), help="processes; default: %(default)s")
    add("--arch", choices=TABLE, help="default: this machine's GPU, or sm_90 without one")
    add("--list", action="store_true", help="only count")
    add(
        "--flex",
        type=float,
        default=0.0,
        help="compile FlexAttention's options too, for so many seconds at most",
    )
    options = parse_measuring(parser, "precompile")
    if reason := why_not_compiled():
        parser.error(reason)
    warming = Warming() if options.flex else None
    torch.set_num_threads(1)  # forked processes have no other threads
    arch = options.arch or architecture_here()
    start = time.monotonic()
    with driver_of(arch):
        launches = list(gather(options.set, arch).values())[: 4 if REHEARSING else None]
        row: dict[str, Any] = {"benchmark": "precompile", "arch": arch, "sets": options.set}
        row["gathering_seconds"] = round(time.monotonic() - start, 1)
        row |= {"kernels": len(launches)} if options.list else compile_all(launches, options.jobs)
    print(row, flush=True)
    options.rows.keep([row, *(warming.wait(options.flex) if warming else ())])
    sys.exit(bool(set(options.set) != {"tune"} and any(row.get("failed", ()))))


if __name__ == "__main__":
    main()
