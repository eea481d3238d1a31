"""Training steps with random weights: streaming prompts beside sliding-window prompts, targets per second.

    python -m benchmarks.bench_train_gpu [--model llama8b-slice] [--device cuda] [--seconds 80] [--profile TRACE.json.gz] [--out ROWS.jsonl]

Both kinds get the same model, the same packed batches of about as many tokens, the same attention and the same optimizer; steps
are interleaved. Each is timed kernel by kernel and, padded, as a CUDA graph (`dti_model/training/graphed_steps.py`). `llama8b-slice` is
Llama-3.1-8B's shape with two layers, `smollm` all of SmolLM2-135M's, in bfloat16. Beside the ratio of targets/s stands that of FLOPs per
target, counted as the training's own MFU is (`dti_model/training/flops.py`).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.attention import KINDS, STREAMING, Workload
from benchmarks.measuring import DEVICE, REHEARSING, check_device, percentiles_ms
from benchmarks.recording import failure, make_parser, parse_measuring
from benchmarks.scoring import CAPTURE
from benchmarks.shapes import MODELS
from benchmarks.synthetic import random_model
from dti_model.config import DTIConfig
from dti_model.model import apply_dti, token_logits
from dti_model.prompts import StreamBatch
from dti_model.training import NO_LABEL, StepCost, StepGraphs, padded_batch, peak_flops

# Of a step's kernels, the longest ones that a profile's row names.
_LONGEST = 10
_ATTENTION = ("ctx_fwd", "ctx_dq", "ctx_dkv", "sum_fwd", "sum_dq", "sum_dkv", "sum_self")


EAGER, GRAPH = "eager", "graph"


def batch(kind: str, num_tokens: int, vocab_size: int) -> StreamBatch:
    """A packed batch of random tokens, on the CPU."""
    layout = Workload(kind, num_tokens, KINDS[kind], 1, 1, 1).layout()
    ids = torch.randint(vocab_size, (layout.num_rows,), generator=torch.Generator().manual_seed(0))
    return StreamBatch(
        ids, layout, torch.zeros(layout.num_sum, dtype=torch.long), torch.arange(layout.num_sum)
    )


class Bench:
    """One model, and a packed batch of each kind of prompt.

    Attributes:
        name: a key of `MODELS`.
        on_gpu: bfloat16, fused optimizer, CUDA graphs and peak memory; otherwise float32, kernel by kernel.
        cost: FLOPs of a step.
        batches: by kind, on the CPU.
    """

    def __init__(self, name: str, on_gpu: bool, num_tokens: int) -> None:
        self.name, self.on_gpu = name, on_gpu
        device = DEVICE if on_gpu else "cpu"
        self.dti = DTIConfig()
        model = random_model(MODELS[name], torch.bfloat16 if on_gpu else torch.float32, device)
        self.model = apply_dti(model, self.dti).train()
        self.cost = StepCost.of(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=on_gpu)
        self.batches = {kind: batch(kind, num_tokens, model.config.vocab_size) for kind in KINDS}
        self.graphs = StepGraphs(self.model, CAPTURE)
        self._given = {
            (kind, way): (padded_batch(x) if way == GRAPH else x).to(device)
            for kind, x in self.batches.items()
            for way in ((EAGER, GRAPH) if on_gpu else (EAGER,))
        }
        self._counts = {
            kind: torch.tensor(x.layout.num_sum, device=device) for kind, x in self.batches.items()
        }
        self.times: dict[tuple[str, str], list[float]] = {turn: [] for turn in self._given}
        self.eager_peak_mib = dict.fromkeys(KINDS, 0.0)

    def gradients(self, given: StreamBatch, count: torch.Tensor) -> torch.Tensor:
        """Forward and backward; the mean loss of the batch."""
        logits = token_logits(self.model, given.input_ids, given.layout, self.dti)
        entropy = torch.nn.functional.cross_entropy(
            logits.float(), given.labels, reduction="sum", ignore_index=NO_LABEL
        )
        loss = entropy / count
        loss.backward()
        return loss.detach()

    def step(self, kind: str, way: str = EAGER) -> float:
        """Forward, backward and update; the loss, for which the device is waited for."""
        given, count = self._given[kind, way], self._counts[kind]
        loss = self.graphs.run(given, count, self.gradients) if way == GRAPH else self.gradients(given, count)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss)

    def timed_step(self, kind: str, way: str) -> float:
        """Milliseconds of a step, from a device at rest to a device at rest.

        Raises:
            RuntimeError: the loss is not finite.
        """
        if self.on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        loss = self.step(kind, way)
        ms = 1e3 * (time.perf_counter() - start)
        if not np.isfinite(loss):
            raise RuntimeError(f"{self.name}, {kind}: loss {loss}")
        return ms

    def run(self, num_steps: int, seconds: float) -> None:
        """Steps of all kinds by turns, two of which are not counted: a graph is captured in its second."""
        deadline = time.monotonic() + seconds
        for kind in (*KINDS, *KINDS):  # before there are graphs, whose buffers would count
            self.timed_step(kind, EAGER)
            self.eager_peak_mib[kind] = torch.cuda.max_memory_allocated() / 2**20 if self.on_gpu else 0.0
        for step in range(num_steps + 2):
            if step > 3 and time.monotonic() > deadline:
                break
            for kind, way in self._given:
                ms = self.timed_step(kind, way)
                if step > 1:
                    self.times[kind, way].append(ms)

    def flops(self, kind: str) -> int:
        """Of a step."""
        return self.cost.flops(self.batches[kind].layout)

    def rows(self) -> list[dict[str, Any]]:
        """One row per kind and way; that of streaming prompts has its ratios to sliding windows, that of a graph its ratio to eager steps."""
        if self.on_gpu and self.graphs.num_graphs < len(KINDS):
            raise RuntimeError("a step was not captured: see the warning")
        rows = {turn: self._row(*turn) for turn in self._given}
        for (kind, way), row in rows.items():
            if way == GRAPH:
                eager = rows[kind, EAGER]
                row["speedup_over_eager"] = round(eager["p50_ms"] / row["p50_ms"], 2)
            if kind == STREAMING:
                (sliding,) = (rows[other, way] for other in KINDS if other != STREAMING)
                speedup = row["targets_per_s"] / sliding["targets_per_s"]
                flops_ratio = sliding["gflop_per_target"] / row["gflop_per_target"]
                row |= {"speedup": round(speedup, 2), "flops_ratio": round(flops_ratio, 2)}
                row["share_of_flops_ratio"] = round(speedup / flops_ratio, 3)
        return list(rows.values())

    def _row(self, kind: str, way: str) -> dict[str, Any]:
        layout = self.batches[kind].layout
        timing = percentiles_ms(np.asarray(self.times[kind, way]))
        seconds, flops = timing["p50_ms"] / 1e3, self.flops(kind)
        peak = peak_flops(torch.device(DEVICE), bf16=True) if self.on_gpu else None
        row: dict[str, Any] = {"benchmark": "training", "model": self.name, "kind": kind, "way": way}
        row |= {"tokens": layout.num_rows, "targets": layout.num_sum}
        row |= {"steps": len(self.times[kind, way]), **timing}
        row["targets_per_s"] = round(layout.num_sum / seconds, 1)
        row["tokens_per_s"] = round(layout.num_rows / seconds)
        row["gflop_per_target"] = round(flops / layout.num_sum / 1e9, 6)
        row["mfu"] = None if peak is None else round(flops / seconds / peak, 4)
        # What a graph's kernels share was allocated at its capture: no replay's peak shows it.
        row["eager_peak_mib"] = None if way == GRAPH else round(self.eager_peak_mib[kind])
        return row


def profile(step: Callable[[], Any], path: Path) -> dict[str, Any]:
    """Trace one step.

    Args:
        step: what to trace; it waits for the device.
        path: of the trace, in Chrome's format, compressed.

    Returns:
        The device's milliseconds, the share of ours among them, and the longest kernels with their milliseconds and calls. A
        rehearsal has no kernels: it lists operators.
    """
    from torch._C._autograd import DeviceType
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiling

    activities = [ProfilerActivity.CPU] if REHEARSING else [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profiling(activities=activities) as found:
        step()
    path.parent.mkdir(parents=True, exist_ok=True)
    found.export_chrome_trace(str(path))
    own_time = "self_cpu_time_total" if REHEARSING else "self_device_time_total"
    kernels = [
        (event.key, getattr(event, own_time) / 1e3, event.count)
        for event in found.key_averages()
        if REHEARSING or event.device_type != DeviceType.CPU
    ]
    kernels.sort(key=lambda kernel: -kernel[1])
    total = sum(ms for _, ms, _ in kernels)
    ours = sum(ms for name, ms, _ in kernels if name.startswith(_ATTENTION))
    longest = [{"kernel": name[:120], "ms": round(ms, 3), "calls": n} for name, ms, n in kernels[:_LONGEST]]
    return {
        "device_ms": round(total, 3),
        "attention_share": round(ours / total, 4) if total else None,
        "kernels": longest,
    }


def measure(name: str, options: argparse.Namespace, seconds: float) -> list[dict[str, Any]]:
    """Rows of a model: one per kind of prompt, and that of a profiled step."""
    bench = Bench(name, options.device == "cuda", options.tokens)
    bench.run(options.steps, seconds)
    rows = bench.rows()
    if options.profile is not None:
        path = options.profile.with_name(f"{name}-{options.profile.name}")
        try:
            found = profile(lambda: bench.step(STREAMING), path)
        except Exception as error:  # tracing is a tool of its own: the times above stand
            check_device(error)
            found = {"failed": failure(error)}
        rows.append({"benchmark": "profile", "model": name, "kind": STREAMING, **found})
    return rows


def main() -> None:
    """Measure, print and keep the rows; exit with 1 if a model failed."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--model", choices=MODELS, nargs="+", default=["llama8b-slice", "smollm"])
    add("--device", choices=("cpu", "cuda"), default="cuda")
    add("--tokens", type=int, default=16384)
    add("--steps", type=int, default=12)
    add("--seconds", type=float, default=80.0)
    add("--profile", type=Path, help="trace one step of each model: MODEL-NAME beside this name")
    if REHEARSING:
        parser.set_defaults(model=["tiny"], tokens=1024, steps=2)
    options = parse_measuring(parser, "training-{device}")
    # Whoever asks for deterministic algorithms gets every empty buffer filled with NaN besides: a pass over memory that is no training.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # of a module of its own class
    failed = False
    for name in options.model:
        try:
            rows = measure(name, options, options.seconds / len(options.model))
            for row in rows:
                if "speedup" in row:
                    print(
                        f"{name}, {row['way']}: streaming over sliding window {row['speedup']:.2f} x",
                        flush=True,
                    )
        except Exception as error:  # one model does not fit: the other is still measured
            check_device(error)
            rows, failed = [{"benchmark": "training", "model": name, "failed": failure(error)}], True
        for row in rows:
            print(row, flush=True)
        options.rows.append(rows)
        if options.device == "cuda":
            torch.cuda.empty_cache()
    print(f"rows: {options.rows}")
    if failed:
        raise SystemExit("a model failed: see its row")


if __name__ == "__main__":
    main()
