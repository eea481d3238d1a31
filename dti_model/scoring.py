"""Scoring: the probability of a click at every target, from packed prompts.

    p = softmax(logit_yes, logit_no)[yes]                                                        (semantics.md, section 6)

One sliding-window prompt (k = 1) per target unless asked otherwise, as the paper does; targets whose windows all reach the
user's first interaction share a prompt, which gives them the same scores.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from dti_model.attention import DTIConfig, token_logits
from dti_model.prompts import IntArray, PromptBuilder, Prompts, consecutive_batches


@torch.no_grad()
def score_targets(
    model: PreTrainedModel,
    config: DTIConfig,
    builder: PromptBuilder,
    rows: IntArray,
    token_budget: int = 16384,
    k: int | None = 1,
    progress: str | None = None,
) -> npt.NDArray[np.float64]:
    """Click probabilities of targets.

    Args:
        model: the result of `apply_dti`; its training mode is kept.
        config: the one the model was made with.
        builder: histories and tokens.
        rows: `(S,)` interaction rows to score, in any order.
        token_budget: rows of a packed batch; a longer prompt gets a batch of its own.
        k: targets per prompt: 1 for (the scores of) sliding windows, None for whole histories.
        progress: label of a progress bar; None: no bar.

    Returns:
        `(S,)` probabilities in the order of `rows`.
    """
    window = builder.format.window
    if k == 1:
        prompts = Prompts.sliding_windows(builder.data, rows, window)
    else:
        prompts = Prompts.streaming(builder.data, rows, window, k)
    batches = list(consecutive_batches(builder.num_rows(prompts), token_budget))
    device, was_training = model.device, model.training
    model.eval()
    scores, targets = [], []
    for index in tqdm(batches, desc=progress, disable=progress is None, unit="batch", leave=False):
        batch = builder.batch(prompts[index]).to(device)
        logits = token_logits(model, batch.input_ids, batch.layout, config, builder.format.labels)
        scores.append(torch.softmax(logits.double(), -1)[:, 1].cpu().numpy())
        targets.append(batch.targets.cpu().numpy())
    model.train(was_training)
    by_row = np.concatenate(targets)  # ascending: prompts follow the rows
    result: npt.NDArray[np.float64] = np.concatenate(scores)[np.searchsorted(by_row, rows)]
    return result
