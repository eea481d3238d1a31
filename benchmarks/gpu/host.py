"""The host's time for a call of `windowed_attn` on a GPU: microseconds per call at a size that the device is done with at once.

    python -m benchmarks.gpu.host [--out ROWS.jsonl] [--record]

It is the floor of scoring, where a request is a few hundred rows. Forward alone and with its backward, with and without the hidden-state
reset, beside SDPA; eager, through `torch.compile`, and the forward as a captured CUDA graph, whose replay costs the host next to nothing.
A call that cannot be compiled or captured is a row that says why; where time is up before all has been measured, the status is 75.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.attention import OURS, AttentionInputs, Call, Workload, by_mode, sdpa, windowed
from benchmarks.measuring import DEVICE, REHEARSING, check_device
from benchmarks.recording import INCOMPLETE, TIME_IS_UP, RowFiles, failure, make_parser, parse_measuring
from benchmarks.shapes import HEADS

# One prompt of a few interactions: no kernel of it takes longer than its launch. Kernels are specialised on the query heads of a key head,
# so the heads are those of a model whose kernels `benchmarks.gpu.precompile` has compiled.
TINY = Workload(
    "host", 48, 3, *HEADS["smollm"], window=2, mean_tokens=8.0, std_tokens=1.0, dtype=torch.bfloat16
)
# Calls of a timed batch: few enough that no queue of launches fills up, which would make the host wait for the device.
_CALLS, _BATCHES, _WARMUP = (2, 2, 1) if REHEARSING else (20, 50, 3)
SDPA = "sdpa_causal"


def host_us(call: Callable[[], Any]) -> dict[str, float]:
    """P10 and P50 of microseconds of the host per call, the device at rest before each batch of calls, and P50 until it is done."""
    for _ in range(_WARMUP):
        call()
    host, both = [], []
    for _ in range(_BATCHES):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(_CALLS):
            call()
        host.append(1e6 * (time.perf_counter() - start) / _CALLS)
        torch.cuda.synchronize()
        both.append(1e6 * (time.perf_counter() - start) / _CALLS)
    # `p50_us_synchronized` is far above `p50_us` where the device needs longer than the host.
    return {
        "p10_us": round(float(np.percentile(host, 10)), 1),
        "p50_us": round(float(np.percentile(host, 50)), 1),
        "p50_us_synchronized": round(float(np.percentile(both, 50)), 1),
    }


def providers(x: AttentionInputs) -> dict[str, Call]:
    """Ours and SDPA on the same queries, keys and values."""
    ours = {OURS: windowed(x)}
    return ours if x.reset is not None else ours | {SDPA: lambda y: sdpa(y, grouped=True, is_causal=True)}


def captured(call: Callable[[], torch.Tensor]) -> Callable[[], Any]:
    """A forward as a CUDA graph; calling it replays the graph.

    Raises:
        AssertionError: a replay computes something else than an eager call.
        RuntimeError: something in the call cannot be captured: a copy from pageable memory, or waiting for the device.
    """
    expected = call()
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    # Capture wants warm caches of its stream. One that fails stays on it: the outer context is what leaves it.
    with torch.cuda.stream(stream):
        for _ in range(_WARMUP):
            call()
        with torch.cuda.graph(graph, stream=stream):
            out = call()
    torch.cuda.current_stream().wait_stream(stream)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, expected), "the graph's replay gives another output than an eager call"
    return graph.replay


def compiled(x: AttentionInputs) -> dict[str, Callable[[], Any]]:
    """Ours through `torch.compile`, as one graph, by mode; in a rehearsal traced only."""
    ours = providers(x)[OURS]
    graph = torch.compile(lambda: ours(x), fullgraph=True, backend="eager" if REHEARSING else "inductor")
    return by_mode(lambda _: graph(), x)


def ways(x: AttentionInputs) -> list[tuple[str, str, str, Callable[[], Callable[[], Any]]]]:
    """Provider, way, mode and what makes the call; compiling takes longest, so it comes last."""
    modes = ("forward", "forward+backward")
    calls = {name: by_mode(call, x) for name, call in providers(x).items()}
    found: list[tuple[str, str, str, Callable[[], Callable[[], Any]]]] = []
    found += [
        (name, "eager", mode, partial(calls[name].__getitem__, mode)) for name in calls for mode in modes
    ]
    found += [(name, "graph", "forward", partial(captured, calls[name]["forward"])) for name in calls]
    return [*found, *((OURS, "compiled", mode, partial(_of_mode, x, mode)) for mode in modes)]


def _of_mode(x: AttentionInputs, mode: str) -> Callable[[], Any]:
    return compiled(x)[mode]


def measure(files: RowFiles, seconds: float) -> tuple[bool, bool]:
    """Append a row per provider, way and mode; whether ours ran eagerly, and whether nothing was left out.

    Args:
        files: to append to.
        seconds: after which nothing more is started.
    """
    deadline = time.monotonic() + seconds
    batches = {reset: AttentionInputs.of(replace(TINY, reset=reset), DEVICE) for reset in (False, True)}
    todo = [(reset, x, *way) for reset, x in batches.items() for way in ways(x)]
    todo.sort(key=lambda entry: ("eager", "graph", "compiled").index(entry[3]))
    ran = complete = True
    for reset, x, provider, way, mode, make in todo:
        row: dict[str, Any] = {"benchmark": "host", "provider": provider, "reset": reset, "way": way}
        row |= {"mode": mode, "rows": x.layout.num_rows}
        if time.monotonic() > deadline:
            row["failed"], complete = TIME_IS_UP, False
        else:
            try:
                row |= host_us(make())
            except Exception as error:  # what cannot be captured or compiled is what is asked here
                row["failed"] = failure(error)
                check_device(error)
                ran &= (provider, way) != (OURS, "eager")
        files.append([row])
        print(row, flush=True)
    return ran, complete


def main() -> None:
    """Measure, print and keep the rows; exit with 1 if ours did not run, else with `INCOMPLETE` if something was left out."""
    parser = make_parser(__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="start nothing after this")
    options = parse_measuring(parser, "host-gpu")
    ran, complete = measure(options.rows, options.seconds)
    if not ran:
        raise SystemExit("windowed_attn failed: see its rows")
    print(f"rows: {options.rows}")
    if not complete:
        sys.exit(INCOMPLETE)


if __name__ == "__main__":
    main()
