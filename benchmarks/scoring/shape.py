"""Scoring at a pretrained model's shape, with random weights and random token ids: needs no prepared data and no tokenizer.

    python -m benchmarks.bench_score --part candidates --shape smollm [--device cuda] [--out ROWS.jsonl]

The part of `dti_model.scorer` below its texts: a layout of the history and its candidates, one pass of the model, softmax over two labels.
A time is of a whole request, from ids on the host to probabilities on the host. The passes of all providers give equal probabilities in
float32 before anything is timed. On a GPU speed is measured with weights in bfloat16, on a CPU with weights in float32, in each precision.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.attention import SHORT_TOKENS
from benchmarks.measuring import DEVICE, REHEARSING
from benchmarks.recording import Rows
from benchmarks.scoring.candidates import (
    ENCODED,
    ONE_EACH,
    ONE_PASS,
    Providers,
    candidate_rows,
    check_parity,
    difference,
)
from benchmarks.shapes import MODELS
from benchmarks.synthetic import random_model
from dti_kernels import candidate_layout
from dti_model.config import DTIConfig
from dti_model.model import LayerKeys, Past, apply_dti, cast_once, token_logits
from dti_model.precision import Resolved, computing

Ids = npt.NDArray[np.int64]
HISTORY, WINDOW = 20, 20
TOKEN_BUDGET = 512 if REHEARSING else 16384
# Repeats by number of candidates: enough for a p99 where a call is short, and the maximum elsewhere.
REPEATS = {1: 1, 5: 1} if REHEARSING else {1: 100, 100: 40, 500: 15}
# Largest difference of probabilities between the providers, in float32.
PARITY = 1e-4
# Ids that labels and [SUM] have here: any will do.
_LABELS, _SUM = (1, 2), 3


@dataclass(frozen=True)
class Prompt:
    """A history and the candidates that are scored after it."""

    history: Sequence[Ids]  # token ids of each interaction's item text
    candidates: Sequence[Ids]  # token ids of each candidate
    # what an earlier pass computed of the history; None: it is computed with the candidates
    state: list[LayerKeys] | None = None

    @property
    def num_rows(self) -> int:
        """Of a pass that computes all of it."""
        shared = 1 + sum(len(item) + 1 for item in self.history)
        return shared + sum(len(candidate) + 1 for candidate in self.candidates)


class ShapeScorer:
    """A model with random weights, and passes of it over prompts of random ids."""

    def __init__(self, shape: str, device: str, dtype: torch.dtype) -> None:
        self.dti, self.device = DTIConfig(), device
        # In `dtype` before apply_dti, as weights are loaded: slopes stay float32. In bfloat16, kernels would be others than training's.
        self.model = apply_dti(random_model(MODELS[shape], dtype, device), self.dti).eval()
        self.vocab_size: int = MODELS[shape]["vocab_size"]
        self.precision: Resolved = "fp32"

    def in_precision(self, precision: Resolved) -> ShapeScorer:
        """One with the same model that computes in a precision, as `dti_model.scorer.Scorer` does."""
        other = copy.copy(self)
        other.precision, other.model = precision, cast_once(self.model, precision)
        return other

    def texts(self, count: int, seed: int) -> list[Ids]:
        """So many item texts of random ids, as long as titles are with SmolLM2's tokenizer."""
        rng = np.random.default_rng(seed)
        mean, deviation = SHORT_TOKENS
        lengths = rng.normal(mean - 1, deviation, count)
        return [rng.integers(self.vocab_size, size=max(2, round(length))) for length in lengths]

    @torch.no_grad()
    def forward(self, prompts: Sequence[Prompt]) -> tuple[torch.Tensor, list[LayerKeys]]:
        """Logits `(S, 2)` of the candidates of a packed pass, and the keys of its context rows; only one prompt may have a state."""
        layout = candidate_layout(
            [[len(item) for item in prompt.history] for prompt in prompts],
            [[1] * len(prompt.history) for prompt in prompts],
            [[len(candidate) for candidate in prompt.candidates] for prompt in prompts],
            WINDOW,
            prefix_lengths=[1] * len(prompts),
        )
        ids: list[Ids] = []
        for prompt in prompts:
            items = (np.append(item, _LABELS[i % 2]) for i, item in enumerate(prompt.history))
            ids += [np.zeros(1, np.int64), *items, *prompt.candidates]
        ids.append(np.full(layout.num_sum, _SUM))
        given, past = torch.from_numpy(np.concatenate(ids)), None
        (first, *_) = prompts
        if first.state is not None:
            num_known = len(first.state[0].k)
            rows = torch.arange(layout.num_rows, device=self.device)
            past = Past(first.state, rows[:num_known], rows[num_known:])
            given = given[num_known:]
        recorded: list[LayerKeys] = []
        with computing(self.precision, self.device):
            logits = token_logits(
                self.model,
                given.to(self.device),
                layout.to(self.device),
                self.dti,
                _LABELS,
                past=past,
                recorded=recorded,
            )
        return logits, recorded

    def score(self, prompts: Sequence[Prompt]) -> npt.NDArray[np.float64]:
        """Probabilities of all candidates, in passes of at most `TOKEN_BUDGET` rows."""
        passes: list[list[Prompt]] = [[]]
        for prompt in prompts:
            if passes[-1] and sum(p.num_rows for p in passes[-1]) + prompt.num_rows > TOKEN_BUDGET:
                passes.append([])
            passes[-1].append(prompt)
        logits = [self.forward(packed)[0] for packed in passes]
        return np.concatenate([torch.softmax(x.double(), -1)[:, 1].cpu().numpy() for x in logits])

    def providers(self, count: int) -> Providers:
        """Three ways to score the same candidates."""
        history, candidates = self.texts(HISTORY, 0), self.texts(count, 1)
        _, state = self.forward([Prompt(history, [])])
        return {
            ONE_PASS: lambda: self.score([Prompt(history, candidates)]),
            ENCODED: lambda: self.score([Prompt(history, candidates, state)]),
            ONE_EACH: lambda: self.score([Prompt(history, [one]) for one in candidates]),
        }


def measure_shape(shape: str, on_gpu: bool, precisions: Sequence[Resolved]) -> Rows:
    """Rows of every number of candidates, provider and precision.

    Args:
        shape: a key of `MODELS`.
        on_gpu: on the GPU, in bfloat16; otherwise on the CPU.
        precisions: on the CPU.

    Raises:
        AssertionError: the providers' probabilities differ in float32.
    """
    device = DEVICE if on_gpu else "cpu"
    name = "tiny" if REHEARSING else shape
    scorer = ShapeScorer(name, device, torch.float32)
    check_parity({"fp32": scorer.providers(8)}, ONE_EACH, {"fp32": PARITY})
    scorers: Mapping[Resolved, ShapeScorer] = (
        {"bf16": ShapeScorer(name, device, torch.bfloat16)}
        if on_gpu
        else {precision: scorer.in_precision(precision) for precision in precisions}
    )
    rows = []
    for count, repeats in REPEATS.items():
        providers = {precision: scorer.providers(count) for precision, scorer in scorers.items()}
        differences = {
            precision: float(f"{difference(of, of[ONE_EACH]()):.3g}") for precision, of in providers.items()
        }
        facts = {"part": "shape", "model": shape, "history": HISTORY}
        for row in candidate_rows(providers, count, repeats, "cuda" if on_gpu else "cpu"):
            rows.append({**row, **facts, "max_difference": differences[row["precision"]]})
    return rows
