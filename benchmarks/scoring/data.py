"""Scoring of prepared data in each precision: candidates of one user, and a test split, each beside what one would do without."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaForCausalLM

from benchmarks.measuring import DTYPES, interleaved_ms
from benchmarks.recording import Rows
from benchmarks.scoring.candidates import (
    ENCODED,
    ONE_EACH,
    ONE_PASS,
    Provider,
    Providers,
    candidate_rows,
    check_parity,
    of_graphs,
    over_fp32,
)
from dti_model.config import DTIConfig, ModelConfig, TrainConfig
from dti_model.evaluation import score_targets
from dti_model.model import Run, llama_config
from dti_model.precision import Resolved
from dti_model.prompts import Prompts
from dti_model.scorer import Scorer

HISTORY = 20
# Repeats by number of candidates: enough for a p99 where a call is short, and the maximum elsewhere.
REPEATS, SMOKE_REPEATS = {1: 100, 10: 50, 100: 15, 500: 5}, {1: 1, 10: 1}
# Largest difference of probabilities from float32's that is rounding: in bfloat16, two units in the last place of a number near one half.
PARITY: Mapping[Resolved, float] = {"fp32": 1e-5, "bf16": 2**-8}
BATCH = 32


def new_run(data: Path, model: ModelConfig, dti: DTIConfig, device: str) -> Run:
    """An untrained run, on a device."""
    run = Run.start(TrainConfig(data=data, out=Path("unused"), window=HISTORY, model=model, dti=dti))
    torch.nn.Module.to(run.model, device).eval()
    return run


def measure_candidates(
    run: Run, device: str, repeats_of: dict[int, int], precisions: Sequence[Resolved]
) -> Rows:
    """Rows of every number of candidates, provider and precision.

    Raises:
        AssertionError: scores differ from those of a prompt each.
    """
    scorers = {precision: Scorer(run, precision=precision, graphs=False) for precision in precisions}
    # On a CPU there are none.
    replaying = {
        precision: Scorer(run, precision=precision, graphs=True)
        for precision in precisions
        if device.startswith("cuda")
    }
    scorer = next(iter(scorers.values()))
    user = next(u for u in run.data.user_ids if len(scorer.history_of(u)) >= HISTORY)
    history = scorer.history_of(user)[-HISTORY:]
    states = {precision: scorer.encode(history) for precision, scorer in scorers.items()}
    others = {precision: scorer.encode(history) for precision, scorer in replaying.items()}
    items = np.random.default_rng(0).permutation(run.data.item_ids).tolist()

    def one_each(scorer: Scorer, candidates: list[str]) -> np.ndarray:
        return np.concatenate(scorer.score_many([scorer.request(history, [item]) for item in candidates]))

    rows = []
    for count, repeats in repeats_of.items():
        candidates = items[:count]
        providers: dict[Resolved, Providers] = {}
        for precision, scorer in scorers.items():
            found: dict[str, Provider] = {
                ONE_PASS: partial(scorer.score, history, candidates),
                ENCODED: partial(scorer.score, states[precision], candidates),
                ONE_EACH: partial(one_each, scorer, candidates),
            }
            if precision in replaying and replaying[precision].uses_graphs:
                score = replaying[precision].score
                found[of_graphs(ONE_PASS)] = partial(score, history, candidates)
                found[of_graphs(ENCODED)] = partial(score, others[precision], candidates)
            providers[precision] = found
        check_parity(providers, ONE_EACH, PARITY)
        facts = {"part": "candidates", "history": HISTORY}
        rows += [{**row, **facts} for row in candidate_rows(providers, count, repeats, device)]
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


def plain_model(run: Run, precision: Resolved, device: str) -> LlamaForCausalLM:
    """The run's weights in plain Hugging Face. In bfloat16 they are stored so: no time of a call is spent on casting them."""
    config = llama_config(run.config.model, run.tokenizer)
    # Made in its dtype, as a model that is loaded: frequencies of positions stay float32.
    model: LlamaForCausalLM = LlamaForCausalLM._from_config(config, dtype=DTYPES[precision])
    model.load_state_dict(run.model.state_dict())
    model.set_attn_implementation("sdpa")
    torch.nn.Module.to(model, device).eval()
    return model


def measure_evaluation(
    run: Run, device: str, repeats: int, user_step: int, precisions: Sequence[Resolved]
) -> Rows:
    """Rows of all ways to score the test split, or a slice of it, in each precision; `speedup` is over the plain loop in the same one.

    Raises:
        AssertionError: scores differ from those of the packed prompts.
    """
    assert run.config.dti.mode == "dti-minus"
    rows = np.sort(run.data.targets("test"))
    rows = rows[run.data.users_of(rows) % user_step == 0]
    prompts = Prompts.streaming(run.data, rows, run.config.window, 1)
    ids = [run.builder.batch(prompts[np.array([i])]).input_ids for i in range(len(prompts))]
    labels = run.builder.format.labels
    packed = partial(score_targets, run.model, run.config.dti, run.builder, rows)
    providers: dict[Resolved, Providers] = {}
    for precision in precisions:
        plain = plain_model(run, precision, device)
        providers[precision] = {
            "packed": partial(packed, precision=precision),
            "padded Hugging Face, last logits only": partial(padded_scores, plain, ids, labels, 1),
            "padded Hugging Face": partial(padded_scores, plain, ids, labels, 0),
        }
    check_parity(providers, "packed", PARITY)
    timed = {(precision, name): call for precision, of in providers.items() for name, call in of.items()}
    times = interleaved_ms(timed, repeats, warmup=0, device=device)
    p50s = {key: float(np.median(ms)) for key, ms in times.items()}
    facts = {"benchmark": "score", "part": "evaluation", "data": run.data.stats["source"]["name"]}
    facts |= {"targets": len(rows), "repeats": repeats}
    found = []
    for (precision, name), p50 in p50s.items():
        row = {**facts, "provider": name, "precision": precision, "p50_ms": round(p50, 1)}
        row["speedup"] = round(p50s[precision, "padded Hugging Face"] / p50, 2)
        row |= over_fp32(p50s, precision, name)
        found.append({**row, "targets_per_s": round(1e3 * len(rows) / p50, 1)})
    return found
