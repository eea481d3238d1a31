"""What a training run is: every setting with its default, as typed dataclasses that the command line and YAML files fill in."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from dti_model.attention import DTIConfig

CONFIG_FILE = "config.yaml"


PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adaptation of a pretrained model; the row of [SUM] in the embedding is trained as well.

    Attributes:
        rank: of the update of each projection.
        alpha: the update is scaled by alpha / rank.
        dropout: on the input of the updates, in [0, 1).
        projections: which projections are adapted; the paper adapts all seven.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.05
    projections: tuple[str, ...] = PROJECTIONS

    def __post_init__(self) -> None:
        if self.rank < 1 or not self.alpha > 0 or not 0 <= self.dropout < 1:
            raise ValueError(
                f"lora.rank must be >= 1, lora.alpha > 0 and lora.dropout in [0, 1), got {self.rank}, {self.alpha} "
                f"and {self.dropout}"
            )
        unknown = set(self.projections) - set(PROJECTIONS)
        if unknown or not self.projections:
            raise ValueError(
                f"lora.projections must be some of {', '.join(PROJECTIONS)}, got {list(self.projections)}"
            )


@dataclass(frozen=True)
class ModelConfig:
    """The network: a Llama trained from scratch, or a pretrained model that is fine-tuned.

    Attributes:
        layers: decoder layers, from scratch.
        width: hidden size.
        heads: query heads.
        kv_heads: key/value heads, a divisor of heads.
        mlp_width: inner width of the MLP.
        dropout: on the token embeddings and on what every attention and MLP adds, in [0, 1); default .1 from scratch,
            0 for a pretrained model.
        pretrained: a folder, an id on the Hugging Face hub or a GGUF file of a Llama, Mistral, Qwen2 or Qwen3 model to
            start from; the sizes above are then its own.
        finetune: what is trained of a pretrained model: low-rank updates and the [SUM] row (lora), or everything (full).
        lora: the low-rank updates.
        dtype: of a pretrained model's weights. Full fine-tuning in bfloat16 rounds its own updates; rather keep
            float32 and compute in bfloat16 with optim.bf16. What LoRA trains is float32 either way, but the [SUM] row.
        quantize: keep a pretrained model's projections in 8 or 4 bits (bitsandbytes), with lora only; 0: no.
        liger: use Liger's kernels for the norms and MLPs of a pretrained model (liger-kernel, on a GPU).
        instruction: text before the first interaction of every prompt of a pretrained model.
    """

    layers: int = 4
    width: int = 128
    heads: int = 4
    kv_heads: int = 2
    mlp_width: int = 344
    dropout: float | None = None
    pretrained: str | None = None
    finetune: Literal["lora", "full"] = "lora"
    lora: LoraSettings = field(default_factory=LoraSettings)
    dtype: Literal["float32", "bfloat16"] = "float32"
    quantize: Literal[0, 4, 8] = 0
    liger: bool = False
    instruction: str = ""

    def __post_init__(self) -> None:
        self._check_sides()
        if min(self.layers, self.width, self.heads, self.kv_heads, self.mlp_width) < 1:
            raise ValueError("layers, width, heads, kv_heads and mlp_width must be >= 1")
        if not 0 <= self.dropout_rate < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.heads % self.kv_heads or self.width % self.heads or (self.width // self.heads) % 2:
            raise ValueError(
                f"width must be an even multiple of heads and heads a multiple of kv_heads, got width {self.width}, "
                f"heads {self.heads}, kv_heads {self.kv_heads}"
            )

    def _check_sides(self) -> None:
        """Settings of the one kind of model are errors with the other: none is ignored."""
        changed = {
            f.name for f in fields(self) if getattr(self, f.name) != getattr(ModelConfig, f.name, None)
        }
        if self.lora == LoraSettings():
            changed.discard("lora")
        sizes = changed & {"layers", "width", "heads", "kv_heads", "mlp_width"}
        if self.pretrained is not None and sizes:
            raise ValueError(
                f"model.{min(sizes)} is a size of a model from scratch, but model.pretrained is {self.pretrained!r}, which "
                "has its own sizes: leave one of them out"
            )
        only_pretrained = changed & {"finetune", "lora", "dtype", "quantize", "liger", "instruction"}
        if self.pretrained is None and only_pretrained:
            raise ValueError(
                f"model.{min(only_pretrained)} is a setting of a pretrained model: give model.pretrained too"
            )
        if self.finetune not in ("lora", "full") or self.dtype not in ("float32", "bfloat16"):
            raise ValueError(
                f"model.finetune must be lora or full and model.dtype float32 or bfloat16, got {self.finetune!r} and {self.dtype!r}"
            )
        if self.quantize not in (0, 4, 8):
            raise ValueError(f"model.quantize must be 0, 4 or 8 bits, got {self.quantize}")
        if self.finetune == "full" and changed & {"lora", "quantize"}:
            raise ValueError(
                "model.lora and model.quantize need model.finetune lora: full trains every weight itself"
            )

    @property
    def dropout_rate(self) -> float:
        """`dropout`, or its default."""
        if self.dropout is not None:
            return self.dropout
        return 0.1 if self.pretrained is None else 0.0

    @property
    def uses_lora(self) -> bool:
        """A pretrained model of which low-rank updates are trained."""
        return self.pretrained is not None and self.finetune == "lora"


@dataclass(frozen=True)
class OptimConfig:
    """Optimisation: AdamW, linear warm-up, cosine decay.

    Attributes:
        epochs: passes over the training targets.
        max_steps: stop after this many optimizer steps, whatever the epochs; 0: epochs decide.
        validate_every: optimizer steps between validations, each with a checkpoint; 0: an epoch.
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
    max_steps: int = 0
    validate_every: int = 0
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
        if self.max_steps < 0 or self.validate_every < 0:
            raise ValueError("max_steps >= 0 and validate_every >= 0 must hold")


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
        max_eval_targets: score at most this many validation and test targets, chosen at random by the seed; 0: all.
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
    max_eval_targets: int = 0
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
            ("max_eval_targets", 0),
            ("logging_steps", 1),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be >= {least}, got {getattr(self, name)}")
        if not set(self.report_to) <= {"tensorboard", "wandb"}:
            raise ValueError(f"report_to may name tensorboard and wandb, got {list(self.report_to)}")
        if self.compare_steps and self.optim.fsdp:
            raise ValueError("compare_steps measures one whole model: set it to 0 with optim.fsdp")
        if self.dti.train_slopes and self.model.uses_lora:
            raise ValueError(
                "dti.train_slopes needs model.finetune full: adapters hold no slopes. Choose fixed ones with dti.slope_scale"
            )

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
        model = raw.pop("model")
        if "lora" in model:
            lora = model["lora"]
            model["lora"] = LoraSettings(**{**lora, "projections": tuple(lora["projections"])})
        nested = {"dti": DTIConfig(**raw.pop("dti")), "model": ModelConfig(**model)}
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
