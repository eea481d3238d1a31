"""Scoring at a pretrained model's shape, with random weights and random token ids: needs no prepared data and no tokenizer.

    python -m benchmarks.bench_score --part candidates --shape smollm [--device cuda] [--out ROWS.jsonl]

What `dti_model.scorer` does below its texts: a layout of the history and its candidates, one pass of the model, softmax over two labels.
A time is of a whole request, from ids on the host to probabilities on the host. The passes of all providers give equal probabilities in
float32 before anything is timed; speed is measured in bfloat16 on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.attention.workloads import SHORT_TOKENS
from benchmarks.bench_train_gpu import MODELS
from benchmarks.measuring.measure import interleaved_ms, slowest_ms
from benchmarks.measuring.rehearsal import DEVICE, REHEARSING
from dti_kernels import candidate_layout
from dti_model.config import DTIConfig
from dti_model.model.attention import apply_dti, token_logits
from dti_model.model.past import LayerKeys, Past

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
    """A history and the candidates that are scored after it.

    Attributes:
        history: token ids of each interaction's item text.
        candidates: token ids of each candidate.
        state: what an earlier pass computed of the history; None: it is computed with the candidates.
    """

    history: Sequence[Ids]
    candidates: Sequence[Ids]
    state: list[LayerKeys] | None = None

    @property
    def num_rows(self) -> int:
        """Of a pass that computes all of it."""
        shared = 1 + sum(len(item) + 1 for item in self.history)
        return shared + sum(len(candidate) + 1 for candidate in self.candidates)


class ShapeScorer:
    """A model with random weights, and passes of it over prompts of random ids."""

    def __init__(self, shape: str, device: str, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        config = LlamaConfig(max_position_embeddings=1 << 17, use_cache=False, **MODELS[shape])
        self.dti, self.device = DTIConfig(), device
        # As `dti_model.model.pretrained` loads: the weights are made in `dtype` before apply_dti, so that rotary frequencies and slopes stay
        # float32. Rounded to bfloat16, positions would be wrong, and the kernels others than those of training.
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        self.model = apply_dti(model, self.dti).eval()
        self.vocab_size: int = config.vocab_size

    def texts(self, count: int, seed: int) -> list[Ids]:
        """So many item texts of random ids, as long as titles are with SmolLM2's tokenizer."""
        rng = np.random.default_rng(seed)
        lengths = rng.normal(SHORT_TOKENS["mean_tokens"] - 1, SHORT_TOKENS["std_tokens"], count)
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

    def providers(self, count: int) -> dict[str, Callable[[], npt.NDArray[np.float64]]]:
        """Three ways to score the same candidates."""
        history, candidates = self.texts(HISTORY, 0), self.texts(count, 1)
        _, state = self.forward([Prompt(history, [])])
        return {
            "one pass": lambda: self.score([Prompt(history, candidates)]),
            "encoded history": lambda: self.score([Prompt(history, candidates, state)]),
            "one prompt each": lambda: self.score([Prompt(history, [one]) for one in candidates]),
        }


def _difference(providers: dict[str, Callable[[], npt.NDArray[np.float64]]]) -> float:
    """Largest difference of probabilities from those of a prompt each."""
    expected = providers["one prompt each"]()
    return max(float(np.abs(call() - expected).max()) for call in providers.values())


def measure(shape: str, on_gpu: bool) -> list[dict[str, Any]]:
    """Rows of every number of candidates and provider.

    Args:
        shape: a key of `bench_training.MODELS`.
        on_gpu: bfloat16 on the GPU; otherwise float32 on the CPU.

    Raises:
        AssertionError: the providers' probabilities differ in float32.
    """
    device = DEVICE if on_gpu else "cpu"
    name = "tiny" if REHEARSING else shape
    scorer = ShapeScorer(name, device, torch.float32)
    difference = _difference(scorer.providers(8))
    assert difference <= PARITY, f"probabilities differ by {difference:.2e}, at most {PARITY} is rounding"
    if on_gpu:
        scorer = ShapeScorer(name, device, torch.bfloat16)
    rows = []
    for count, repeats in REPEATS.items():
        providers = scorer.providers(count)
        difference = _difference(providers)
        times = interleaved_ms(providers, repeats, warmup=2, device="cuda" if on_gpu else "cpu")
        base = float(np.median(times["one prompt each"]))
        for provider, ms in times.items():
            p50 = float(np.median(ms))
            row = {"benchmark": "score", "part": "shape", "model": shape, "history": HISTORY}
            row |= {"candidates": count, "provider": provider, "p50_ms": round(p50, 3)}
            row |= {**slowest_ms(ms), "candidates_per_s": round(1e3 * count / p50, 1)}
            row |= {"speedup": round(base / p50, 2), "repeats": repeats}
            rows.append({**row, "max_difference": float(f"{difference:.3g}")})
    return rows
