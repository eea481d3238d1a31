"""The environment that a launcher sets: a run follows it in its processes, not in its settings.

`accelerate launch` exports its own configuration, and Trainer would follow it: a run whose config.yaml says float32 was trained in
bfloat16. The settings of the run rule.
"""

from __future__ import annotations

import os

from dti_model.precision import Resolved

# Another way to train, which these runs do not know.
_REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "parallelism within the model",
}
# Answers to what `optim` says: FSDP2 or not, compilation, accumulation, precision.
_ANSWERS = ("FSDP_", "ACCELERATE_DYNAMO_", "ACCELERATE_FP8_")
_ANSWER = ("ACCELERATE_USE_FSDP", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "ACCELERATE_DOWNCAST_BF16")
# Integers that torchrun and accelerate export, and the least that each may be; -1 is their word for "not set".
_COUNTS = {"WORLD_SIZE": 1, "RANK": 0, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": 0}
# Each of several processes needs them to find the others.
_NEEDED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def num_processes() -> int:
    """How many processes a launcher started, this one too.

    Raises:
        ValueError: the environment names a number that is none, or not all that a process needs to find the others.
    """
    counts = {name: _count(name, least) for name, least in _COUNTS.items()}
    processes = counts["WORLD_SIZE"] or 1
    if processes == 1:
        return 1
    missing = [name for name in _NEEDED if os.environ.get(name, "-1") in ("", "-1")]
    if missing:
        raise ValueError(
            f"the environment says WORLD_SIZE={processes} and no {', '.join(missing)}: start with torchrun, or unset WORLD_SIZE"
        )
    if (counts["RANK"] or 0) >= processes:
        raise ValueError(
            f"RANK={counts['RANK']} in the environment must be below WORLD_SIZE={processes}: start with torchrun, or unset both"
        )
    return processes


def check_alone(command: str) -> None:
    """Refuse several processes where one does the work.

    Args:
        command: as a user writes it.

    Raises:
        ValueError: a launcher started several.
    """
    processes = num_processes()
    if processes > 1:
        raise ValueError(
            f"{command} runs in one process, and WORLD_SIZE={processes} in the environment says that there are more: start it without "
            "torchrun, or unset WORLD_SIZE"
        )


def _count(name: str, least: int) -> int | None:
    text = os.environ.get(name)
    if text is None or text == "-1":
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) >= least):
        raise ValueError(
            f"{name} in the environment must be an integer >= {least}, got {text[:60]!r}: start with torchrun, or unset it"
        )
    return int(text)


def let_settings_rule(precision: Resolved | None = None) -> None:
    """Take out of this process's environment what contradicts the settings; call it before processes are joined or TrainingArguments
    are made.

    Args:
        precision: that the settings mean; None: not known yet.

    Raises:
        ValueError: the environment asks for DeepSpeed, Megatron-LM or the like, or as `num_processes`.
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
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if precision == "bf16" else "no"
