"""FlexAttention at its best: a handful of kernel options and mask blocks, timed once per head_dim, the best kept for every mode.

    python -m benchmarks.attention --heads llama8b --options NAME      compile one of them, for the caches

Why not `torch.compile(mode="max-autotune-no-cudagraphs")`: it compiles some twenty kernels per head_dim, times them on a made-up mask in
which every block is visible, and cannot choose the blocks of the mask, which decide how much of a window's edge is computed in vain.

Each set of options is a compilation of forward and, where PyTorch has one for its mask, backward. `Warming` makes them in processes of their
own, side by side, whose results wait in Inductor's and Triton's caches.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.attention.providers import (
    MODES,
    Call,
    by_mode,
    flex_with,
    flex_with_mask_construction,
    settle,
)
from benchmarks.attention.workloads import AttentionInputs, gpu_workload
from benchmarks.measuring import DEVICE, REHEARSING, check_device, device_times
from benchmarks.recording import TIME_IS_UP, failure, make_parser
from benchmarks.shapes import HEADS

NAME = "flex_tuned"
_MASK = "mask"
# Wall-clock seconds for each set of options and mode.
_SHARE = 0.01 if REHEARSING else 0.1
# Lines of a failed process that are printed.
_TAIL = 15


@dataclass(frozen=True)
class Options:
    """One way to run FlexAttention."""

    name: str  # how rows call it
    block: tuple[int, int]  # rows and keys of a block of the mask
    kernel: dict[str, Any] = field(hash=False)  # `kernel_options` of `flex_attention`

    @property
    def modes(self) -> tuple[str, ...]:
        """Those of `MODES` that PyTorch compiles: it has no backward unless its default tile divides the block, whatever tile is asked for.

        The default on Hopper is 64 rows x 128 keys for dK and dV and 128 rows x 64 keys for dQ.
        """
        return MODES if all(size % 128 == 0 for size in self.block) else ("forward",)


def _options(
    name: str,
    block: tuple[int, int],
    forward: tuple[int, int, int, int],
    backward: tuple[int, int, int, int] | None = None,
) -> Options:
    """From (rows, keys, warps, stages) of both directions; the backward turns its block around for dQ. None: forward only."""
    rows, keys, warps, stages = forward
    kernel = {"fwd_BLOCK_M": rows, "fwd_BLOCK_N": keys, "fwd_num_warps": warps, "fwd_num_stages": stages}
    if backward is not None:
        rows, keys, warps, stages = backward
        kernel |= {"bwd_BLOCK_M1": rows, "bwd_BLOCK_N1": keys, "bwd_BLOCK_M2": keys, "bwd_BLOCK_N2": rows}
        kernel |= {"bwd_num_warps": warps, "bwd_num_stages": stages}
    # Every row sees itself, so the check for rows that see nothing may go.
    return Options(name, block, {**kernel, "ROWS_GUARANTEED_SAFE": True, "PRESCALE_QK": True})


# PyTorch's own for Hopper are 128 x 64 (head_dim 128) or 128 x 128 (64) forward and 64 x 128 backward, with mask blocks of 128 x 128.
OPTIONS: tuple[Options, ...] = (
    Options("default", (128, 128), {}),
    _options("long rows", (128, 128), (128, 128, 8, 2), (32, 128, 8, 3)),
    _options("square backward", (128, 128), (128, 64, 8, 3), (64, 64, 4, 3)),
    _options("wide backward", (128, 128), (128, 64, 8, 3), (64, 128, 8, 2)),
    _options("fine mask", (64, 64), (64, 64, 4, 3)),
    _options("fine keys", (128, 64), (128, 64, 8, 3)),
)


def configure() -> None:
    """Settings of the compiler: the same wherever something is compiled, since they are part of what caches are asked for."""
    # They are no attributes of torch until somebody imports them.
    import torch._dynamo.config
    import torch._functorch.config

    torch._functorch.config.donated_buffer = False  # FlexAttention's graph is differentiated more than once
    torch._dynamo.config.recompile_limit = 64  # it is compiled for every set of options and heads


def prepare(x: AttentionInputs, options: Options) -> Call:
    """The call under these options."""
    return flex_with(x, options.kernel, options.block)


def tune(x: AttentionInputs, seconds: float) -> tuple[dict[str, Options], list[dict[str, Any]]]:
    """The best options for each of `MODES` in which any run, and a row for every set that was tried.

    Args:
        x: inputs to time with.
        seconds: after which no further set is compiled.
    """
    deadline = time.monotonic() + seconds
    calls: dict[str, dict[Options, Callable[[], Any]]] = {mode: {} for mode in MODES}
    rows: dict[Options, dict[str, Any]] = {}
    for options in OPTIONS[:2] if REHEARSING else OPTIONS:
        row = rows[options] = {"benchmark": "flex_options", "options": options.name, "block": options.block}
        row |= {"heads": x.q.shape[1], "head_dim": x.q.shape[2], "kernel_options": options.kernel}
        if calls["forward"] and time.monotonic() > deadline:
            row["failed"] = TIME_IS_UP
            continue
        for mode, call in _modes(x, options, row).items():
            calls[mode][options] = call
    best = {}
    for mode in MODES:
        timings = device_times(calls[mode], _SHARE)
        p50 = {}
        for options, timing in timings.items():
            rows[options][mode] = timing.row()
            if timing.failed is None:
                p50[options] = rows[options][mode]["p50_ms"]
        if p50:
            best[mode] = min(p50, key=lambda options: p50[options])
    return best, list(rows.values())


def _modes(x: AttentionInputs, options: Options, row: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """The calls that run, by mode; a mode that the compiler refuses says so in `row`."""
    try:
        modes = by_mode(prepare(x, options), x)
    except Exception as error:
        check_device(error)
        row["failed"] = failure(error)
        return {}
    running = {}
    for mode in options.modes:
        try:
            settle(modes[mode])
            running[mode] = modes[mode]
        except Exception as error:
            check_device(error)
            row[mode] = {"failed": failure(error)}
    return running


@dataclass
class _Child:
    """A process that compiles one set of options for some heads."""

    row: dict[str, Any]  # how it ended
    process: subprocess.Popen[bytes]  # it
    log: Path  # what it prints

    @staticmethod
    def start(heads: str, options: str, folder: Path) -> _Child:
        """Start it; its log is in `folder`."""
        log = folder / f"flex-{heads}-{options.replace(' ', '-')}.txt"
        with log.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.attention", "--heads", heads, "--options", options],
                env=os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1"},  # the processes are the threads
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        return _Child({"benchmark": "flex_warm", "heads": heads, "options": options}, process, log)

    def end(self, seconds: float, stop: bool) -> bool:
        """Whether it has ended, after these seconds, with its row filled; `stop`: end it."""
        status = self.process.poll()
        if status is None and not stop:
            return False
        if status is None:
            self.process.kill()
            self.process.wait()
        self.row |= {"seconds": round(seconds, 1), "status": status}
        if status is None:
            self.row["failed"] = TIME_IS_UP
        elif status:
            last = self.log.read_text(errors="replace").splitlines()[-_TAIL:]
            self.row["failed"] = " ".join("".join(last[-1:]).split())[:400] or f"status {status}"
            print(
                f"{self.row['heads']}, {self.row['options']}: status {status}", *last, sep="\n  ", flush=True
            )
        return True


class Warming:
    """Processes that compile all options for all heads side by side, from when this is made; each takes half a minute or more.

    Args:
        logs: folder for what they print; None: a temporary one. The end of what one prints that fails is printed here as well.
    """

    def __init__(self, logs: Path | None = None) -> None:
        names = [options.name for options in OPTIONS] + [_MASK]
        heads = list(HEADS)
        if REHEARSING:
            names, heads = names[1:2], heads[:1]
        self._start = time.monotonic()
        self._temporary = tempfile.TemporaryDirectory()
        folder = Path(self._temporary.name) if logs is None else logs
        folder.mkdir(parents=True, exist_ok=True)
        self._children = [_Child.start(head, name, folder) for head in heads for name in names]

    def wait(self, seconds: float) -> list[dict[str, Any]]:
        """Wait until all have ended; a row for each, with its seconds and status.

        Args:
            seconds: from the start, after which those that still run are ended.
        """
        running = self._children
        try:
            while running:
                took = time.monotonic() - self._start
                running = [child for child in running if not child.end(took, stop=took > seconds)]
                time.sleep(0.05 if running else 0.0)
        finally:
            for child in running:  # somebody interrupted this: they would go on without it
                child.process.kill()
            self._temporary.cleanup()
        took = time.monotonic() - self._start
        print(f"FlexAttention's options compiled side by side: {took:.1f} s", flush=True)
        return [child.row for child in self._children]


def main() -> None:
    """Compile one set of options by running it once in every mode that it has; exit with 1 where one was refused."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--heads", choices=HEADS, required=True)
    add("--options", choices=[*(options.name for options in OPTIONS), _MASK], required=True)
    given = parser.parse_args()
    configure()
    x = AttentionInputs.of(gpu_workload("warm", given.heads, 16384, 50), DEVICE)
    if given.options == _MASK:
        flex_with_mask_construction(x)(x)
        return
    (options,) = (options for options in OPTIONS if options.name == given.options)
    calls, refused = by_mode(prepare(x, options), x), False
    for mode in options.modes:
        try:
            calls[mode]()
        except Exception as error:  # refused in one mode: the others are compiled all the same
            print(f"{mode}: {failure(error)}", flush=True)
            refused = True
    sys.exit(refused)
