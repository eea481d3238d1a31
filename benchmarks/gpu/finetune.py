"""A pretrained language model fine-tuned on clicks within a time limit: what streaming prompts cost and what comes of them on a GPU.

    python -m benchmarks.gpu.finetune --data DATA --weights FOLDER_OR_GGUF [--k 50] [--epochs 1] [--seconds 200] [--no-graphs]
        [--targets 75000] [--accumulation 15] [--template $'{item}: {label}\\n'] [--compile] [--out ROWS.jsonl]

All weights are trained, in float32 with bfloat16 products. With `--targets` they are some targets, whole prompts of 50 of them, and the
same ones for every k: so streaming prompts and sliding windows are compared at equal targets, and with `--accumulation` at equal steps.
Validation comes before the first step and after every epoch. Whenever it is the best so far, all test targets are scored at once, in prompts
of 50 targets: a process that is ended later has its result, and the last such row is that of the best epoch. At the end some test targets
get a prompt each. Rows are appended as they come. The learning rate falls to zero at the last step or at the time limit, whichever comes
first, so a run that is cut short ends well too.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import SaveStrategy

from benchmarks.attention import STREAMING
from benchmarks.measuring import DEVICE, REHEARSING
from benchmarks.recording import RowFiles, make_parser, parse_measuring, read_rows
from benchmarks.synthetic import made_up_data, made_up_model
from dti_model.config import DTIConfig, ModelConfig, OptimConfig, TrainConfig
from dti_model.evaluation import click_metrics, eval_targets, item_user_auc, score_targets
from dti_model.model import EAGER, Parts, Run, compiled_parts
from dti_model.prompts import PackedPrompts, Prompts
from dti_model.training import RunLog, StreamTrainer, training_arguments

INSTRUCTION = "Films that one user rated, and whether the user liked each of them:\n"
# Targets of a prompt in validation and test.
STREAMING_K = 50
# Rows of a batch of scoring, which has no gradients: more than in training, so that the device is busy.
SCORED_TOKENS = 65536
# The most epochs of a run that chooses their number, and the seconds that it keeps for scoring after each.
MOST_EPOCHS, SCORING_S = 3, 20.0
# Of the speed that `benchmarks.bench_train_gpu` measures with bfloat16 weights and without a Trainer.
SHARE_OF_BF16_SPEED = 0.65
WARMUP = 0.05


@dataclass
class TimeLimit:
    """The end of a training: its steps, or the clock."""

    seconds: float
    start: float

    def left_s(self) -> float:
        """Seconds."""
        return self.start + self.seconds - time.monotonic()


class TimedTrainer(StreamTrainer):
    """Its learning rate rises, then falls as a cosine, over the share of steps or of time that is used, whichever is larger."""

    def __init__(self, *, limit: TimeLimit, **kwargs: Any) -> None:
        self.limit = limit
        self.first_step: float | None = None
        super().__init__(**kwargs)

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> LambdaLR:
        """Called by Trainer."""
        chosen: Any = optimizer or self.optimizer

        def rate(step: int) -> float:
            now = time.monotonic()
            if step and self.first_step is None:
                self.first_step = now
            used = 0.0 if self.first_step is None else now - self.first_step
            left = max(0.0, self.limit.left_s())
            return rate_after(max(step / max(1, num_training_steps), used / max(1e-9, used + left)))

        self.lr_scheduler = LambdaLR(chosen, rate)
        return self.lr_scheduler


def rate_after(share: float) -> float:
    """The learning rate's share of its peak after a share of the training."""
    if share < WARMUP:
        return share / WARMUP
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (share - WARMUP) / (1 - WARMUP))))


class Watch(TrainerCallback):
    """Ends training in time, notes every validation, and tests and keeps the weights of the best one after the first step."""

    def __init__(self, limit: TimeLimit, note: Callable[..., None], test: Callable[[], None]) -> None:
        self.limit, self.note, self.test = limit, note, test
        self.best_auc = -1.0
        self.best: dict[str, torch.Tensor] = {}
        self.cut = False

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.limit.left_s() < 0:
            self.cut = control.should_training_stop = True

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        metrics: dict[str, float] = kwargs["metrics"]
        model: torch.nn.Module = kwargs["model"]
        named = {name.removeprefix("eval_"): value for name, value in metrics.items()}
        named["epoch"] = round(state.epoch or 0.0, 3)
        self.note(part="validation", step=state.global_step, **named)
        if state.global_step and named["auc"] > self.best_auc:
            self.best_auc = named["auc"]
            self.best = {name: weight.detach().clone() for name, weight in model.state_dict().items()}
            self.test()


def settings(options: argparse.Namespace, epochs: int) -> TrainConfig:
    """Of the run; a rehearsal takes a few steps."""
    return TrainConfig(
        data=Path(options.data),
        out=Path("unused"),
        k=options.k,
        max_item_tokens=32,
        validation_k=STREAMING_K,
        max_eval_targets=200 if REHEARSING else 0,
        logging_steps=1 if REHEARSING else 10,
        report_to=(),
        progress=False,
        dti=DTIConfig(alpha_max=0.0),
        model=ModelConfig(
            pretrained=str(options.weights),
            finetune="full",
            instruction=INSTRUCTION,
            template=options.template,
        ),
        optim=OptimConfig(
            epochs=epochs,
            max_steps=3 if REHEARSING else 0,
            learning_rate=options.learning_rate,
            weight_decay=0.01,
            token_budget=4096 if REHEARSING else options.tokens,
            accumulation=options.accumulation,
            graphs=options.graphs,
            compile=options.compile,
            precision="bf16" if DEVICE == "cuda" else "fp32",
        ),
    )


def measured_speed(rows: Path, graphs: bool) -> float:
    """Rows a second of streaming training in the last row of `benchmarks.bench_train_gpu`; 0: there is none of a model of this size."""
    wanted = {
        "benchmark": "training",
        "model": "smollm",
        "kind": STREAMING,
        "way": "graph" if graphs else "eager",
    }
    found = [row.get("tokens_per_s") or 0 for row in read_rows(rows) if wanted.items() <= row.items()]
    return float(found[-1]) if found else 0.0


def epochs_that_fit(epoch_rows: int, rows_per_s: float, seconds: float) -> int:
    """One to `MOST_EPOCHS`: as many as end in time at a measured speed."""
    found = 1
    while found < MOST_EPOCHS:
        rows = (found + 1) * epoch_rows
        if rows > SHARE_OF_BF16_SPEED * rows_per_s * (seconds - (found + 1) * SCORING_S):
            break
        found += 1
    return found


def trainer_of(
    run: Run,
    limit: TimeLimit,
    watch: Watch,
    folder: str,
    rows: np.ndarray,
    speed: float | None = None,
    parts: Parts = EAGER,
) -> TimedTrainer:
    """Trainer over the run's packed prompts; it writes no checkpoints, into a folder that goes.

    Args:
        run: its settings' epochs are replaced where there is a speed.
        limit: when training ends.
        watch: validates, tests and keeps the best weights.
        folder: for what Trainer wants to write.
        rows: `(S,)` targets to train on.
        speed: rows a second, by which the epochs that fit are chosen; None: those of the settings.
        parts: of the layers around attention.
    """
    config, optim = run.config, run.config.optim
    prompts = Prompts.streaming(run.data, rows, config.window, config.targets_per_prompt)
    dataset = PackedPrompts(
        run.builder, prompts, optim.token_budget, config.seed, batch_multiple=optim.accumulation
    )
    if speed is not None:
        epochs = epochs_that_fit(int(dataset.num_rows.sum()), speed, limit.left_s())
        optim = replace(optim, epochs=epochs)
        run.config = config = replace(config, optim=optim)
    validation = eval_targets(run.data, "val", config)
    arguments = training_arguments(replace(config, out=Path(folder)))
    arguments.save_strategy, arguments.load_best_model_at_end = SaveStrategy.NO, False
    arguments.eval_on_start = True
    trainer = TimedTrainer(
        limit=limit,
        model=run.model,
        args=arguments,
        train_dataset=dataset,
        eval_dataset=dataset,  # Trainer wants one; `validate` knows the validation targets
        callbacks=[RunLog(False, item_user_auc(run.data, validation)), watch],
        dti=config.dti,
        answers=run.builder.format.labels,
        validate=lambda: scored(run, validation, STREAMING_K),
        graphs=optim.graphs,
        parts=parts,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer


def some_targets(run: Run, num_targets: int) -> np.ndarray:
    """`(S,)` training targets: whole streaming prompts of a seed, about so many targets; 0: all."""
    rows = run.data.targets("train")
    if not num_targets:
        return rows
    prompts = Prompts.streaming(run.data, rows, run.config.window, STREAMING_K)
    order = np.random.default_rng(run.config.seed).permutation(len(prompts))
    last = int(np.searchsorted(np.cumsum(prompts.num_targets[order]), num_targets)) + 1
    chosen = prompts[np.sort(order[:last])]
    return np.concatenate([np.arange(a, b) for a, b in zip(chosen.first_target, chosen.stop)])


def scored(run: Run, rows: np.ndarray, k: int) -> dict[str, float]:
    """Metrics of targets, `k` of them a prompt, and seconds."""
    start = time.monotonic()
    budget = max(SCORED_TOKENS, run.config.optim.token_budget)
    precision = run.config.optim.precision
    assert precision != "auto"
    scores = score_targets(run.model, run.config.dti, run.builder, rows, budget, k, precision=precision)
    metrics = click_metrics(run.data.label[rows], scores, run.data.users_of(rows))
    return {**metrics, "seconds": round(time.monotonic() - start, 2)}


def finetune(
    config: TrainConfig,
    limit: TimeLimit,
    files: RowFiles,
    num_targets: int,
    one_prompt_each: int,
    speed: float | None = None,
) -> None:
    """Train and score; every row says what the run is.

    Args:
        config: of the run.
        limit: when training ends.
        files: for the rows.
        num_targets: about how many training targets, 0 for all.
        one_prompt_each: how many test targets get a prompt of their own at the end, 0 for all.
        speed: as `trainer_of` takes it.
    """
    common: dict[str, Any] = {"benchmark": "finetune", "wanted_targets": num_targets}

    def note(**row: Any) -> None:
        files.append([{**common, **row}])
        print({name: value for name, value in row.items() if name != "losses"}, flush=True)

    set_seed(config.seed)
    parts = compiled_parts(torch.device(DEVICE)) if config.optim.compile else EAGER
    run = Run.start(config)
    rows = some_targets(run, num_targets)
    watch = Watch(limit, note, lambda: test(run, note, eval_targets(run.data, "test", config), STREAMING_K))
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(run, limit, watch, folder, rows, speed, parts)
        config = run.config
        dataset = trainer.train_dataset
        assert isinstance(dataset, PackedPrompts)
        common |= told(run, dataset)
        seconds = round(limit.seconds - limit.left_s(), 1)
        note(part="start", seconds=seconds, parameters=run.model.num_parameters())
        torch.cuda.reset_peak_memory_stats()
        start = time.monotonic()
        trainer.train()
        note(part="training", cut_by_time=watch.cut, **trained(trainer, time.monotonic() - start))
    run.model.load_state_dict(watch.best)
    few = 100 if REHEARSING else one_prompt_each
    test(run, note, eval_targets(run.data, "test", replace(config, max_eval_targets=few)), 1)


def told(run: Run, dataset: PackedPrompts) -> dict[str, Any]:
    """What every row says of its run."""
    config, rule = run.config, run.data.context_rule
    optim, model = config.optim, config.model
    said = {
        "data": run.data.stats["source"]["name"],
        "model": Path(str(model.pretrained)).name,
        "k": config.k,
    }
    said |= {"template": model.prompt_template, "contexts": "" if rule is None else rule["text"]}
    for name in ("graphs", "compile", "learning_rate", "token_budget", "accumulation", "epochs"):
        said[name] = getattr(optim, name)
    said |= {"epoch_steps": len(dataset) // optim.accumulation, "epoch_rows": int(dataset.num_rows.sum())}
    return {**said, "train_targets": int(dataset.prompts.num_targets.sum())}


def trained(trainer: TimedTrainer, seconds: float) -> dict[str, Any]:
    """Steps, losses and speed: the median over log lines, and in `settled_tokens_per_s` that of the last quarter of them together, when steps
    are captured and compiled."""
    lines = [line for line in trainer.state.log_history if "loss" in line]
    row: dict[str, Any] = {"steps": trainer.state.global_step, "seconds": round(seconds, 1)}
    for name in ("targets_per_s", "tokens_per_s", "mfu"):
        values = [line[name] for line in lines if name in line]
        row[name] = round(float(np.median(values)), 4) if values else None
    last = [line["tokens_per_s"] for line in lines[-max(1, len(lines) // 4) :] if "tokens_per_s" in line]
    row["settled_tokens_per_s"] = round(statistics.harmonic_mean(last)) if last else None
    row["graphs_captured"] = 0 if trainer.graphs is None else trainer.graphs.num_graphs
    row["peak_mib"] = round(torch.cuda.max_memory_allocated() / 2**20)
    row["losses"] = [[line["step"], round(line["loss"], 4)] for line in lines]
    return row


def test(run: Run, note: Callable[..., None], rows: np.ndarray, k: int) -> None:
    """Test targets with the weights that the model has, `k` of them a prompt, beside the baseline that reads no text."""
    line = item_user_auc(run.data, rows)
    note(part="test", test_k=k, item_user_auc=line, **scored(run, rows, k))


def main() -> None:
    """Fine-tune, print and keep the rows."""
    start = time.monotonic()
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--data", default="", help="folder made by `dti prepare`; a rehearsal can do without")
    add("--weights", default="", help="folder or GGUF file; a rehearsal can do without")
    add("--k", type=int, default=STREAMING_K, help="targets per prompt; 1: sliding windows")
    add("--epochs", type=int, default=1, help="0: as many as fit by the speed in rows of bench_train_gpu")
    add("--seconds", type=float, default=200.0, help="training ends this long after the start")
    add("--tokens", type=int, default=16384, help="rows of a packed batch")
    add("--learning-rate", type=float, default=2e-4)
    add("--graphs", action=argparse.BooleanOptionalAction, default=True, help="replay steps as CUDA graphs")
    add(
        "--template",
        help="of an interaction, as dti train's --model.template; default: that of pretrained models",
    )
    add("--compile", action="store_true", help="torch.compile the parts around attention: optim.compile")
    add("--targets", type=int, default=0, help="about so many training targets; 0: all")
    add("--accumulation", type=int, default=1, help="packed batches per step")
    add("--one-prompt-each", type=int, default=6000, help="test targets with a prompt each; 0: all")
    options = parse_measuring(parser, "finetune-gpu")
    if not REHEARSING and not (options.data and options.weights):
        parser.error("--data and --weights are needed")
    with tempfile.TemporaryDirectory() as folder:
        if not (options.data and options.weights):
            options.data = options.data or made_up_data(Path(folder))
            options.weights = options.weights or made_up_model(Path(folder) / "model", Path(options.data))
        try:
            config = settings(options, options.epochs or 1)
        except ValueError as error:
            parser.error(str(error))
        speed = None if options.epochs else measured_speed(options.rows.paths[0], options.graphs)
        finetune(
            config,
            TimeLimit(options.seconds, start),
            options.rows,
            options.targets,
            options.one_prompt_each,
            speed,
        )


if __name__ == "__main__":
    main()
