"""Training steps with random weights: streaming prompts beside sliding-window prompts, targets per second.

    python -m benchmarks.bench_training [--model llama8b-slice] [--device cuda] [--seconds 80] [--out ROWS.jsonl] [--record]

Both kinds get the same model, the same packed batches of about as many tokens, the same attention and the same optimizer; steps
are interleaved. `llama8b-slice` is Llama-3.1-8B's shape with two layers, `smollm` all of SmolLM2-135M's, in bfloat16.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.measure import parse_measuring, percentiles_ms
from benchmarks.workloads import Workload
from dti_kernels import StreamLayout
from dti_model.attention import DTIConfig, apply_dti, token_logits

MODELS: dict[str, dict[str, Any]] = {
    "llama8b-slice": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_hidden_layers": 2,
        "vocab_size": 128256,
    },
    "smollm": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "num_hidden_layers": 30,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_hidden_layers": 2,
        "vocab_size": 64,
    },
}
KINDS = {"streaming_k50": 50, "sliding_window": 1}


def batch(kind: str, num_tokens: int, device: str, vocab_size: int) -> tuple[torch.Tensor, StreamLayout]:
    """Token ids and layout of one packed batch."""
    layout = Workload(kind, num_tokens, KINDS[kind], 1, 1, 1).layout(device)
    generator = torch.Generator(device).manual_seed(0)
    return torch.randint(vocab_size, (layout.num_rows,), device=device, generator=generator), layout


def measure(name: str, device: str, num_tokens: int, num_steps: int, seconds: float) -> list[dict[str, Any]]:
    """One row per kind of prompt."""
    torch.manual_seed(0)
    config = LlamaConfig(max_position_embeddings=1 << 20, use_cache=False, **MODELS[name])
    with torch.device(device):
        model = LlamaForCausalLM(config).to(torch.bfloat16 if device == "cuda" else torch.float32)
    dti = DTIConfig()
    model = apply_dti(model, dti).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=device == "cuda")
    batches = {kind: batch(kind, num_tokens, device, config.vocab_size) for kind in KINDS}
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    peak = dict.fromkeys(KINDS, 0.0)
    deadline = time.monotonic() + seconds
    for step in range(num_steps + 2):
        if step > 3 and time.monotonic() > deadline:
            break
        for kind, (ids, layout) in batches.items():
            if device == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            logits = token_logits(model, ids, layout, dti)
            labels = torch.zeros(len(logits), dtype=torch.long, device=device)
            loss = torch.nn.functional.cross_entropy(logits.float(), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            value = float(loss.detach())  # waits for the device
            if not np.isfinite(value):
                raise RuntimeError(f"{name}, {kind}: loss {value} at step {step}")
            if step > 1:
                times[kind].append(1e3 * (time.perf_counter() - start))
            if device == "cuda":
                peak[kind] = torch.cuda.max_memory_allocated() / 2**20
    rows = []
    for kind, (ids, layout) in batches.items():
        timing = percentiles_ms(np.asarray(times[kind]))
        rows.append(
            {
                "benchmark": "training",
                "model": name,
                "kind": kind,
                "tokens": len(ids),
                "targets": layout.num_sum,
                "steps": len(times[kind]),
                **timing,
                "targets_per_s": round(1e3 * layout.num_sum / timing["p50_ms"], 1),
                "tokens_per_s": round(1e3 * len(ids) / timing["p50_ms"]),
                "peak_mib": round(peak[kind]),
            }
        )
    return rows


def main() -> None:
    """Measure, print and keep the rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, nargs="+", default=["llama8b-slice", "smollm"])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=80.0)
    options = parse_measuring(parser, "training-{device}")
    for name in options.model:
        rows = measure(
            name, options.device, options.tokens, options.steps, options.seconds / len(options.model)
        )
        for row in rows:
            print(row, flush=True)
        print(
            f"{name}: streaming over sliding window {rows[0]['targets_per_s'] / rows[1]['targets_per_s']:.2f} x"
        )
        options.rows.append(rows)
    print(f"rows: {options.rows}")


if __name__ == "__main__":
    main()
