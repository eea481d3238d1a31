"""Settings of a training run with their defaults: typed dataclasses that the command line and YAML files fill in.

`bounds.py` holds the type and the bounds of each, `file.py` writes and reads them in a run folder.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

from dti_model.config.bounds import GLUED, PROJECTIONS, Metric, as_yaml, check_settings
from dti_model.config.file import CONFIG_FILE, read_config, write_config
from dti_model.config.references import located
from dti_model.precision import DEFAULT, Precision

# All families of pretrained models have read running text: an arrow asks for the answer, and a line feed ends it, one token each.
LLM_TEMPLATE = "{item} ->{label}\n"


@dataclass(frozen=True)
class DTIConfig:
    """Fixes of [SUM] rows: positions, and reset toward initial states.

    Attributes:
        mode: `dti` (both fixes), `dti-minus` (none, the paper's ablation), `dti-position` (no position id, ALiBi) or
            `dti-reset` (hidden-state reset) alone.
        alpha_min: reset ratio at the recent end of the window, in [0, 1].
        alpha_max: reset ratio at its far end, in [alpha_min, 1].
        steepness: of the ratio's sigmoid, per interaction.
        alpha_own: reset ratio of the target's own item text and the prefix.
        reset_layers: layers that reset, negative ones counted from the end.
        slope_scale: factor on the geometric ALiBi slopes.
        train_slopes: learn the slopes, one per head and layer.
    """

    mode: str = "dti"
    alpha_min: float = 0.0
    alpha_max: float = 0.5
    steepness: float = 1.0
    alpha_own: float = 0.0
    reset_layers: tuple[int, ...] = (-1,)
    slope_scale: float = 1.0
    train_slopes: bool = False

    def __post_init__(self) -> None:
        check_settings(self, "dti.")
        if self.alpha_min > self.alpha_max:
            raise ValueError(
                f"dti.alpha_min must be <= dti.alpha_max, {as_yaml(self.alpha_max)}, got {as_yaml(self.alpha_min)}"
            )

    @property
    def position_fix(self) -> bool:
        """[SUM] rows take no position id but ALiBi."""
        return self.mode in ("dti", "dti-position")

    @property
    def reset(self) -> bool:
        """[SUM] rows read far context blended toward initial states."""
        return self.mode in ("dti", "dti-reset")

    def resets_layer(self, index: int, num_layers: int) -> bool:
        """Whether layer `index` of `num_layers` resets."""
        return self.reset and not {index, index - num_layers}.isdisjoint(self.reset_layers)


def check_reset_layers(config: DTIConfig, num_layers: int) -> None:
    """Refuse layers that a model does not have: counted modulo their number, they used to reset another one.

    Raises:
        ValueError: naming the first.
    """
    wrong = [layer for layer in config.reset_layers if not -num_layers <= layer < num_layers]
    if wrong:
        raise ValueError(
            f"dti.reset_layers must name layers of the model, 0 to {num_layers - 1} or, from the end, -{num_layers} to -1, "
            f"got {wrong[0]}"
        )


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
        check_settings(self, "model.lora.")


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
        pretrained: a folder, a GGUF file, or `hub:owner/name` on the Hugging Face hub, of a Llama, Mistral, Qwen2 or Qwen3
            model to start from; the sizes above are then its own.
        finetune: what is trained of a pretrained model: low-rank updates and the [SUM] row (lora), or everything (full).
        lora: the low-rank updates.
        dtype: of a pretrained model's weights. Full fine-tuning in bfloat16 rounds its own updates; rather keep
            float32 and compute in bfloat16 with optim.precision. LoRA trains float32 either way, except the [SUM] row.
        quantize: keep a pretrained model's projections in 8 or 4 bits (bitsandbytes), with lora only; 0: no.
        liger: use Liger's kernels for the norms and MLPs of a pretrained model (liger-kernel, on a GPU).
        instruction: text before the first interaction of every prompt of a pretrained model.
        template: text around every item and its label, such as '{item}. Liked: {label}\\n'; [SUM] stands where the target's label
            would. Default: '{item} ->{label}\\n' for a pretrained model, '{item}{label}' from scratch, where a label is a word of its own.
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
    template: str | None = None

    def __post_init__(self) -> None:
        check_settings(self, "model.")
        self._check_sides()
        if self.heads % self.kv_heads or self.width % self.heads or (self.width // self.heads) % 2:
            raise ValueError(
                "model.width must be an even multiple of model.heads, and model.heads a multiple of model.kv_heads, "
                f"got {self.width}, {self.heads} and {self.kv_heads}"
            )

    def _check_sides(self) -> None:
        """Settings of the one kind of model are errors with the other: none is ignored."""
        # `lora` is no attribute of the class: its default is made for each object.
        defaults = {f.name: getattr(ModelConfig, f.name, LoraSettings()) for f in fields(self)}
        changed = {name for name, default in defaults.items() if getattr(self, name) != default}
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
    def prompt_template(self) -> str:
        """`template`, or its default."""
        if self.template is not None:
            return self.template
        return GLUED if self.pretrained is None else LLM_TEMPLATE

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
        patience: stop after this many validations without a better AUC, or metric of select_by; 0: never.
        precision: compute in float32 (fp32), in bfloat16 (bf16), or in bfloat16 where the processor or GPU has instructions for it and
            else in float32 (auto). Weights and optimizer stay in the precision that they have.
        activation_checkpointing: recompute activations in the backward to save memory.
        fsdp: on several devices, shard weights, gradients and moments over them (FSDP2); otherwise every device has all (DDP).
        graphs: on one GPU, replay steps of small models as CUDA graphs, which hold memory. Batches are padded by a few percent for it, so
            results differ by rounding. No effect on CPUs, several GPUs and large models, with activation_checkpointing and quantised weights.
        compile: let torch.compile make the parts of a training step around its attention (norms, rotary positions, MLPs). It needs a C++
            compiler, half a minute when a model's sizes are new to a machine and some seconds later; results differ by rounding.
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
    precision: Precision = DEFAULT
    activation_checkpointing: bool = False
    fsdp: bool = False
    graphs: bool = True
    compile: bool = False
    save_steps: int = 0

    def __post_init__(self) -> None:
        check_settings(self, "optim.")


@dataclass(frozen=True)
class TrainConfig:
    """One training run.

    Attributes:
        data: folder made by `dti prepare`.
        out: run folder, made by this run.
        init: run folder whose weights this run goes on from, with a new optimizer; the network's settings are that run's.
        init_targets: what a run with `init` is trained on: the training targets that are `new` since that run's data, which `data` extends
            (`dti prepare custom --extend`), or `all` of `data`, which may then be any. Test targets may be among those trained on before.
        k: targets per streaming prompt; 1 is the sliding-window baseline, 0 whole histories.
        window: n, interactions of context that a target may use.
        max_item_tokens: item texts are cut to this many tokens.
        validation_k: targets per prompt when validating between epochs; 1 as in the final scores, more is faster.
        max_eval_targets: score at most this many validation and test targets, chosen at random by the seed; 0: all.
        seed: of initial weights, shuffles and everything else that is random.
        compare_steps: after training, measure the speed of this many steps of streaming and of sliding-window prompts; 0: do not.
        select_by: validation metric that the best epoch is chosen by, which early stopping waits for and `dti search` ranks by: auc, log_loss
            or gauc. Between epochs it is that of the scores before calibration.
        calibrate: after training, fit a temperature and a bias to the validation scores, which probabilities then go through.
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
    init: Path | None = None
    init_targets: Literal["new", "all"] = "new"
    k: int = 50
    window: int = 20
    max_item_tokens: int = 128
    validation_k: int = 1
    max_eval_targets: int = 0
    seed: int = 0
    compare_steps: int = 0
    select_by: Metric = "auc"
    calibrate: bool = True
    score_test: bool = True
    logging_steps: int = 10
    report_to: tuple[str, ...] = ("tensorboard",)
    progress: bool = True
    dti: DTIConfig = field(default_factory=DTIConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)

    def __post_init__(self) -> None:
        check_settings(self)
        if self.model.pretrained is None:  # the layers of a pretrained model are known when it is loaded
            check_reset_layers(self.dti, self.model.layers)
        if self.init is None and self.init_targets != "new":
            raise ValueError(
                f"init_targets {self.init_targets} is a setting of a run with init: give init too"
            )
        if self.compare_steps and self.optim.fsdp:
            raise ValueError(
                f"compare_steps must be 0 with optim.fsdp, got {self.compare_steps}: it measures one whole model"
            )
        if self.dti.train_slopes and self.model.uses_lora:
            raise ValueError(
                "dti.train_slopes needs model.finetune full: adapters hold no slopes. Choose fixed ones with dti.slope_scale"
            )

    @property
    def targets_per_prompt(self) -> int | None:
        """`k`, with None for whole histories."""
        return self.k or None

    def located(self) -> TrainConfig:
        """The same with absolute paths, and `hub:` before the id of a hub's model: independent of the working directory."""
        pretrained = self.model.pretrained
        model = replace(self.model, pretrained=pretrained and located(pretrained))
        init = self.init and _absolute(self.init)
        return replace(self, data=_absolute(self.data), out=_absolute(self.out), init=init, model=model)

    def first_difference(self, other: TrainConfig, places: bool) -> str | None:
        """The first setting that keeps a run with these settings from going on with the other ones, in words; None: it can go on.

        Progress bars change nothing, nor where the run folder is now. Graphs may be left out where they were not, if memory was short. A
        calibration follows training, so that it may be wanted or not until then.

        Args:
            other: the settings of the later call.
            places: compare where data and pretrained model are; False: their fingerprints say whether they are the same.
        """
        mine, others = self.located(), other.located()
        optim = replace(mine.optim, graphs=others.optim.graphs)
        mine = replace(
            mine, out=others.out, progress=others.progress, calibrate=others.calibrate, optim=optim
        )
        if not places:
            model = replace(mine.model, pretrained=mine.model.pretrained and others.model.pretrained)
            init = mine.init if None in (mine.init, others.init) else others.init
            mine = replace(mine, data=others.data, model=model, init=init)
        return _first_difference(mine, others, "")

    def save(self, folder: Path) -> None:
        """Write `config.yaml` into a folder, which is made where it is missing; paths become absolute."""
        folder.mkdir(parents=True, exist_ok=True)
        write_config(self.located(), folder / CONFIG_FILE)

    @staticmethod
    def load(folder: Path) -> TrainConfig:
        """Read the `config.yaml` of a run folder.

        Raises:
            FileNotFoundError: no such file; `folder` is no run folder.
            ConfigFileError: it has been changed, or is another program's; the message names the file and the way out.
        """
        path = folder / CONFIG_FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist: {folder} is not a run folder made by `dti train`"
            )
        # Version 0.1.0 wrote neither seals nor fingerprints: where there are fingerprints, there was a seal.
        sealed = (folder / "model" / "provenance.json").is_file()
        return read_config(path, TrainConfig, sealed)


def _first_difference(mine: Any, others: Any, group: str) -> str | None:
    for each in fields(mine):
        before, now = getattr(mine, each.name), getattr(others, each.name)
        if before == now:
            continue
        if is_dataclass(before) and is_dataclass(now):
            return _first_difference(before, now, f"{group}{each.name}.")
        return f"{group}{each.name} was {as_yaml(before)} and is now {as_yaml(now)}"
    return None


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(os.path.expanduser(path)))
