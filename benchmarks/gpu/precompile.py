"""Compile every kernel that the GPU benchmarks and tests will launch into Triton's cache, in parallel, before the first is launched.

    python -m benchmarks.gpu.precompile [--set smoke tests tune bench train score] [--jobs 16] [--arch sm_90] [--list] [--out ROWS.jsonl]

Compiled one by one as they are met, they take minutes of a GPU that waits. Operators and models run on small CPU tensors with the heads,
dtypes and tiles of the real ones; their launches go through Triton's just-in-time path up to the launch (`benchmarks/measuring/stand_in.py`), so
the cache's keys are those of the real run. Needs no GPU where `--arch` says which one.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.attention.workloads import HEADS, AttentionInputs, Workload
from benchmarks.measuring import stand_in
from benchmarks.measuring.measure import parse_measuring
from benchmarks.measuring.rehearsal import REHEARSING
from dti_kernels import StreamLayout, candidate_layout, windowed_attn
from dti_kernels.gpu import tiles
from dti_kernels.gpu.tiles import KERNELS, TABLE, Tile
from dti_model.config import DTIConfig
from dti_model.model.attention import apply_dti, token_logits

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


def smoke() -> Iterator[Callable[[], None]]:
    """What `benchmarks.gpu.smoke` runs: slopes take a gradient."""
    for heads in HEADS:
        for reset in (True, False):
            for span in MEAN_SPANS:
                x = inputs(heads, reset, span)
                x = dataclasses.replace(x, alibi_slopes=x.alibi_slopes.requires_grad_())
                yield partial(x.run, windowed_attn)


def bench() -> Iterator[Callable[[], None]]:
    """What the attention benchmark and the host's times run."""
    for heads in HEADS:
        for span in MEAN_SPANS:
            for reset in (True, False):
                yield partial(inputs(heads, reset, span).run, windowed_attn)
            yield partial(run_alone, inputs(heads, False, span))


def tune() -> Iterator[Callable[[], None]]:
    """The tiles that a sweep tries."""
    from benchmarks.tune_tiles import candidates_of

    def with_tile(kernel: str, tile: Tile, x: AttentionInputs) -> None:
        with tiles.forced({kernel: tile}):
            x.run(windowed_attn)

    for heads, (_, _, head_dim) in HEADS.items():
        for kernel in KERNELS:
            for tile in candidates_of(kernel, head_dim):
                for reset in (True, False):
                    yield partial(with_tile, kernel, tile, inputs(heads, reset))


def model_of(heads: str) -> LlamaForCausalLM:
    """Two narrow layers with a model's heads: attention is called as in all of them."""
    num_heads, num_groups, head_dim = HEADS[heads]
    config = LlamaConfig(
        hidden_size=num_heads,  # any multiple of it: bfloat16 is slow on a CPU
        intermediate_size=16,
        num_attention_heads=num_heads,
        num_key_value_heads=num_groups,
        head_dim=head_dim,
        num_hidden_layers=2,
        vocab_size=64,
        use_cache=False,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16)


def logits(heads: str, dti: DTIConfig, layout: StreamLayout, mean_span: int) -> torch.Tensor:
    """Of a model on made-up tokens."""
    model = apply_dti(model_of(heads), dti)
    layout = dataclasses.replace(layout, mean_span=mean_span)
    return token_logits(model, torch.zeros(layout.num_rows, dtype=torch.long), layout, dti)


# With and without a reset in the last layer.
CONFIGS = (DTIConfig(), DTIConfig(alpha_max=0.0), DTIConfig("dti-position"), DTIConfig("dti-minus"))


def train() -> Iterator[Callable[[], None]]:
    """What training steps and scoring of streaming prompts run."""
    layout = Workload("train", 60, 3, 1, 1, 1, window=2, mean_tokens=5, std_tokens=1).layout()
    for heads in HEADS:
        for dti in CONFIGS:
            for span in MEAN_SPANS:
                yield (
                    lambda heads=heads, dti=dti, span=span: logits(heads, dti, layout, span).sum().backward()
                )


def score() -> Iterator[Callable[[], None]]:
    """What scoring candidates runs."""
    layout = candidate_layout([[3] * 4], [[1] * 4], [[3] * 5], window=4)
    for dti in CONFIGS:
        for span in MEAN_SPANS:

            def call(dti: DTIConfig = dti, span: int = span) -> None:
                with torch.inference_mode():
                    logits("smollm", dti, layout, span)

            yield call


def tests() -> Iterator[Callable[[], None]]:
    """What the tests for GPUs run."""
    yield from importlib.import_module(TESTS).calls()


SETS: dict[str, Callable[[], Iterator[Callable[[], None]]]] = {
    "smoke": smoke,
    "tests": tests,
    "tune": tune,
    "bench": bench,
    "train": train,
    "score": score,
}


def gather(names: list[str], arch: str) -> dict[stand_in.Key, Any]:
    """The distinct kernels of sets, inside `stand_in.driver_of(arch)`."""
    found: dict[stand_in.Key, Any] = {}
    for name in names:
        with stand_in.recorded(arch) as launches:
            for call in SETS[name]():
                call()
        for key, launch in stand_in.distinct(launches).items():
            found.setdefault(key, launch)
    return found


_launches: list[Any] = []  # of the parent, for the children that it forks


def compile_one(index: int) -> tuple[int, float, str]:
    """Compile a launch of the parent's list; its index, the seconds, and what went wrong."""
    start = time.monotonic()
    try:
        stand_in.warm_up(_launches[index])
        error = ""
    except Exception as caught:  # a compiler's refusal: the others still count
        error = f"{type(caught).__name__}: {caught}"[:200]
    return index, time.monotonic() - start, error


def compile_all(launches: list[Any], jobs: int) -> dict[str, Any]:
    """Compile launches in forked processes, inside `stand_in.driver_of`; a row's numbers."""
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
    program = "import torch; from dti_kernels.gpu.tiles import architecture; print(architecture(torch.device('cuda', 0)))"
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout.split()[-1]


def main() -> None:
    """Gather, compile, and keep a row; exit with 1 if a kernel of the table was refused."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--set", nargs="+", choices=SETS, default=list(SETS), help="default: all")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes; default: %(default)s")
    parser.add_argument("--arch", choices=TABLE, help="default: this machine's GPU, or sm_90 without one")
    parser.add_argument("--list", action="store_true", help="only count")
    options = parse_measuring(parser, "precompile")
    if reason := stand_in.unavailable():
        parser.error(reason)
    torch.set_num_threads(1)  # forked processes have no other threads
    arch = options.arch or architecture_here()
    start = time.monotonic()
    with stand_in.driver_of(arch):
        launches = list(gather(options.set, arch).values())[: 4 if REHEARSING else None]
        row: dict[str, Any] = {"benchmark": "precompile", "arch": arch, "sets": options.set}
        row["gathering_seconds"] = round(time.monotonic() - start, 1)
        row |= {"kernels": len(launches)} if options.list else compile_all(launches, options.jobs)
    print(row, flush=True)
    options.rows.append([row])
    print(f"rows: {options.rows}")
    sys.exit(bool(set(options.set) != {"tune"} and any(row.get("failed", ()))))


if __name__ == "__main__":
    main()
