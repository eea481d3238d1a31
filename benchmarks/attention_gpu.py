"""Attention alone on a GPU: every provider, forward, backward and both, over the workloads of the project's claims.

    python -m benchmarks.bench_attention --device cuda [--out FILE] [--seconds 200]

Times are of the device: work is queued behind a pause, so that neither launches nor Python are in them, except for what waits
for the host by itself (building a block mask). Workloads come in order of weight; those that no longer fit into the seconds given
are recorded as left out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from benchmarks.bench_attention import gate
from benchmarks.compile_report import visited_pairs
from benchmarks.measure import RowFiles, percentiles_ms
from benchmarks.providers import GPU_PROVIDERS, Unavailable
from benchmarks.workloads import AttentionInputs, Workload, useful_flops
from dti_kernels.tiles import choose_tile

HEADS = {"llama8b": (32, 8, 128), "smollm": (9, 3, 64)}
# Compilers and caches settle in these many calls; percentiles are over the repeats.
WARMUP, REPEATS = 2, 12
# Matmuls of head_dim x pairs that each kernel computes, masked or not: forward 2, dQ 3, dK/dV 4.
_MATMULS = {"ctx_fwd": 2, "sum_fwd": 2, "ctx_dq": 3, "sum_dq": 3, "ctx_dkv": 4, "sum_dkv": 4}


def workloads() -> Iterator[Workload]:
    """Heads of two models; 1, 10, 50, 200 targets a prompt or whole histories; 16k and 64k tokens; reset on and off."""
    for num_tokens in (16384, 65536):
        for k in (50, 200, 10, 1, None):
            for heads, (num_heads, num_groups, head_dim) in HEADS.items():
                for reset in (True, False):
                    yield Workload(
                        f"{heads}_k{k or 'all'}_{num_tokens // 1024}k{'_reset' if reset else ''}",
                        num_tokens,
                        k,
                        num_heads,
                        num_groups,
                        head_dim,
                        reset=reset,
                        dtype=torch.bfloat16,
                    )


def device_ms(functions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, np.ndarray]:
    """`(repeats,)` milliseconds of device time per function, run by turns, between events behind a pause of the device."""
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in functions}
    flush = torch.empty(64 << 20, dtype=torch.int32, device="cuda")  # larger than any L2
    for _ in range(repeats):
        for name, function in functions.items():
            flush.zero_()
            torch.cuda._sleep(2_000_000)  # about a millisecond: the host runs ahead
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            stop.record()
            events[name].append((start, stop))
            torch.cuda.synchronize()
    return {
        name: np.asarray([start.elapsed_time(stop) for start, stop in pairs])
        for name, pairs in events.items()
    }


def calls(provider: Callable[[AttentionInputs], Any], x: AttentionInputs) -> dict[str, Callable[[], Any]]:
    """What is timed of one provider, by mode."""
    leaves = x.leaves()
    out = provider(x)

    def forward() -> None:
        with torch.no_grad():
            provider(x)

    def backward(out: torch.Tensor = out, retain: bool = True) -> None:
        torch.autograd.grad(out, leaves, x.grad_out, allow_unused=True, retain_graph=retain)

    return {
        "forward": forward,
        "backward": backward,
        "forward+backward": lambda: backward(provider(x), retain=False),
    }


def computed_flops(x: AttentionInputs, mode: str) -> int:
    """Operations of our kernels, masked parts of the visited tiles included."""
    num_heads, head_dim = x.q.shape[1:]
    group = num_heads // x.k.shape[1]
    layout = x.layout.to("cpu")
    total = 0
    for kernel, matmuls in _MATMULS.items():
        is_forward = kernel.endswith("fwd")
        if (mode == "forward" and not is_forward) or (mode == "backward" and is_forward):
            continue
        tile = choose_tile(kernel, x.q.device, head_dim, x.q.dtype, layout.mean_span)
        streams = 2 if x.reset is not None and kernel.startswith("sum") else 1
        total += 2 * matmuls * streams * num_heads * head_dim * visited_pairs(layout, kernel, tile, group)
    return total


def measure(workload: Workload) -> list[dict[str, Any]]:
    """Rows of one workload, behind the parity gate; a provider that fails is a row that says why."""
    gate(workload, "cuda")
    x = AttentionInputs.of(workload, "cuda")
    pairs = x.layout.num_visible_pairs()
    common = {
        "benchmark": "attention",
        "workload": workload.name,
        "rows": x.layout.num_rows,
        "visible_pairs": pairs,
    }
    common["mean_span"] = round(pairs / x.layout.num_rows, 1)
    rows, timed, memory = [], {}, {}
    for name, prepare in GPU_PROVIDERS.items():
        try:
            modes = calls(prepare(x), x)
            for mode, call in modes.items():
                for _ in range(WARMUP):
                    call()
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                call()
                torch.cuda.synchronize()
                memory[name, mode] = round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
            timed[name] = modes
        except (Unavailable, RuntimeError, ImportError) as error:
            rows.append({**common, "provider": name, "failed": f"{type(error).__name__}: {error}"[:300]})
            torch.cuda.empty_cache()
    for mode in ("forward", "backward", "forward+backward"):
        times = device_ms({name: modes[mode] for name, modes in timed.items()}, REPEATS)
        forward = useful_flops(x.layout, workload.num_heads, workload.head_dim, backward=False)
        useful = forward * {"forward": 1.0, "backward": 2.5, "forward+backward": 3.5}[mode]
        for name, values in times.items():
            row = {
                **common,
                "provider": name,
                "mode": mode,
                **percentiles_ms(values),
                "peak_mib": memory[name, mode],
            }
            row["useful_tflops"] = round(useful / row["p50_ms"] / 1e9, 1)
            if name == "windowed_attn":
                row["computed_tflops"] = round(computed_flops(x, mode) / row["p50_ms"] / 1e9, 1)
            rows.append(row)
    return rows


def run(files: RowFiles, seconds: float) -> None:
    """Measure until the time is up; each workload's rows are saved as it ends."""
    torch._functorch.config.donated_buffer = False  # FlexAttention's graph is differentiated more than once
    torch._dynamo.config.recompile_limit = 64  # its block mask closes over a new layout every time
    deadline = time.monotonic() + seconds
    for workload in workloads():
        if time.monotonic() > deadline:
            rows = [{"benchmark": "attention", "workload": workload.name, "failed": "left out: time is up"}]
        else:
            try:
                rows = measure(workload)
            except (RuntimeError, AssertionError) as error:
                rows = [{"benchmark": "attention", "workload": workload.name, "failed": f"{error}"[:600]}]
            torch.cuda.empty_cache()
        files.append(rows)
        for row in rows:
            print({name: value for name, value in row.items() if name != "benchmark"}, flush=True)
