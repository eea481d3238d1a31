"""Scoring: the probability of a click at every target, from packed prompts.

    p = softmax(logit_yes, logit_no)[yes]

One sliding-window prompt (k = 1) per target unless asked otherwise, as the paper does; targets whose windows all reach the
user's first interaction share a prompt, which gives them the same scores. The ranks of a run share the batches, and each ends with
all scores, so that metrics are those of the whole split.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from peft import PeftModel
from tqdm.auto import trange
from transformers import PreTrainedModel

from dti_model.config import DTIConfig
from dti_model.model import cast_once, token_logits
from dti_model.precision import Resolved, computing, wants_few_shapes
from dti_model.prompts import IntArray, PromptBuilder, Prompts, consecutive_batches
from dti_model.ranks import rank, world_size

# Rows of a packed batch: what a CPU's caches like (benchmarks/LOG.md), and what keeps a GPU busy.
TOKEN_BUDGETS = {"cpu": 4096, "gpu": 16384}


@torch.no_grad()
def score_targets(
    model: PreTrainedModel | PeftModel,
    config: DTIConfig,
    builder: PromptBuilder,
    rows: IntArray,
    token_budget: int | None = None,
    k: int | None = 1,
    progress: str | None = None,
    precision: Resolved = "fp32",
    strict_time: bool = False,
) -> npt.NDArray[np.float64]:
    """Click probabilities of targets.

    Args:
        model: the result of `apply_dti`, perhaps inside peft's wrapper; its training mode is kept.
        config: the one the model was made with.
        builder: histories and tokens.
        rows: `(S,)` interaction rows to score, in any order.
        token_budget: rows of a packed batch; a longer prompt gets a batch of its own. None: `TOKEN_BUDGETS` of the device.
        k: targets per prompt: 1 for (the scores of) sliding windows, None for whole histories.
        progress: label of a progress bar; None: no bar.
        strict_time: leave out of every target's context what shares its time stamp; with k = 1.
        precision: to compute in. Weights are cast once, and probabilities differ by what bfloat16 rounds (`dti_model.scorer` has a
            bound).

    Returns:
        `(S,)` probabilities in the order of `rows`.
    """
    prompts = _prompts(builder, rows, k, strict_time)
    device, was_training = model.device, model.training
    scoring = cast_once(model, precision).eval()
    token_budget = token_budget or TOKEN_BUDGETS["cpu" if device.type == "cpu" else "gpu"]
    batches = list(consecutive_batches(builder.num_rows(prompts), token_budget))
    # A sharded model needs all ranks in every forward pass: the last round is filled up with a batch that is scored anyway.
    rounds = -(-len(batches) // world_size())
    by_row = np.sort(rows)
    scores = torch.zeros(len(rows), dtype=torch.float64, device=device)
    bar = trange(rounds, desc=progress, disable=progress is None or rank() > 0, unit="batch", leave=False)
    with computing(precision, device):
        for first in bar:
            mine = first * world_size() + rank()
            batch = builder.batch(prompts[batches[min(mine, len(batches) - 1)]])
            moved = batch.to(device)
            logits = token_logits(
                *(scoring, moved.input_ids, moved.layout, config, builder.format.labels),
                few_shapes=wants_few_shapes(precision, device),
            )
            if mine < len(batches):
                places = torch.from_numpy(np.searchsorted(by_row, batch.targets.numpy())).to(device)
                scores[places] = torch.softmax(logits.double(), -1)[:, 1]
    model.train(was_training)
    if world_size() > 1:
        dist.all_reduce(scores)  # every target was scored by one rank, and adding zeros is exact
    result: npt.NDArray[np.float64] = scores.cpu().numpy()[np.searchsorted(by_row, rows)]
    return result


def _prompts(builder: PromptBuilder, rows: IntArray, k: int | None, strict_time: bool) -> Prompts:
    window = builder.format.window
    if strict_time:
        assert k == 1
        return Prompts.strict(builder.data, rows, window)
    if k == 1:
        return Prompts.sliding_windows(builder.data, rows, window)
    return Prompts.streaming(builder.data, rows, window, k)
