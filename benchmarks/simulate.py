"""A training run on paper: steps, FLOPs, hours and memory of sliding windows and of streaming prompts, for any model, data and GPU.

    python -m benchmarks.simulate                                   the paper's Table 3, and a billion interactions on 8 to 512 GPUs
    python -m benchmarks.simulate --model llama-3.1-8b --data ml-1m --k 1 10 50 0 --gpu h100 --gpus 8 [--finetune full]
    python -m benchmarks.simulate --prepared DIR --rows benchmarks/results/train-cpu.jsonl     beside rows measured here

    rows        = interactions x tokens + [SUM]s + prefixes, summed over the users' histories
    FLOPs       = those that training itself counts (`dti_model/training/flops.py`), and the forward again where it is recomputed
    hours       = max(FLOPs / (peak x efficiency), bytes / bandwidth, bytes sent / link) + validation, forward only, after each epoch

Peaks and bandwidths are the vendors'; efficiencies are assumptions (see `Efficiency`), not measurements, and cancel in the ratio of
hours but for the validations, which sliding windows and streams pay alike.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import lognorm

from benchmarks.cards import CARDS, Card
from benchmarks.recording import make_parser, read_rows
from benchmarks.shapes import SHAPES, Shape, heads_of, shape
from benchmarks.synthetic import random_model
from dti_model.config import LoraSettings
from dti_model.data import PreparedData
from dti_model.model import add_lora
from dti_model.prompts import Prompts
from dti_model.training import StepCost

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Network:
    """A model and what is trained of it, counted from its matrices."""

    shape: Shape  # its settings
    parameters: int  # of all of it
    layer_parameters: int  # of one decoder layer
    trained: int  # parameters that are trained
    step: StepCost  # FLOPs of forward and backward
    # the same where nothing is trained: a matrix costs twice its forward, a pair three times
    frozen: StepCost

    @staticmethod
    def of(shape: Shape, finetune: str, rank: int = 16) -> Network:
        """Count a model that is made without its weights; `rank` of LoRA on all seven projections."""
        model = random_model(shape, device="meta")
        layer = sum(x.numel() for name, x in model.named_parameters() if ".layers.0." in name)
        frozen = StepCost.of(model.requires_grad_(False))
        adapted = add_lora(model, LoraSettings(rank), 0) if finetune == "lora" else model.requires_grad_(True)
        trained = sum(x.numel() for x in adapted.parameters() if x.requires_grad)
        return Network(shape, model.num_parameters(), layer, trained, StepCost.of(adapted), frozen)


@cache
def network(model: str, finetune: str) -> Network:
    """One of `SHAPES`, fine-tuned in full or by LoRA."""
    return Network.of(SHAPES[model], finetune)


GPUS = {card.name.lower(): card for card in CARDS}


@dataclass(frozen=True)
class Histories:
    """A data set as lengths."""

    training: Ints  # `(U,)` training targets per user
    context: Ints  # `(U,)` interactions before a user's first target
    validation: int  # targets of the validation split
    tokens: float  # of an interaction, label included
    prefix: int = 0  # tokens before the first interaction of a prompt
    repeated: int = 1  # every user stands for so many

    @staticmethod
    def published(users: int, interactions: int, tokens: float, window: int, repeated: int = 1) -> Histories:
        """From counts alone: log-normal history lengths of at least 20, targets after `window` interactions, prefixes of 40 tokens.

        Of five users four train with all their targets: a split by global time leaves most users on one side of it (ML-100K:
        750 of 943 users have training targets). A tenth of all targets is validation.
        """
        quantiles = (np.arange(users) + 0.5) / users
        scale = (interactions / users - 20) / np.exp(0.5)  # so that their mean is that of the data set
        lengths = 20 + np.asarray(lognorm.ppf(quantiles, s=1.0, scale=scale))
        targets = np.maximum(np.rint(lengths).astype(np.int64) - window, 0)
        training = np.where(np.arange(users) % 5 < 4, targets, 0)
        validation = repeated * int(targets.sum()) // 10
        return Histories(training, np.full(users, window), validation, tokens, 40, repeated)

    @staticmethod
    def prepared(folder: Path, tokens: float) -> Histories:
        """Counted in a prepared folder, whose users' training targets follow each other (as they do in every split)."""
        data = PreparedData.open(folder)
        rows = data.targets("train")
        users = data.users_of(rows)
        distinct, counts = np.unique(users, return_counts=True)
        first = np.full(data.num_users, np.iinfo(np.int64).max)
        np.minimum.at(first, users, rows)
        context = first[distinct] - data.history_offsets[distinct]
        return Histories(counts, context, len(data.targets("val")), tokens, prefix=1)

    def prompts(self, window: int, k: int) -> tuple[int, int]:
        """Prompts and interactions in them, at k targets per prompt (0: whole histories)."""
        m, c = self.training[self.training > 0], self.context[self.training > 0]
        size = int(m.max()) if k == 0 else k
        count = -(-m // size)
        context = np.zeros_like(m)
        for i in range(min(int(count.max()), -(-window // size) + 1)):
            context += np.where(i < count, np.minimum(window, c + i * size), 0)
        context += window * np.maximum(count - (-(-window // size) + 1), 0)
        return self.repeated * int(count.sum()), self.repeated * int((m + context).sum())

    @property
    def targets(self) -> int:
        """Training targets."""
        return self.repeated * int(self.training.sum())


@dataclass(frozen=True)
class Efficiency:
    """Shares of the peak, assumed: training with recomputation and LoRA, scoring without gradients, windowed attention."""

    training: float = 0.35
    scoring: float = 0.60
    attention: float = 0.25


@dataclass(frozen=True)
class Setting:
    """The network that is trained, and how."""

    network: Network
    histories: Histories
    gpu: Card
    gpus: int = 1
    window: int = 20
    epochs: float = 1.0
    tokens_per_gpu: int = 16384
    checkpointing: bool = True
    validate: bool = True
    efficiency: Efficiency = Efficiency()

    @property
    def full(self) -> bool:
        """Everything is trained, and sharded over the GPUs."""
        return self.network.trained == self.network.parameters


@dataclass(frozen=True)
class Estimate:
    """Of one k."""

    k: int
    rows: int  # of one epoch, context tokens and [SUM]s
    steps: int  # optimizer steps of the run
    pflop: float  # of the run, validations included
    hours: float  # of the run
    gib: float  # memory per GPU
    limit: str  # what takes longest in a step: compute, memory or network


def estimate(setting: Setting, k: int) -> Estimate:
    """The run at k targets per prompt; 0: whole histories."""
    s, data, share = setting, setting.histories, setting.efficiency
    prompts, interactions = data.prompts(s.window, k)
    rows = interactions * data.tokens + data.targets + prompts * data.prefix
    step = s.network.step
    train_linear = float(step.per_row * rows + step.per_sum * data.targets)
    train_attention = step.per_pair * _pairs(s, rows, k)
    if s.checkpointing:
        linear, attention = _forward(s, rows, data.targets, k)
        train_linear, train_attention = train_linear + linear, train_attention + attention
    steps = max(1, round(rows / (s.tokens_per_gpu * s.gpus)))
    peak = 1e12 * s.gpu.tflops * s.gpus
    link = s.gpu.node_gb_s if s.gpus <= 8 else s.gpu.network_gb_s
    times = {
        "compute": train_linear / (peak * share.training) + train_attention / (peak * share.attention),
        "memory": steps * _bytes_moved(s) / (1e9 * s.gpu.memory_gb_s),
        "network": steps * _bytes_sent(s) / (1e9 * link),
    }
    limit = max(times, key=lambda name: times[name])
    scoring = scoring_flop = 0.0
    if s.validate:
        scored = data.validation * (s.window + 1) * data.tokens + data.validation * (1 + data.prefix)
        forward, visible = _forward(s, scored, data.validation, 1)
        scoring = forward / (peak * share.scoring) + visible / (peak * share.attention)
        scoring_flop = forward + visible
    return Estimate(
        k=k,
        rows=round(rows),
        steps=round(s.epochs * steps),
        pflop=s.epochs * (train_linear + train_attention + scoring_flop) / 1e15,
        hours=s.epochs * (times[limit] + scoring) / 3600,
        gib=_memory(s) / 2**30,
        limit=limit,
    )


def _pairs(s: Setting, rows: float, k: int) -> float:
    """Visible pairs. A sliding-window prompt is a triangle, so its rows see half a window; a stream's rows see a whole one."""
    return rows * s.window * s.histories.tokens * (0.5 if k == 1 else 1.0)


def _forward(s: Setting, rows: float, targets: int, k: int) -> tuple[float, float]:
    """FLOPs of linear layers and of attention."""
    cost = s.network.frozen
    return (cost.per_row * rows + cost.per_sum * targets) / 2, cost.per_pair / 3 * _pairs(s, rows, k)


def _bytes_moved(s: Setting) -> float:
    """Weights once per pass, about 30 activations of the width per row and layer, and the moments of what is trained."""
    shape = s.network.shape
    # Forward, perhaps again, and backward once or, where weights are trained, twice.
    passes = 1 + int(s.checkpointing) + (2 if s.full else 1)
    weights = 2.0 * s.network.parameters * passes
    numbers: int = 30 * s.tokens_per_gpu * shape["hidden_size"] * shape["num_hidden_layers"]
    return weights + 2.0 * numbers * passes + 24.0 * s.network.trained / (s.gpus if s.full else 1)


def _bytes_sent(s: Setting) -> float:
    """Per GPU and step: gradients of the updates (LoRA), or weights twice and gradients once (full, sharded)."""
    others = (s.gpus - 1) / s.gpus
    return others * s.network.trained * (3 * 2.0 if s.full else 2 * 4.0)


def _memory(s: Setting) -> float:
    """bfloat16 weights, float32 gradients and moments of what is trained (sharded in full fine-tuning), activations."""
    shape, rows = s.network.shape, s.tokens_per_gpu
    width, layers = shape["hidden_size"], shape["num_hidden_layers"]
    weights, state = 2.0 * s.network.parameters, 16.0 * s.network.trained
    gathered = 2 * 2.0 * s.network.layer_parameters  # of a sharded model: the layer at work and the next
    held = (weights + state) / s.gpus + gathered if s.full else weights + state
    _, kv_heads, head_dim = heads_of(shape)
    numbers: int = 8 * width + 2 * head_dim * kv_heads + 4 * shape["intermediate_size"]
    one_layer = 2.0 * rows * numbers
    kept: float = 2.0 * rows * width * layers if s.checkpointing else one_layer * layers
    logits: float = 2 * 4.0 * shape["vocab_size"] * rows / s.histories.tokens
    return held + kept + one_layer + logits


WINDOW = 20
DATA: dict[str, dict[str, Any]] = {
    "ml-1m": {"users": 6040, "interactions": 1_000_209, "tokens": 35.05},
    "cds": {"users": 6741, "interactions": 492_333, "tokens": 45.0},
    "kindles": {"users": 14_051, "interactions": 1_026_351, "tokens": 45.0},
    "billion": {"users": 10_000, "interactions": 1_000_000, "tokens": 35.0, "repeated": 1000},
}
# Hours to convergence, Table 3 of the paper; k = 1 is SW.
TABLE_3 = {
    "ml-1m": {1: 69.56, 10: 11.13, 30: 6.63, 50: 5.37},
    "cds": {1: 37.84, 10: 7.56, 30: 4.75, 50: 3.42},
    "kindles": {1: 70.50, 10: 11.98, 30: 6.20, 50: 5.31},
}


def data_set(name: str, window: int = WINDOW) -> Histories:
    """One of `DATA`."""
    return Histories.published(window=window, **DATA[name])


def table_3() -> list[dict[str, Any]]:
    """The paper's ratios of hours beside ours, from its setting: Llama-3.1-8B, LoRA, A100."""
    rows = []
    for name, hours in TABLE_3.items():
        setting = Setting(network("llama-3.1-8b", "lora"), data_set(name), GPUS["a100"])
        sliding = estimate(setting, 1).hours
        for k in (10, 30, 50):
            paper, ours = hours[1] / hours[k], sliding / estimate(setting, k).hours
            row = {"data": name, "k": k, "paper": paper, "simulated": ours, "error": ours / paper - 1}
            rows.append({**row, "equation_3": k * WINDOW / (WINDOW + k)})
    return rows


def billion() -> list[dict[str, Any]]:
    """One epoch over a billion interactions: Llama-3.1-8B and 3.2-1B on H100s."""
    histories, rows = data_set("billion"), []
    for model, finetune in (("llama-3.1-8b", "lora"), ("llama-3.1-8b", "full"), ("llama-3.2-1b", "full")):
        for gpus in (8, 32, 128, 512):
            setting = Setting(network(model, finetune), histories, GPUS["h100"], gpus, validate=False)
            found = {k: estimate(setting, k) for k in (1, 50, 0)}
            row: dict[str, Any] = {"model": f"{model} {finetune}", "gpus": gpus, "steps": found[50].steps}
            row |= {"hours_sw": found[1].hours, "hours_k50": found[50].hours, "hours_whole": found[0].hours}
            rows.append({**row, "gib": found[50].gib, "limit": found[50].limit})
    return rows


def measured(path: Path, folder: Path) -> list[dict[str, Any]]:
    """Rows of `bench_train` on the CPU beside what counting says: rows per target exactly, speed-ups from FLOPs."""
    data = PreparedData.open(folder)
    tokens = data.stats["tokenizer"]["mean_item_tokens"] + 1
    histories = Histories.prepared(folder, tokens)
    result = []
    for row in read_rows(path):
        if row["benchmark"] != "train" or row["data"] != data.stats["source"]["name"]:
            continue
        k = None if row["k"] == "all" else row["k"]
        prompts = Prompts.streaming(data, data.targets("train"), WINDOW, k)
        count, interactions = histories.prompts(WINDOW, k or 0)
        assert (count, interactions) == (len(prompts), int((prompts.stop - prompts.first).sum()))
        layers, width = map(int, row["model"].split(" x "))
        vocabulary = data.stats["tokenizer"]["vocab_size"]
        settings = shape(layers, width, 4, 2, -(-width // 3) * 8, vocabulary, tied=True)
        whole = Setting(Network.of(settings, "full"), histories, GPUS["a100"])
        setting = replace(whole, checkpointing=False, validate=False, efficiency=Efficiency(1.0, 1.0, 1.0))
        ratio = estimate(setting, 1).pflop / estimate(setting, k or 0).pflop
        result.append({**row, "simulated_speedup": ratio})
    return result


def _show(rows: list[dict[str, Any]], columns: dict[str, str]) -> None:
    widths = {name: max(len(name), 12) for name in columns}
    print("  ".join(f"{name:>{widths[name]}}" for name in columns))
    for row in rows:
        cells = ("-" if row.get(name) is None else format(row[name], spec) for name, spec in columns.items())
        print("  ".join(f"{cell:>{widths[name]}}" for cell, name in zip(cells, columns)))


def main() -> None:
    """Print what was asked for."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--model", choices=SHAPES)
    add("--data", choices=DATA, default="ml-1m")
    add("--prepared", type=Path, help="count in this prepared folder instead of --data")
    add("--tokens", type=float, help="of an interaction, label included, by the model's tokenizer")
    add("--window", type=int, default=WINDOW)
    add("--k", type=int, nargs="+", default=[1, 10, 30, 50, 200, 0])
    add("--gpu", choices=GPUS, default="h100")
    add("--gpus", type=int, default=8)
    add("--epochs", type=float, default=1.0)
    add("--finetune", choices=("lora", "full"), default="lora")
    add("--tokens-per-gpu", type=int, default=16384)
    add("--rows", type=Path, help="of benchmarks.bench_train, to compare; needs --prepared")
    options = parser.parse_args()
    if options.rows is not None:
        if options.prepared is None:
            parser.error("--rows needs --prepared, the folder that the rows were measured on")
        speeds = {"rows_per_target": ".2f", "speedup": ".2f", "simulated_speedup": ".2f"}
        _show(measured(options.rows, options.prepared), {"model": "", "k": "", **speeds})
    elif options.model is None:
        print("Hours of sliding windows over hours of streams, Llama-3.1-8B with LoRA on A100 (Table 3):")
        ratios = {"paper": ".2f", "simulated": ".2f", "error": "+.0%", "equation_3": ".2f"}
        _show(table_3(), {"data": "", "k": "", **ratios})
        print("\nOne epoch over a billion interactions of ten million users, H100, 16,384 tokens per GPU and step "
              "(k = 50):")  # fmt: skip
        hours = {"hours_sw": ",.1f", "hours_k50": ",.1f", "hours_whole": ",.1f"}
        _show(billion(), {"model": "", "gpus": "", "steps": ",", **hours, "gib": ".0f", "limit": ""})
    else:
        histories = data_set(options.data, options.window)
        if options.prepared is not None:
            if options.tokens is None:
                parser.error("--prepared needs --tokens")
            histories = Histories.prepared(options.prepared, options.tokens)
        elif options.tokens is not None:
            histories = replace(histories, tokens=options.tokens)
        setting = Setting(
            network(options.model, options.finetune), histories, GPUS[options.gpu], options.gpus, options.window,
            options.epochs, options.tokens_per_gpu,
        )  # fmt: skip
        sliding = estimate(setting, 1).hours
        found = (estimate(setting, k) for k in options.k)
        rows = [{**vars(e), "k": e.k or "all", "ratio": sliding / e.hours} for e in found]
        columns = {"k": "", "rows": ",", "steps": ",", "pflop": ",.0f", "hours": ".2f", "ratio": ".2f"}
        _show(rows, {**columns, "gib": ".0f", "limit": ""})


if __name__ == "__main__":
    main()
