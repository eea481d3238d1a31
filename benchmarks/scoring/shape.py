"""Scoring at a pretrained model's shape, with random weights and random token ids: needs no prepared data and no tokenizer.

    python -m benchmarks.bench_score --part candidates --shape smollm [--device cuda] [--out ROWS.jsonl]

The part of `dti_model.scorer` below its texts: a layout of the history and its candidates, one pass of the model, softmax over two labels.
A time is of a whole request, from ids on the host to probabilities on the host. The passes of all providers give equal probabilities in
float32 before anything is timed. On a GPU speed is measured with weights in bfloat16, on a CPU with weights in float32, in each precision.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
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
    Provider,
    Providers,
    candidate_rows,
    check_parity,
    difference,
    of_graphs,
)
from benchmarks.scoring.rerun import CAPTURE
from benchmarks.shapes import MODELS
from benchmarks.synthetic import random_model
from dti_kernels import candidate_layout
from dti_model.config import DTIConfig
from dti_model.model import GraphedPasses, LayerKeys, PackedPass, Passes, apply_dti, cast_once
from dti_model.precision import Resolved

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
        self.passes = Passes(self.model, self.dti, _LABELS, self.precision)

    def in_precision(self, precision: Resolved) -> ShapeScorer:
        """One with the same model that computes in a precision, as `dti_model.scorer.Scorer` does."""
        other = copy.copy(self)
        other.precision, other.model = precision, cast_once(self.model, precision)
        other.passes = Passes(other.model, self.dti, _LABELS, precision)
        return other

    def texts(self, count: int, seed: int) -> list[Ids]:
        """So many item texts of random ids, as long as titles are with SmolLM2's tokenizer."""
        rng = np.random.default_rng(seed)
        mean, deviation = SHORT_TOKENS
        lengths = rng.normal(mean - 1, deviation, count)
        return [rng.integers(self.vocab_size, size=max(2, round(length))) for length in lengths]

    def pack(self, prompts: Sequence[Prompt]) -> PackedPass:
        """The pass of some prompts; only the first may have a state."""
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
        known, state = np.zeros(layout.num_rows, bool), prompts[0].state
        known[: 0 if state is None else len(state[0].k)] = True
        return PackedPass(np.concatenate(ids), layout, known, () if state is None else (state,))

    def forward(
        self, prompts: Sequence[Prompt], records: bool = True
    ) -> tuple[torch.Tensor, list[LayerKeys]]:
        """Logits `(S, 2)` of the candidates of a packed pass, and if they are wanted the keys of its context rows."""
        return self.passes.compute(self.pack(prompts), records)

    def score(self, prompts: Sequence[Prompt]) -> npt.NDArray[np.float64]:
        """Probabilities of all candidates, in passes of at most `TOKEN_BUDGET` rows."""
        passes: list[list[Prompt]] = [[]]
        for prompt in prompts:
            if passes[-1] and sum(p.num_rows for p in passes[-1]) + prompt.num_rows > TOKEN_BUDGET:
                passes.append([])
            passes[-1].append(prompt)
        logits = [self.forward(packed, records=False)[0] for packed in passes]
        return np.concatenate([torch.softmax(x.double(), -1)[:, 1].cpu().numpy() for x in logits])

    def through_graphs(self) -> ShapeScorer:
        """One with the same model whose passes are CUDA graphs."""
        other = copy.copy(self)
        other.passes = GraphedPasses(self.model, self.dti, _LABELS, self.precision, CAPTURE)
        return other

    def providers(self, count: int, graphs: ShapeScorer | None = None) -> Providers:
        """Ways to score the same candidates: three, and two more through the graphs of another scorer with the same model."""
        history, candidates = self.texts(HISTORY, 0), self.texts(count, 1)
        _, state = self.forward([Prompt(history, [])])
        found: dict[str, Provider] = {
            ONE_PASS: lambda: self.score([Prompt(history, candidates)]),
            ENCODED: lambda: self.score([Prompt(history, candidates, state)]),
            ONE_EACH: lambda: self.score([Prompt(history, [one]) for one in candidates]),
        }
        if graphs is not None:
            _, same = graphs.forward([Prompt(history, [])])
            found[of_graphs(ONE_PASS)] = lambda: graphs.score([Prompt(history, candidates)])
            found[of_graphs(ENCODED)] = lambda: graphs.score([Prompt(history, candidates, same)])
        return found


def measure_shape(shape: str, on_gpu: bool, precisions: Sequence[Resolved]) -> Iterator[Rows]:
    """Rows of every provider and precision, for one number of candidates after the other.

    Args:
        shape: a key of `MODELS`.
        on_gpu: on the GPU, in bfloat16, through CUDA graphs too; otherwise on the CPU.
        precisions: on the CPU.

    Raises:
        AssertionError: the providers' probabilities differ in float32.
    """
    device = DEVICE if on_gpu else "cpu"
    name = "tiny" if REHEARSING else shape
    scorer = ShapeScorer(name, device, torch.float32)
    graphs = {"fp32": scorer.through_graphs()} if on_gpu else {}
    check_parity({"fp32": scorer.providers(8, graphs.get("fp32"))}, ONE_EACH, {"fp32": PARITY})
    scorers: Mapping[Resolved, ShapeScorer] = (
        {"bf16": ShapeScorer(name, device, torch.bfloat16)}
        if on_gpu
        else {precision: scorer.in_precision(precision) for precision in precisions}
    )
    if on_gpu:
        graphs = {precision: scorer.through_graphs() for precision, scorer in scorers.items()}
    for count, repeats in REPEATS.items():
        providers = {
            precision: scorer.providers(count, graphs.get(precision)) for precision, scorer in scorers.items()
        }
        differences = {
            precision: float(f"{difference(of, of[ONE_EACH]()):.3g}") for precision, of in providers.items()
        }
        facts = {"part": "shape", "model": shape, "history": HISTORY}
        yield [
            {**row, **facts, "max_difference": differences[row["precision"]]}
            for row in candidate_rows(providers, count, repeats, "cuda" if on_gpu else "cpu")
        ]
