"""A training run on paper: steps, FLOPs, hours and memory of sliding windows and of streaming prompts, for any model, data and GPU.

    python -m benchmarks.simulate                                   the paper's Table 3, and a billion interactions on 8 to 512 GPUs
    python -m benchmarks.simulate --model llama-3.1-8b --data ml-1m --k 1 10 50 0 --gpu h100 --gpus 8 [--finetune full]
    python -m benchmarks.simulate --prepared DIR --rows benchmarks/results/train-cpu.jsonl     beside rows measured here

    rows        = interactions x tokens + [SUM]s + prefixes, summed over the users' histories
    forward     = 2 x parameters of the layers x rows + 4 x heads x head_dim x layers x visible pairs + 2 E V x [SUM]s
    training    = forward x (1 + recomputed forward + backward: 2 with weight gradients, 1 + low-rank updates with LoRA)
    hours       = max(FLOPs / (peak x efficiency), bytes / bandwidth, bytes sent / link) + validation, forward only, after each epoch

Peaks and bandwidths are the vendors'; efficiencies are assumptions (see `Efficiency`), not measurements, and cancel in the ratio of
hours but for the validations, which sliding windows and streams pay alike.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.recording import make_parser
from dti_model.data import PreparedData
from dti_model.prompts import Prompts

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Shape:
    """A Llama."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    vocabulary: int
    tied: bool = False

    @property
    def layer_parameters(self) -> int:
        """Matrices of one decoder layer."""
        attention = self.width * self.head_dim * 2 * (self.heads + self.kv_heads)
        return attention + 3 * self.width * self.mlp_width

    @property
    def parameters(self) -> int:
        """All matrices, embedding and head included."""
        return self.layers * self.layer_parameters + self.width * self.vocabulary * (1 if self.tied else 2)

    def lora_parameters(self, rank: int) -> int:
        """Low-rank updates of all seven projections."""
        outputs = 2 * self.head_dim * (self.heads + self.kv_heads) + 2 * self.mlp_width + self.width
        inputs = 3 * self.width + self.heads * self.head_dim + 2 * self.width + self.mlp_width
        attention_out = self.width - self.heads * self.head_dim  # o_proj writes the width, not the heads
        return self.layers * rank * (outputs + inputs + attention_out)


SHAPES = {
    "llama-3.1-8b": Shape(32, 4096, 32, 8, 128, 14336, 128256),
    "llama-3.2-1b": Shape(16, 2048, 32, 8, 64, 8192, 128256, tied=True),
    "qwen2.5-0.5b": Shape(24, 896, 14, 2, 64, 4864, 151936, tied=True),
    "smollm2-135m": Shape(30, 576, 9, 3, 64, 1536, 49152, tied=True),
}


@dataclass(frozen=True)
class Gpu:
    """Published figures: dense bfloat16 TFLOP/s, GB/s of memory, GiB, GB/s to a peer inside the node and across nodes."""

    tflops: float
    memory_gb_s: float
    memory_gib: float
    node_gb_s: float
    network_gb_s: float
    source: str


GPUS = {
    "a100": Gpu(312, 2039, 80, 300, 25, "NVIDIA A100 80GB data sheet; 200 Gb/s per GPU of DGX A100"),
    "h100": Gpu(989, 3350, 80, 450, 50, "NVIDIA H100 SXM data sheet; 400 Gb/s per GPU of DGX H100"),
    "h200": Gpu(989, 4800, 141, 450, 50, "NVIDIA H200 SXM data sheet; 400 Gb/s per GPU of DGX H200"),
    "b200": Gpu(2250, 8000, 180, 900, 50, "NVIDIA DGX B200 data sheet"),
    "mi300x": Gpu(1307, 5300, 192, 448, 50, "AMD Instinct MI300X data sheet"),
}


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
    def published(
        users: int,
        interactions: int,
        tokens: float,
        window: int,
        prefix: int = 40,
        spread: float = 1.0,
        repeated: int = 1,
    ) -> Histories:
        """From counts alone: log-normal history lengths of at least 20, targets after `window` interactions.

        Of five users four train with all their targets: a split by global time leaves most users on one side of it (ML-100K:
        750 of 943 users have training targets). A tenth of all targets is validation.
        """
        quantiles = (np.arange(users) + 0.5) / users
        lengths = 20 + _lognormal(quantiles, interactions / users - 20, spread)
        targets = np.maximum(np.rint(lengths).astype(np.int64) - window, 0)
        training = np.where(np.arange(users) % 5 < 4, targets, 0)
        validation = repeated * int(targets.sum()) // 10
        return Histories(training, np.full(users, window), validation, tokens, prefix, repeated)

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


def _lognormal(quantiles: npt.NDArray[np.float64], mean: float, spread: float) -> npt.NDArray[np.float64]:
    from scipy.stats import lognorm

    return np.asarray(lognorm.ppf(quantiles, s=spread, scale=mean / np.exp(spread**2 / 2)))


@dataclass(frozen=True)
class Efficiency:
    """Shares of the peak, assumed: training with recomputation and LoRA, scoring without gradients, windowed attention."""

    training: float = 0.35
    scoring: float = 0.60
    attention: float = 0.25


@dataclass(frozen=True)
class Setting:
    """What is trained, and how."""

    shape: Shape
    histories: Histories
    gpu: Gpu
    gpus: int = 1
    window: int = 20
    finetune: str = "lora"
    rank: int = 16
    epochs: float = 1.0
    tokens_per_gpu: int = 16384
    checkpointing: bool = True
    validate: bool = True
    efficiency: Efficiency = Efficiency()


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
    linear, attention = _forward(s, rows, data.targets, k)
    trained = s.shape.parameters if s.finetune == "full" else s.shape.lora_parameters(s.rank)
    low_rank = 0.0 if s.finetune == "full" else 6.0 * trained * rows
    passes = 1 + int(s.checkpointing) + (2 if s.finetune == "full" else 1)
    attention_passes = 1 + int(s.checkpointing) + 2.5
    train_linear, train_attention = linear * passes + low_rank, attention * attention_passes
    steps = max(1, round(rows / (s.tokens_per_gpu * s.gpus)))
    peak = 1e12 * s.gpu.tflops * s.gpus
    times = {
        "compute": train_linear / (peak * share.training) + train_attention / (peak * share.attention),
        "memory": steps * _bytes_moved(s, passes, trained) / (1e9 * s.gpu.memory_gb_s),
        "network": steps * _bytes_sent(s, trained) / (1e9 * _link(s)),
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
        gib=_memory(s, trained) / 2**30,
        limit=limit,
    )


def _forward(s: Setting, rows: float, targets: int, k: int) -> tuple[float, float]:
    """FLOPs of linear layers and of attention. The last layer's queries, output and MLP run on [SUM] rows only."""
    shape, span = s.shape, s.window * s.histories.tokens
    keys_only = 2 * shape.width * shape.head_dim * shape.kv_heads
    linear = 2.0 * rows * (shape.layer_parameters * (shape.layers - 1) + keys_only)
    linear += 2.0 * targets * (shape.layer_parameters - keys_only + shape.width * shape.vocabulary)
    # A sliding-window prompt is a triangle, so its rows see half a window; a stream's rows see a whole one.
    visible = span * (0.5 if k == 1 else 1.0)
    pairs = rows * visible * (shape.layers - 1) + targets * span
    return linear, 4.0 * shape.heads * shape.head_dim * pairs


def _bytes_moved(s: Setting, passes: int, trained: int) -> float:
    """Weights once per pass, about 30 activations of the width per row and layer, and the moments of what is trained."""
    weights = 2.0 * s.shape.parameters * passes
    activations = 2.0 * 30 * s.tokens_per_gpu * s.shape.width * s.shape.layers * passes
    return weights + activations + 24.0 * trained / (s.gpus if s.finetune == "full" else 1)


def _bytes_sent(s: Setting, trained: int) -> float:
    """Per GPU and step: gradients of the updates (LoRA), or weights twice and gradients once (full, sharded)."""
    if s.gpus == 1:
        return 0.0
    others = (s.gpus - 1) / s.gpus
    return others * (2 * 4.0 * trained if s.finetune == "lora" else 3 * 2.0 * trained)


def _link(s: Setting) -> float:
    return s.gpu.node_gb_s if s.gpus <= 8 else s.gpu.network_gb_s


def _memory(s: Setting, trained: int) -> float:
    """bfloat16 weights, float32 gradients and moments of what is trained (sharded in full fine-tuning), activations."""
    shape, rows = s.shape, s.tokens_per_gpu
    state = 16.0 * trained
    if s.finetune == "full":
        weights = (2.0 * shape.parameters + state) / s.gpus + 2 * 2.0 * shape.layer_parameters
    else:
        weights = 2.0 * shape.parameters + state
    one_layer = 2.0 * rows * (8 * shape.width + 2 * shape.head_dim * shape.kv_heads + 4 * shape.mlp_width)
    kept = 2.0 * rows * shape.width * shape.layers if s.checkpointing else one_layer * shape.layers
    logits = 2 * 4.0 * shape.vocabulary * rows / s.histories.tokens
    return weights + kept + one_layer + logits


WINDOW = 20
DATA = {
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
    facts: dict[str, Any] = DATA[name]
    return Histories.published(window=window, **facts)


def table_3() -> list[dict[str, Any]]:
    """The paper's ratios of hours beside ours, from its setting: Llama-3.1-8B, LoRA, A100."""
    rows = []
    for name, hours in TABLE_3.items():
        setting = Setting(SHAPES["llama-3.1-8b"], data_set(name), GPUS["a100"])
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
            setting = Setting(SHAPES[model], histories, GPUS["h100"], gpus, finetune=finetune, validate=False)
            found = {k: estimate(setting, k) for k in (1, 50, 0)}
            rows.append(
                {
                    "model": f"{model} {finetune}",
                    "gpus": gpus,
                    "steps": found[50].steps,
                    "hours_sw": found[1].hours,
                    "hours_k50": found[50].hours,
                    "hours_whole": found[0].hours,
                    "gib": found[50].gib,
                    "limit": found[50].limit,
                }
            )
    return rows


def measured(path: Path, folder: Path) -> list[dict[str, Any]]:
    """Rows of `bench_train` on the CPU beside what counting says: rows per target exactly, speed-ups from FLOPs."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    data = PreparedData.open(folder)
    targets = data.targets("train")
    result = []
    for row in rows:
        if row["benchmark"] != "train" or row["data"] != data.stats["source"]["name"]:
            continue
        k = None if row["k"] == "all" else row["k"]
        prompts = Prompts.streaming(data, targets, WINDOW, k)
        tokens = data.stats["tokenizer"]["mean_item_tokens"] + 1
        histories = Histories.prepared(folder, tokens)
        count, interactions = histories.prompts(WINDOW, k or 0)
        assert (count, interactions) == (len(prompts), int((prompts.stop - prompts.first).sum()))
        layers, width = (int(x) for x in row["model"].split(" x "))
        shape = Shape(
            layers, width, 4, 2, width // 4, 8 * width // 3, data.stats["tokenizer"]["vocab_size"], True
        )
        setting = Setting(
            shape, histories, GPUS["a100"], finetune="full", checkpointing=False, validate=False,
            efficiency=Efficiency(1.0, 1.0, 1.0),
        )  # fmt: skip
        ratio = estimate(setting, 1).pflop / estimate(setting, k or 0).pflop
        result.append({**row, "simulated_speedup": ratio})
    return result


def _show(rows: list[dict[str, Any]], columns: dict[str, str]) -> None:
    widths = {name: max(len(name), 12) for name in columns}
    print("  ".join(f"{name:>{widths[name]}}" for name in columns))
    for row in rows:
        cells = (
            format(row[name], spec) if row.get(name) is not None else "-" for name, spec in columns.items()
        )
        print("  ".join(f"{cell:>{widths[name]}}" for cell, name in zip(cells, columns)))


def main() -> None:
    """Print what was asked for."""
    parser = make_parser(__doc__)
    parser.add_argument("--model", choices=SHAPES)
    parser.add_argument("--data", choices=DATA, default="ml-1m")
    parser.add_argument("--prepared", type=Path, help="count in this prepared folder instead of --data")
    parser.add_argument(
        "--tokens", type=float, help="tokens of an interaction, label included, of the model's tokenizer"
    )
    parser.add_argument("--window", type=int, default=WINDOW)
    parser.add_argument("--k", type=int, nargs="+", default=[1, 10, 30, 50, 200, 0])
    parser.add_argument("--gpu", choices=GPUS, default="h100")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--finetune", choices=("lora", "full"), default="lora")
    parser.add_argument("--tokens-per-gpu", type=int, default=16384)
    parser.add_argument(
        "--rows", type=Path, help="rows of benchmarks.bench_train to compare with; needs --prepared"
    )
    options = parser.parse_args()
    if options.rows is not None:
        if options.prepared is None:
            parser.error("--rows needs --prepared, the folder that the rows were measured on")
        _show(
            measured(options.rows, options.prepared),
            {"model": "", "k": "", "rows_per_target": ".2f", "speedup": ".2f", "simulated_speedup": ".2f"},
        )
    elif options.model is None:
        print("Hours of sliding windows over hours of streams, Llama-3.1-8B with LoRA on A100 (Table 3):")
        _show(
            table_3(),
            {"data": "", "k": "", "paper": ".2f", "simulated": ".2f", "error": "+.0%", "equation_3": ".2f"},
        )
        print(
            "\nOne epoch over a billion interactions of ten million users, H100, 16,384 tokens per GPU and step (k = 50):"
        )
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
            SHAPES[options.model], histories, GPUS[options.gpu], options.gpus, options.window,
            options.finetune, epochs=options.epochs, tokens_per_gpu=options.tokens_per_gpu,
        )  # fmt: skip
        found = [estimate(setting, k) for k in options.k]
        sliding = estimate(setting, 1).hours
        rows = [{**vars(e), "k": e.k or "all", "ratio": sliding / e.hours} for e in found]
        columns = {"k": "", "rows": ",", "steps": ",", "pflop": ",.0f", "hours": ".2f", "ratio": ".2f"}
        _show(rows, {**columns, "gib": ".0f", "limit": ""})


if __name__ == "__main__":
    main()
