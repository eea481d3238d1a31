"""What a launcher says in the environment, and what of it a training run follows: its processes, not its settings.

`accelerate launch` exports the answers of its own configuration, and Trainer would follow them: a run whose config.yaml says
float32 was trained in bfloat16. The settings of the run rule.
"""

from __future__ import annotations

import os

# Another way to train, which these runs do not know.
_REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "parallelism within the model",
}
# Answers to what `optim` says: FSDP2 or not, compilation, accumulation, precision.
_ANSWERS = ("FSDP_", "ACCELERATE_DYNAMO_", "ACCELERATE_FP8_")
_ANSWER = ("ACCELERATE_USE_FSDP", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "ACCELERATE_DOWNCAST_BF16")


def let_settings_rule(bf16: bool) -> None:
    """Take out of this process's environment what contradicts the settings; call it before TrainingArguments are made.

    Args:
        bf16: of the settings.

    Raises:
        ValueError: the environment asks for DeepSpeed, Megatron-LM or the like.
    """
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
