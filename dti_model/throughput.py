"""Targets per second of training steps: streaming prompts beside sliding-window prompts, in one process.

Both sides get everything we have: packed batches, [SUM]-only head, the same attention, the same optimizer. Steps are interleaved,
so that a slow moment of the machine hits both.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass

import numpy as np
import torch

from dti_model.prompts import PackedPrompts, Prompts
from dti_model.run import Run
from dti_model.trainer import model_inputs


@dataclass(frozen=True)
class Throughput:
    """Median over steps of one kind of prompt."""

    targets_per_s: float
    tokens_per_s: float
    tokens_per_target: float


def compare_sliding_window(run: Run, num_steps: int) -> dict[str, Throughput]:
    """Time `num_steps` training steps (forward, backward, AdamW) of each kind on a copy of the model, after one warm-up.

    Returns:
        `{"streaming": ..., "sliding_window": ...}`. The run's model is not changed.
    """
    config = run.config
    model = copy.deepcopy(run.model).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    rows = run.data.targets("train")
    kinds = {"streaming": config.targets_per_prompt, "sliding_window": 1}
    batches = {
        name: PackedPrompts(
            run.builder,
            Prompts.streaming(run.data, rows, config.window, k),
            config.optim.token_budget,
            config.seed,
        )
        for name, k in kinds.items()
    }
    answers = torch.tensor(run.builder.format.labels)
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    targets: dict[str, list[int]] = {name: [] for name in kinds}
    tokens: dict[str, list[int]] = {name: [] for name in kinds}
    for step in range(num_steps + 1):
        for name, dataset in batches.items():
            inputs = model_inputs(dataset[step % len(dataset)].to(model.device), config.dti, answers)
            labels = inputs.pop("labels")
            start = time.perf_counter()
            loss = torch.nn.functional.cross_entropy(
                model(**inputs).logits[0].float(), labels.to(model.device)
            )
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            float(loss.detach())  # waits for the device
            if step:
                seconds[name].append(time.perf_counter() - start)
                targets[name].append(labels.numel())
                tokens[name].append(inputs["input_ids"].numel())
    return {
        name: Throughput(
            targets_per_s=float(np.median(np.divide(targets[name], seconds[name]))),
            tokens_per_s=float(np.median(np.divide(tokens[name], seconds[name]))),
            tokens_per_target=float(np.sum(tokens[name]) / np.sum(targets[name])),
        )
        for name in kinds
    }
