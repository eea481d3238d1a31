"""The paper's own runs as commands: ML-1M, CDs and Kindles with Llama-3.1-8B and LoRA, on GPUs.

The paper's settings where it states them (n = 20, LoRA on all seven projections, AdamW, cosine, at most 10 epochs, patience 2);
one optimizer step holds the same number of targets at every k.
"""

from __future__ import annotations

MODEL = "meta-llama/Llama-3.1-8B-Instruct"
INSTRUCTION = (
    "Given the interaction history of a user, predict whether the user will like the next item: yes or no."
)
DATA = {
    "ml-1m": "dti prepare ml-1m --out data/ml-1m --min-context 20",
    "cds": "dti prepare amazon-cds --raw-dir raw/amazon --out data/cds --min-context 20",
    "kindles": "dti prepare amazon-kindles --raw-dir raw/amazon --out data/kindles --min-context 20",
}
GPUS, TARGETS_PER_STEP, TOKENS_PER_INTERACTION = 8, 512, 36
KS = {
    "table1": (5, 10, 20, 30, 40, 50),
    "table3": (10, 30, 50),
    "figure2": (5, 10, 20, 30, 40, 50),
    "figure3": (50,),
}
KS |= {"sweep": (50,), "depth": (50,), "whole": (50, 200, 0), "users": (50,), "long": (50, 100, 200)}
MODES = {"table1": ("dti-minus", "dti"), "figure2": ("dti-minus", "dti"), "table3": ("dti",)}
MODES |= {"figure3": ("dti-minus", "dti-position", "dti-reset", "dti")}
MODES |= dict.fromkeys(("sweep", "depth", "whole", "users", "long"), ("dti",))
EVERY_LAYER = f"--dti.reset_layers '{list(range(32))}'".replace(", ", ",")
# Of plans on ML-1M alone, which decide on validation: settings by the name of their run.
VARIANTS = {
    "sweep": {f"-alpha_max-{alpha}": f" --dti.alpha_max {alpha}" for alpha in (0.0, 0.25, 0.5, 1.0)},
    "depth": {
        "-alpha_max-0.0": " --dti.alpha_max 0.0",
        "": "",
        "-every-layer": f" {EVERY_LAYER}",
        "-full-reset": f" --dti.alpha_min 1 --dti.alpha_max 1 --dti.alpha_own 1 {EVERY_LAYER}",
    },
    "whole": {"": ""},
    "users": {"": ""},
    "long": {"": ""},
}


def commands(plans: list[str]) -> list[str]:
    """Shell lines: prepare each data set once, then one training run per setting and seed, each run once."""
    lines = [*DATA.values()]
    for plan in plans:
        lines.append(f"# {plan}")
        for data in ("ml-1m",) if plan in VARIANTS else DATA:
            runs = [("dti-minus", 1, ("", ""))]
            variants = VARIANTS.get(plan, {"": ""}).items()
            runs += [(mode, k, variant) for k in KS[plan] for mode in MODES[plan] for variant in variants]
            lines += [_train(data, *run) for run in runs]
    return list(dict.fromkeys(lines))


def _train(data: str, mode: str, k: int, variant: tuple[str, str]) -> str:
    # Rows of a target at this k; a whole history is cut off from nothing, so its prompts decide the budget themselves.
    per_target = TOKENS_PER_INTERACTION * (21 if k == 1 else (20 + k) / k if k else 1.2)
    per_gpu = TARGETS_PER_STEP * per_target / GPUS
    accumulation = max(1, round(per_gpu / 16384)) if k else 1
    budget = round(per_gpu / accumulation) if k else 65536
    budget = max(budget, TOKENS_PER_INTERACTION * (20 + k) * 3 // 2)  # the longest prompt has to fit
    suffix, more = variant
    name = f"{data}-{mode}-k{k or 'all'}{suffix}"
    return (
        f"torchrun --nproc-per-node {GPUS} -m dti_model.cli train --data data/{data} --out runs/{name} --k {k} "
        f"--dti.mode {mode}{more} --validation_k 1 --model.pretrained {MODEL} --model.instruction '{INSTRUCTION}' "
        f"--model.lora.rank 16 --optim.epochs 10 --optim.patience 2 --optim.learning_rate 1e-4 --optim.bf16 true "
        f"--optim.activation_checkpointing true --optim.token_budget {budget} --optim.accumulation {accumulation}"
    )
