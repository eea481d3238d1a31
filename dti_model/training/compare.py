"""Targets per second of training steps at several numbers of targets per prompt and in several precisions, in one process.

Every k gets everything we have: packed batches, [SUM]-only head, the same attention, the same optimizer. Steps are interleaved,
so that a slow moment of the machine hits all of them, to and fro, since a step also depends on the memory that the one before it left.
k = 1 is the sliding-window baseline. Weights, gradients and moments are float32 in every precision, and the optimizer is the one that a
training run has: Trainer's default, which is fused AdamW in its present versions.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from dti_model.model import EAGER, Parts, Run, compiled_parts, token_logits
from dti_model.precision import Resolved, computing, wants_few_shapes
from dti_model.prompts import PackedPrompts, Prompts
from dti_model.training.setup import training_arguments
from dti_model.training.trainer import StreamTrainer


class Kind(NamedTuple):
    """Training steps that are measured.

    Attributes:
        k: targets per prompt, None for whole histories.
        precision: to compute in.
        compiled: whether the layers' parts are (`optim.compile`).
    """

    k: int | None
    precision: Resolved
    compiled: bool = False


@dataclass(frozen=True)
class Throughput:
    """Training steps of one kind.

    Attributes:
        targets_per_s: `rows_per_s / rows_per_target`. The targets of a few batches vary by several percent more than an epoch's.
        rows_per_s: context tokens and [SUM]s, median over steps.
        rows_per_target: of all prompts of an epoch.
        peak_mib: most memory that PyTorch held on a CUDA device; None on a CPU.
    """

    targets_per_s: float
    rows_per_s: float
    rows_per_target: float
    peak_mib: float | None


def measure_training(run: Run, kinds: Sequence[Kind], num_steps: int) -> dict[Kind, Throughput]:
    """Time `num_steps` training steps (forward, backward, optimizer) of every kind on a copy of the model, after one warm-up each.

    Args:
        run: model, data and format; its model is not changed.
        kinds: of steps.
        num_steps: timed steps of every kind, >= 1.

    Returns:
        From the kind to what was measured.

    Raises:
        ValueError: a kind is compiled, and PyTorch cannot compile on this machine.
    """
    model = copy.deepcopy(run.model).train()
    optimizer = small_steps(run, model)
    datasets = {k: packed_epoch(run, k) for k in dict.fromkeys(kind.k for kind in kinds)}
    speeds: dict[Kind, list[float]] = {kind: [] for kind in kinds}
    peak: dict[Kind, float] = {}
    for step in range(num_steps + 1):
        for kind in list(speeds)[:: -1 if step % 2 else 1]:
            parts = compiled_parts(model.device) if kind.compiled else EAGER
            of_kind = datasets[kind.k], step, kind.precision, parts
            rows, _, seconds, peak[kind] = timed_step(run, model, optimizer, *of_kind)
            if step:
                speeds[kind].append(rows / seconds)
    cuda = model.device.type == "cuda"
    results = {}
    for kind, measured in speeds.items():
        dataset, rows_per_s = datasets[kind.k], float(np.median(measured))
        rows_per_target = float(dataset.num_rows.sum() / dataset.prompts.num_targets.sum())
        peak_mib = round(peak[kind], 1) if cuda else None
        results[kind] = Throughput(rows_per_s / rows_per_target, rows_per_s, rows_per_target, peak_mib)
    return results


def small_steps(run: Run, model: torch.nn.Module) -> torch.optim.Optimizer:
    """The optimizer that training has, with steps so small that a measured model stays as it is."""
    kind, settings = StreamTrainer.get_optimizer_cls_and_kwargs(training_arguments(run.config, run.precision))
    optimizer: torch.optim.Optimizer = kind(model.parameters(), **{**settings, "lr": 1e-5})
    return optimizer


def packed_epoch(run: Run, k: int | None) -> PackedPrompts:
    """All training prompts at this k; a budget below the longest prompt is raised to it."""
    prompts = Prompts.streaming(run.data, run.train_targets, run.config.window, k)
    budget = max(run.config.optim.token_budget, int(run.builder.num_rows(prompts).max()))
    return PackedPrompts(run.builder, prompts, budget, run.config.seed)


def timed_step(
    run: Run,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    dataset: PackedPrompts,
    step: int,
    precision: Resolved,
    parts: Parts = EAGER,
) -> tuple[int, int, float, float]:
    """One timed step: rows, targets, seconds and peak MiB."""
    device = run.model.device
    batch = dataset[step % len(dataset)].to(device)
    labels = torch.tensor(run.builder.format.labels, device=device)[batch.labels]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    start = time.perf_counter()
    with computing(precision, device):
        few_shapes = wants_few_shapes(precision, device)
        inputs = batch.input_ids, batch.layout, run.config.dti
        logits = token_logits(model, *inputs, few_shapes=few_shapes, parts=parts)
        loss = torch.nn.functional.cross_entropy(logits.float(), labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    float(loss.detach())  # waits for the device
    seconds = time.perf_counter() - start
    peak_mib = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else 0.0
    return batch.layout.num_rows, batch.layout.num_sum, seconds, peak_mib
