"""Scoring: candidates of one user in one pass, and evaluation of a test split, each beside what one would do without.

    python -m benchmarks.bench_score [--data DIR] [--part candidates evaluation] [--device cuda] [--out ROWS.jsonl] [--record] [--size smoke]
    python -m benchmarks.bench_score --part candidates --shape smollm --device cuda        (`benchmarks/gpu/score_shape.py`)

`candidates`: 1 to 500 candidates of a real user with a history of 20: one pass; an encoded history, with which only candidates are
computed; and one sliding-window prompt per candidate, packed, with the same model and attention.
`evaluation`: targets of the test split (of every `--user-step`-th user): `score_targets` beside two Hugging Face loops
(LlamaForCausalLM with the same weights, SDPA, one left-padded prompt per target, batches of 32), in mode dti-minus, which is what a
plain model computes: one that takes the logits that the model returns, and a careful one that asks for those of the last position
only. Weights are random: speed does not depend on them. No row without parity.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import LlamaForCausalLM

from benchmarks.gpu import score_shape
from benchmarks.measuring.measure import interleaved_ms, parse_measuring, slowest_ms
from benchmarks.measuring.rehearsal import DEVICE
from dti_model.config import DTIConfig

# What reads prepared data is imported where it is used: `--shape` runs where the packages that read it are missing.
if TYPE_CHECKING:
    from dti_model.config import ModelConfig
    from dti_model.model.run import Run

HISTORY = 20
# Repeats by number of candidates: enough for a p99 where a call is short, and the maximum elsewhere.
REPEATS, SMOKE_REPEATS = {1: 100, 10: 50, 100: 15, 500: 5}, {1: 1, 10: 1}
PARITY = 1e-5
BATCH = 32


def new_run(data: Path, model: ModelConfig, dti: DTIConfig, device: str) -> Run:
    """An untrained run, on a device."""
    from dti_model.config import TrainConfig
    from dti_model.model.run import Run

    run = Run.start(TrainConfig(data=data, out=Path("unused"), window=HISTORY, model=model, dti=dti))
    run.model.to(device).eval()
    return run


def measure_candidates(run: Run, device: str, repeats_of: dict[int, int]) -> list[dict[str, Any]]:
    """Rows of every number of candidates and provider."""
    from dti_model.scorer import Scorer

    scorer = Scorer(run)
    user = next(u for u in run.data.user_ids if len(scorer.history_of(u)) >= HISTORY)
    history = scorer.history_of(user)[-HISTORY:]
    state = scorer.encode(history)
    items = np.random.default_rng(0).permutation(run.data.item_ids).tolist()
    rows = []
    for count, repeats in repeats_of.items():
        candidates = items[:count]

        def one_prompt_each(candidates: list[str] = candidates) -> np.ndarray:
            return np.concatenate(scorer.score_many([scorer.request(history, [item]) for item in candidates]))

        providers: dict[str, Callable[[], np.ndarray]] = {
            "one pass": lambda candidates=candidates: scorer.score(history, candidates),
            "encoded history": lambda candidates=candidates: scorer.score(state, candidates),
            "one prompt each": one_prompt_each,
        }
        expected = one_prompt_each()
        for name, call in providers.items():
            if np.abs(call() - expected).max() > PARITY:
                raise AssertionError(
                    f"{name}: scores of {count} candidates differ from those of a prompt each"
                )
        times = interleaved_ms(providers, repeats, warmup=2, device=device)
        base = float(np.median(times["one prompt each"]))
        for name, ms in times.items():
            p50 = float(np.median(ms))
            rows.append(
                {
                    "benchmark": "score",
                    "part": "candidates",
                    "history": HISTORY,
                    "candidates": count,
                    "provider": name,
                    "p50_ms": round(p50, 2),
                    **slowest_ms(ms),
                    "candidates_per_s": round(1e3 * count / p50, 1),
                    "speedup": round(base / p50, 2),
                    "repeats": repeats,
                }
            )
    return rows


def padded_scores(
    model: LlamaForCausalLM, prompts: list[torch.Tensor], labels: tuple[int, int], logits_to_keep: int
) -> np.ndarray:
    """The plain loop: probabilities from left-padded batches of prompts, each context tokens and then [SUM]; 0 keeps all logits."""
    scores = []
    for begin in range(0, len(prompts), BATCH):
        ids = prompts[begin : begin + BATCH]
        longest = max(map(len, ids))
        input_ids = torch.stack([torch.nn.functional.pad(x, (longest - len(x), 0)) for x in ids])
        lengths = torch.tensor(list(map(len, ids)))
        mask = torch.arange(longest) >= longest - lengths[:, None]
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        with torch.no_grad():
            output = model(
                input_ids.to(model.device),
                attention_mask=mask.long().to(model.device),
                position_ids=positions.to(model.device),
                use_cache=False,
                logits_to_keep=logits_to_keep,
            )
        logits = output.logits[:, -1, list(labels)]
        scores.append(torch.softmax(logits.double(), -1)[:, 1].cpu().numpy())
    return np.concatenate(scores)


def measure_evaluation(run: Run, device: str, repeats: int, user_step: int) -> list[dict[str, Any]]:
    """Rows of all ways to score the test split, or a slice of it; `speedup` is over the plain loop."""
    from dti_model.evaluation.scoring import score_targets
    from dti_model.model.run import llama_config
    from dti_model.prompts import Prompts

    assert run.config.dti.mode == "dti-minus"
    plain = LlamaForCausalLM(llama_config(run.config.model, run.tokenizer))
    plain.load_state_dict(run.model.state_dict())
    plain.set_attn_implementation("sdpa")
    plain.to(device).eval()
    rows = np.sort(run.data.targets("test"))
    rows = rows[run.data.users_of(rows) % user_step == 0]
    prompts = Prompts.streaming(run.data, rows, run.config.window, 1)
    ids = [run.builder.batch(prompts[np.array([i])]).input_ids for i in range(len(prompts))]
    labels = run.builder.format.labels
    providers: dict[str, Callable[[], np.ndarray]] = {
        "packed": lambda: score_targets(run.model, run.config.dti, run.builder, rows),
        "padded Hugging Face, last logits only": lambda: padded_scores(plain, ids, labels, 1),
        "padded Hugging Face": lambda: padded_scores(plain, ids, labels, 0),
    }
    expected = providers["packed"]()
    for name, provider in providers.items():
        if np.abs(provider() - expected).max() > PARITY:
            raise AssertionError(f"packed scores and those of {name} differ")
    times = interleaved_ms(providers, repeats, warmup=0, device=device)
    base = float(np.median(times["padded Hugging Face"]))
    return [
        {
            "benchmark": "score",
            "part": "evaluation",
            "data": run.data.stats["source"]["name"],
            "targets": len(rows),
            "provider": name,
            "p50_ms": round(float(np.median(ms)), 1),
            "targets_per_s": round(1e3 * len(rows) / float(np.median(ms)), 1),
            "speedup": round(base / float(np.median(ms)), 2),
            "repeats": repeats,
        }
        for name, ms in times.items()
    ]


def main() -> None:
    """Measure, print and keep the rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, help="folder made by `dti prepare`; default: made-up data of MovieLens' shape"
    )
    parser.add_argument("--part", nargs="+", choices=("candidates", "evaluation"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3, help="of the evaluation")
    parser.add_argument("--user-step", type=int, default=1, help="evaluate targets of every n-th user")
    parser.add_argument(
        "--shape", choices=("smollm",), help="of a pretrained model, with random ids: no data"
    )
    smoke = {"layers": 1, "width": 16, "repeats": 1, "user_step": 40}
    options = parse_measuring(parser, "score-{device}", smoke)
    if options.shape is not None:
        if options.part != ["candidates"]:
            parser.error(
                "--shape has random ids, which there is nothing to evaluate with: give --part candidates"
            )
        rows = score_shape.measure(options.shape, options.device == "cuda")
    else:
        rows = measure_data(options)
    for row in rows:
        task = f"{row['candidates']} candidates" if "candidates" in row else f"{row['targets']} targets"
        print(f"{task:>14}  {row['provider']:38} p50 {row['p50_ms']:9.1f} ms  {row['speedup']:6.2f} x")
    options.rows.append(rows)
    print(f"rows: {options.rows}")


def measure_data(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of the parts asked for, on prepared data or on made-up data."""
    from benchmarks.synthetic import made_up_data
    from dti_model.config import ModelConfig

    device = DEVICE if options.device == "cuda" else "cpu"
    model = ModelConfig(
        layers=options.layers,
        width=options.width,
        mlp_width=-(-options.width // 3) * 8,  # as the ready-made configurations: a multiple of 8
        dropout=0.0,
    )
    if options.data is None:
        options.data = made_up_data(Path(tempfile.mkdtemp()))
    rows = []
    for part in options.part or ("candidates", "evaluation"):
        if part == "candidates":
            run = new_run(options.data, model, DTIConfig(alpha_max=0.5), device)
            repeats_of = SMOKE_REPEATS if options.size == "smoke" else REPEATS
            rows += measure_candidates(run, device, repeats_of)
        else:
            run = new_run(options.data, model, DTIConfig("dti-minus"), device)
            rows += measure_evaluation(run, device, options.repeats, options.user_step)
    return [{**row, "model": f"{options.layers} x {options.width}"} for row in rows]


if __name__ == "__main__":
    main()
