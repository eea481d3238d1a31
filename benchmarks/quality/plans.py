"""Which runs answer which question: the paper's tables and figures, the sweeps that chose the defaults, and whole histories.

A plan is a list of arms; an arm is one setting trained from several seeds, and a name that tables show. Arms of different plans
with equal settings are one run. Plans with `test` are the final tables; the others decide on validation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.measuring import PRECISIONS
from benchmarks.quality.runs import Cell
from dti_model.config import DTIConfig, ModelConfig

MODEL = "meta-llama/Llama-3.1-8B-Instruct"
INSTRUCTION = (
    "Given the interaction history of a user, predict whether the user will like the next item: yes or no."
)
SW, SW_ALIBI, MINUS, DTI = "SW", "SW, position fix", "DTI-minus", "DTI"


@dataclass(frozen=True)
class Size:
    """How large the runs of a plan are."""

    base: Cell  # settings that every arm starts from
    seeds: int = 2  # of the arms that decide
    seeds_of_curves: int = 1  # of the other arms
    # of the sweep's main arms, the plans `users` and `long`, and the k of `whole` that are candidates for a default
    seeds_of_sweep: int = 1
    ks: tuple[int, ...] = (5, 10, 50)  # targets per prompt of the curves; 0: whole histories
    val_share: float = 1.0  # share of the validation targets that is scored
    test_share: float = 1.0  # likewise for test
    whole_targets: int = 0  # training targets of the plan `whole`, which needs many optimizer steps; 0: all
    whole_epochs: int = 2  # of the plan `whole`
    pretrained_layers: int = 0  # of the pretrained model, where there is one


def _scratch(train_targets: int, targets_per_step: int, learning_rate: float, model: ModelConfig) -> Cell:
    return Cell(1, 0, train_targets, targets_per_step, model=model, epochs=1, learning_rate=learning_rate)


SIZES = {
    "smoke": Size(
        _scratch(60, 16, 2e-3, ModelConfig(2, 16, heads=2, kv_heads=1, mlp_width=24, dropout=0.0)),
        seeds=2,
        seeds_of_curves=1,
        ks=(2,),
        whole_targets=60,
        whole_epochs=1,
    ),
    "small": Size(
        _scratch(36_000, 64, 1e-3, ModelConfig(2, 64, heads=4, kv_heads=2, mlp_width=172, dropout=0.0)),
        seeds=3,
        seeds_of_curves=3,
        seeds_of_sweep=2,
        ks=(5, 10, 20, 30, 50),
        val_share=0.34,
        test_share=0.5,
    ),
    # The paper's own runs (`full.py`).
    "full": Size(
        Cell(
            k=1,
            targets_per_step=512,
            epochs=10,
            learning_rate=1e-4,
            model=ModelConfig(pretrained=MODEL, instruction=INSTRUCTION),
        ),
        seeds=1,
        ks=(5, 10, 20, 30, 40, 50),
        whole_epochs=10,
        pretrained_layers=32,
    ),
}


@dataclass(frozen=True)
class Arm:
    """One setting, trained from some seeds."""

    name: str  # what tables call it
    cell: Cell  # its settings, seed 0
    seeds: int  # how many

    @property
    def cells(self) -> list[Cell]:
        """One per seed."""
        return [replace(self.cell, seed=seed) for seed in range(self.seeds)]


@dataclass(frozen=True)
class Plan:
    """Arms, and which of them are compared."""

    question: str  # in words
    arms: list[Arm]  # what is trained
    against: str  # name of the arm that all others are compared with
    control: str | None = None  # name of a second arm that all others are compared with
    test: bool = False  # score the test split: a final table
    # also score validation with streaming prompts of the training k, and with the reset switched
    score_other: bool = False
    # arms differ in rounding alone, so equal seeds (weights, order of the batches) are pairs; also score validation in each precision
    paired: bool = False


def _arm(
    name: str, size: Size, seeds: int | None = None, dti: DTIConfig | None = None, **changes: Any
) -> Arm:
    cell = replace(size.base, dti=_without_idle_settings(dti or DTIConfig()), **changes)
    return Arm(name, cell, size.seeds if seeds is None else seeds)


def _without_idle_settings(dti: DTIConfig) -> DTIConfig:
    """Equal models have equal settings: without a reset, its ratios are 0 and the mode is not named after it."""
    if dti.reset and dti.alpha_max > 0:
        return dti
    mode = "dti-position" if dti.position_fix else "dti-minus"
    return DTIConfig(mode, 0.0, 0.0, slope_scale=dti.slope_scale, train_slopes=dti.train_slopes)


def _k(k: int) -> str:
    return f"k = {k}" if k else "whole histories"


def _curves(size: Size, modes: dict[str, str], ks: tuple[int, ...]) -> list[Arm]:
    seeds = dict.fromkeys(ks, size.seeds_of_curves) | {max(size.ks): size.seeds}
    both = [(k, name, DTIConfig(mode)) for k in ks for name, mode in modes.items()]
    return [_arm(f"{name}, {_k(k)}", size, seeds[k], dti, k=k) for k, name, dti in both]


def _sliding(size: Size) -> list[Arm]:
    return [_arm(SW, size, dti=DTIConfig("dti-minus")), _arm(SW_ALIBI, size, dti=DTIConfig("dti-position"))]


def table1(size: Size) -> Plan:
    """SW, DTI-minus and DTI over k."""
    arms = _sliding(size) + _curves(size, {MINUS: "dti-minus", DTI: "dti"}, size.ks)
    return Plan("Is DTI as good as sliding windows, and what do its fixes do?", arms, SW, SW_ALIBI, test=True)


def figure3(size: Size) -> Plan:
    """Each fix alone at the largest k, with one reset whatever the default is."""
    k = max(size.ks)
    fixes = {
        MINUS: DTIConfig("dti-minus"),
        "position fix alone": DTIConfig("dti-position"),
        "reset alone (0 .. 0.5)": DTIConfig("dti-reset", 0.0, 0.5),
        "both fixes": DTIConfig("dti", 0.0, 0.5),
    }
    arms = [_arm(f"{name}, {_k(k)}", size, dti=dti, k=k) for name, dti in fixes.items()]
    return Plan("Which fix is worth more?", arms, arms[0].name, test=True)


def table3(size: Size) -> Plan:
    """Rows and seconds to the best epoch over k."""
    arms = _sliding(size)[:1] + _curves(size, {DTI: "dti"}, size.ks)
    return Plan("How much less work is it?", arms, SW, test=True)


SWEEP = {
    "no reset": DTIConfig(alpha_max=0.0),
    "0 .. 0.5": DTIConfig(alpha_max=0.5),
    "0 .. 1": DTIConfig(alpha_max=1.0),
    "0.5": DTIConfig(alpha_min=0.5, alpha_max=0.5),
    "1": DTIConfig(alpha_min=1.0, alpha_max=1.0),
}
FULL_RESET = DTIConfig(alpha_min=1.0, alpha_max=1.0, alpha_own=1.0)
SWEEP_ONCE = {
    "0 .. 0.5, steepness 0.25": DTIConfig(alpha_max=0.5, steepness=0.25),
    "0 .. 0.5, steepness 4": DTIConfig(alpha_max=0.5, steepness=4.0),
    "no reset, slopes x 0.25": DTIConfig(alpha_max=0.0, slope_scale=0.25),
    "no reset, slopes trained": DTIConfig(alpha_max=0.0, train_slopes=True),
}


def sweep(size: Size) -> Plan:
    """The reset's ratios, steepness and layers, and the slopes, at the largest k."""
    k = max(size.ks)
    arms = [_arm(name, size, size.seeds_of_sweep, dti=dti, k=k) for name, dti in SWEEP.items()]
    arms += [_arm(name, size, 1, dti=dti, k=k) for name, dti in SWEEP_ONCE.items()]
    half, no_reset = size.base.learning_rate / 2, SWEEP["no reset"]
    arms.append(_arm("no reset, half the learning rate", size, 1, no_reset, k=k, learning_rate=half))
    return Plan("Which reset, which slopes, which learning rate?", arms, "no reset", score_other=True)


def depth(size: Size) -> Plan:
    """Which layers of a deeper model reset: what leaks through depth, and whether scoring by sliding windows misses it."""
    model = size.base.model
    if model.pretrained is None:
        model = replace(model, layers=2 * model.layers)
    base = replace(size.base, train_targets=size.whole_targets, epochs=size.whole_epochs, model=model)
    every_layer = tuple(range(size.pretrained_layers or model.layers))
    size, k = replace(size, base=base), max(size.ks)
    resets = {
        "no reset": DTIConfig(alpha_max=0.0),
        "0 .. 0.5, last layer": DTIConfig(alpha_max=0.5),
        "0 .. 0.5, every layer": DTIConfig(alpha_max=0.5, reset_layers=every_layer),
        "full reset, every layer": replace(FULL_RESET, reset_layers=every_layer),
    }
    arms = [_arm(name, size, size.seeds_of_curves, dti=dti, k=k) for name, dti in resets.items()]
    return Plan("Which layers of a deeper model reset?", arms, "no reset", score_other=True)


def whole(size: Size) -> Plan:
    """Whole histories beside k = 50, cause by cause."""
    k, seeds = max(size.ks), size.seeds_of_curves
    size = replace(size, base=replace(size.base, train_targets=size.whole_targets, epochs=size.whole_epochs))
    few, rate = size.base.targets_per_step, size.base.learning_rate
    many = 10 * few
    large_steps: dict[str, Any] = {"k": k, "targets_per_step": many}
    arms = [
        _arm(f"{_k(k)}, {few} targets a step", size, size.seeds_of_sweep, k=k),
        _arm("whole histories", size, seeds, k=0),
        _arm(f"{_k(k)}, {many} targets a step", size, seeds, **large_steps),
        _arm(f"{_k(k)}, {many} targets a step, few users a batch", size, seeds, mixed=False, **large_steps),
        _arm(f"{_k(2 * k)}, smallest step", size, size.seeds_of_sweep, k=2 * k),
        _arm(f"{_k(4 * k)}, smallest step", size, size.seeds_of_sweep, k=4 * k),
        _arm("whole histories, full reset", size, seeds, k=0, dti=FULL_RESET),
        _arm("whole histories, learning rate x 2", size, seeds, k=0, learning_rate=2 * rate),
    ]
    return Plan("Why are whole histories worse at equal epochs?", arms, arms[0].name, score_other=True)


def users(size: Size) -> Plan:
    """Streaming beside sliding windows when an optimizer step holds four times the targets, so several users at every k."""
    base = replace(size.base, targets_per_step=4 * size.base.targets_per_step, epochs=3 * size.base.epochs)
    size, k = replace(size, base=base), max(size.ks)
    arms = [*_sliding(size)[1:], _arm(f"{DTI}, {_k(k)}", size, k=k)]
    arms = [replace(arm, seeds=size.seeds_of_sweep) for arm in arms]
    return Plan("Does streaming cost accuracy where a step holds several users?", arms, SW_ALIBI)


def long(size: Size) -> Plan:
    """Streaming beside sliding windows where models have had time to learn: all targets, three times the epochs."""
    base = replace(size.base, train_targets=size.whole_targets, epochs=3 * size.base.epochs)
    size, k = replace(size, base=base), max(size.ks)
    arms = [*_sliding(size)[1:], *(_arm(f"{DTI}, {_k(n * k)}", size, k=n * k) for n in (1, 2, 4))]
    arms = [replace(arm, seeds=size.seeds_of_sweep) for arm in arms]
    return Plan("Does streaming cost accuracy where models have learnt?", arms, SW_ALIBI, score_other=True)


def precision(size: Size) -> Plan:
    """bfloat16 beside float32 with the settings of `long`, whose streaming arm is this one in float32, on every validation target."""
    base = replace(size.base, train_targets=size.whole_targets, epochs=3 * size.base.epochs, val_share=1.0)
    size, k = replace(size, base=base), max(size.ks)
    arms = [_arm(f"{DTI}, {_k(k)}, {name}", size, k=k, precision=name) for name in PRECISIONS]
    return Plan("Does bfloat16 cost accuracy?", arms, arms[0].name, paired=True)


_MAKERS: tuple[Callable[[Size], Plan], ...] = (
    *(table1, table3, figure3, sweep, depth, whole, users, long),
    precision,
)
PLANS = {make.__name__: make for make in _MAKERS} | {"figure2": table1}
