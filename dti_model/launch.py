"""What a launcher says in the environment, and what of it a run follows: its processes, not its settings.

`accelerate launch` exports the answers of its own configuration, and Trainer would follow them: a run whose config.yaml says
float32 was trained in bfloat16. The settings of the run rule.
"""

from __future__ import annotations

import os
import re

# Another way to train, which these runs do not know.
_REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "parallelism within the model",
}
# Answers to what `optim` says: FSDP2 or not, compilation, accumulation, precision.
_ANSWERS = ("FSDP_", "ACCELERATE_DYNAMO_", "ACCELERATE_FP8_")
_ANSWER = ("ACCELERATE_USE_FSDP", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "ACCELERATE_DOWNCAST_BF16")
# What torchrun and accelerate set for each process, and the least that it can be.
_NUMBERS = {"WORLD_SIZE": 1, "RANK": -1, "LOCAL_RANK": -1, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": 0}
_OF_SEVERAL = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def num_processes() -> int:
    """How many processes a launcher says that it started; 1 where there is none.

    Raises:
        ValueError: what it says is no number, or something is missing.
    """
    for name, least in _NUMBERS.items():
        value = os.environ.get(name)
        if value is not None and (not re.fullmatch(r"-?[0-9]{1,9}", value) or int(value) < least):
            raise ValueError(
                f"{name}={value!r} in the environment must be an integer of at least {least}, as torchrun sets it: start with torchrun, "
                f"or unset {name}"
            )
    number = int(os.environ.get("WORLD_SIZE", "1"))
    missing = [name for name in _OF_SEVERAL if not os.environ.get(name)]
    if number > 1 and missing:
        raise ValueError(
            f"WORLD_SIZE={number} in the environment says that a launcher started {number} processes, but {', '.join(missing)} is "
            "missing: start with torchrun, or unset WORLD_SIZE"
        )
    if number > 1 and not 0 <= int(os.environ["RANK"]) < number:
        raise ValueError(
            f"RANK={os.environ['RANK']} in the environment must be at least 0 and below WORLD_SIZE={number}: start with torchrun"
        )
    return number


def let_settings_rule(bf16: bool) -> None:
    """Take out of this process's environment what contradicts the settings; call it before TrainingArguments are made.

    Args:
        bf16: of the settings.

    Raises:
        ValueError: the environment asks for DeepSpeed, Megatron-LM or the like, or does not say well which processes there are.
    """
    num_processes()
    for name, what in _REFUSED.items():
        if os.environ.get(name, "").lower() in ("1", "true", "yes", "on", "y", "t"):
            raise ValueError(
                f"the environment asks for {what} ({name}), which `dti train` does not use: unset it, choose another "
                "configuration of accelerate, or start with torchrun"
            )
    for name in list(os.environ):
        if name.startswith(_ANSWERS) or name in _ANSWER:
            del os.environ[name]
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if bf16 else "no"
