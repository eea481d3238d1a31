"""What a training run is: every setting with its default, as typed dataclasses that the command line and YAML files fill in."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from dti_model.attention import DTIConfig

CONFIG_FILE = "config.yaml"


@dataclass(frozen=True)
class ModelConfig:
    """The Llama that is trained from scratch.

    Attributes:
        layers: decoder layers.
        width: hidden size.
        heads: query heads.
        kv_heads: key/value heads, a divisor of heads.
        mlp_width: inner width of the MLP.
        dropout: on the token embeddings and on what every attention and MLP adds, in [0, 1).
    """

    layers: int = 4
    width: int = 128
    heads: int = 4
    kv_heads: int = 2
    mlp_width: int = 344
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if min(self.layers, self.width, self.heads, self.kv_heads, self.mlp_width) < 1:
            raise ValueError("layers, width, heads, kv_heads and mlp_width must be >= 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.heads % self.kv_heads or self.width % self.heads or (self.width // self.heads) % 2:
            raise ValueError(
                f"width must be an even multiple of heads and heads a multiple of kv_heads, got width {self.width}, "
                f"heads {self.heads}, kv_heads {self.kv_heads}"
            )


@dataclass(frozen=True)
class OptimConfig:
    """Optimisation: AdamW, linear warm-up, cosine decay.

    Attributes:
        epochs: passes over the training targets.
        learning_rate: peak.
        weight_decay: on matrices; norms, biases and slopes have none.
        warmup: share of the steps that the learning rate rises over.
        clip: largest gradient norm.
        token_budget: rows of one packed batch, context tokens and [SUM]s.
        accumulation: packed batches per optimizer step.
        patience: stop after this many validations without a better AUC; 0: never.
        bf16: compute in bfloat16 under autocast.
        activation_checkpointing: recompute activations in the backward to save memory.
        fsdp: on several devices, shard weights, gradients and moments over them (FSDP2); otherwise every device has all (DDP).
        save_steps: also write a checkpoint every this many optimizer steps; 0: only after every epoch.
    """

    epochs: int = 8
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    warmup: float = 0.05
    clip: float = 1.0
    token_budget: int = 8192
    accumulation: int = 1
    patience: int = 2
    bf16: bool = False
    activation_checkpointing: bool = False
    fsdp: bool = False
    save_steps: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "token_budget", "accumulation"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        for name in ("learning_rate", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)}")
        if not 0 <= self.warmup < 1 or min(self.weight_decay, self.patience, self.save_steps) < 0:
            raise ValueError(
                "0 <= warmup < 1, weight_decay >= 0, patience >= 0 and save_steps >= 0 must hold"
            )


@dataclass(frozen=True)
class TrainConfig:
    """One training run.

    Attributes:
        data: folder made by `dti prepare`.
        out: run folder, made by this run.
        k: targets per streaming prompt; 1 is the sliding-window baseline, 0 whole histories.
        window: n, interactions of context that a target may use.
        max_item_tokens: item texts are cut to this many tokens.
        validation_k: targets per prompt when validating between epochs; 1 as in the final scores, more is faster.
        seed: of initial weights, shuffles and everything else that is random.
        compare_steps: after training, measure the speed of this many steps of streaming and of sliding-window prompts; 0: do not.
        score_test: score the test split at the end, once; false while settings are still being chosen.
        logging_steps: print a line with loss and speed every this many optimizer steps.
        report_to: where curves go: tensorboard (the run folder's `tensorboard/`), wandb, both or neither.
        progress: show progress bars.
        dti: which fixes [SUM] rows get.
        model: the network.
        optim: the optimisation.
    """

    data: Path
    out: Path
    k: int = 50
    window: int = 20
    max_item_tokens: int = 128
    validation_k: int = 1
    seed: int = 0
    compare_steps: int = 0
    score_test: bool = True
    logging_steps: int = 10
    report_to: tuple[str, ...] = ("tensorboard",)
    progress: bool = True
    dti: DTIConfig = field(default_factory=DTIConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)

    def __post_init__(self) -> None:
        for name, least in (
            ("k", 0),
            ("validation_k", 0),
            ("window", 0),
            ("max_item_tokens", 1),
            ("compare_steps", 0),
            ("logging_steps", 1),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be >= {least}, got {getattr(self, name)}")
        if not set(self.report_to) <= {"tensorboard", "wandb"}:
            raise ValueError(f"report_to may name tensorboard and wandb, got {list(self.report_to)}")
        if self.compare_steps and self.optim.fsdp:
            raise ValueError("compare_steps measures one whole model: set it to 0 with optim.fsdp")

    @property
    def targets_per_prompt(self) -> int | None:
        """`k`, with None for whole histories."""
        return self.k or None

    def same_run(self, other: TrainConfig) -> bool:
        """Whether a run with these settings can go on with the other ones: the folder may have been moved, and bars change nothing."""
        return replace(self, out=other.out, progress=other.progress) == other

    def save(self, folder: Path) -> None:
        """Write `config.yaml` into a folder, which is made where it is missing."""
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".{CONFIG_FILE}.incomplete"
        temporary.write_text(yaml.safe_dump(_plain(asdict(self)), sort_keys=False))
        temporary.replace(folder / CONFIG_FILE)

    @staticmethod
    def load(folder: Path) -> TrainConfig:
        """Read the `config.yaml` of a run folder.

        Raises:
            FileNotFoundError: no such file; `folder` is no run folder.
        """
        path = folder / CONFIG_FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist: {folder} is not a run folder made by `dti train`"
            )
        raw = yaml.safe_load(path.read_text())
        raw["dti"]["reset_layers"] = tuple(raw["dti"]["reset_layers"])
        nested = {"dti": DTIConfig(**raw.pop("dti")), "model": ModelConfig(**raw.pop("model"))}
        raw["report_to"] = tuple(raw["report_to"])
        nested["optim"] = OptimConfig(**raw.pop("optim"))
        return TrainConfig(**{**raw, "data": Path(raw["data"]), "out": Path(raw["out"]), **nested})


def _plain(value: Any) -> Any:
    """Only what YAML knows."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
