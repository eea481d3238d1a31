"""The plans at the paper's own size, as commands: ML-1M, CDs and Kindles with Llama-3.1-8B and LoRA, on GPUs.

The paper's settings where it states them (n = 20, LoRA on all seven projections, AdamW, cosine, at most 10 epochs, patience 2);
one optimizer step holds the same number of targets at every k.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict

from benchmarks.quality.plans import PLANS, SIZES
from benchmarks.quality.runs import Cell
from dti_model.config import DTIConfig

PREPARE = {
    "ml-1m": "dti prepare ml-1m --out data/ml-1m --min-context 20",
    "cds": "dti prepare amazon-cds --raw-dir raw/amazon --out data/cds --min-context 20",
    "kindles": "dti prepare amazon-kindles --raw-dir raw/amazon --out data/kindles --min-context 20",
}
GPUS, TOKENS_PER_INTERACTION = 8, 36


def commands(plans: list[str]) -> list[str]:
    """Shell lines: prepare each data set once, then one training run per setting and seed, each run once.

    Plans that decide on validation run on ML-1M alone.
    """
    lines = [*PREPARE.values()]
    for name in plans:
        plan = PLANS[name](SIZES["full"])
        lines.append(f"# {name}: {plan.question}")
        for data in PREPARE if plan.test else ("ml-1m",):
            # `dti train` mixes users in a batch.
            lines += [_train(data, cell) for arm in plan.arms for cell in arm.cells if cell.mixed]
    return list(dict.fromkeys(lines))


def _train(data: str, cell: Cell) -> str:
    k = cell.k
    # Rows of a target at this k; a whole history is cut off from nothing, so its prompts decide the budget themselves.
    per_target = TOKENS_PER_INTERACTION * (21 if k == 1 else (20 + k) / k if k else 1.2)
    per_gpu = cell.targets_per_step * per_target / GPUS
    accumulation = max(1, round(per_gpu / 16384)) if k else 1
    budget = round(per_gpu / accumulation) if k else 65536
    budget = max(budget, TOKENS_PER_INTERACTION * (20 + k) * 3 // 2)  # the longest prompt has to fit
    flags = {"k": k, "seed": cell.seed, "validation_k": 1, "dti.mode": cell.dti.mode}
    usual = asdict(DTIConfig(cell.dti.mode))
    flags |= {f"dti.{key}": value for key, value in asdict(cell.dti).items() if value != usual[key]}
    flags |= {"model.pretrained": cell.model.pretrained, "model.instruction": cell.model.instruction}
    flags |= {"model.lora.rank": cell.model.lora.rank, "optim.epochs": cell.epochs, "optim.patience": 2}
    flags |= {
        "optim.learning_rate": cell.learning_rate,
        "optim.precision": "fp32" if cell.precision == "fp32" else "bf16",
    }
    flags |= {"optim.activation_checkpointing": True, "optim.token_budget": budget}
    flags["optim.accumulation"] = accumulation
    shown = " ".join(f"--{name.replace('_', '-')} {_shown(value)}" for name, value in flags.items())
    out = f"runs/{data}-{cell.dti.mode}-k{k or 'all'}-{cell.name}"
    return f"torchrun --nproc-per-node {GPUS} -m dti_model.cli train --data data/{data} --out {out} {shown}"


def _shown(value: object) -> str:
    return shlex.quote(value if isinstance(value, str) else json.dumps(value, separators=(",", ":")))
