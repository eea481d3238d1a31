"""New days: a model that goes on with each day's targets, beside one that is trained anew every day and one that is left alone.

    python -m benchmarks.bench_days --data DIR [--first 2000-12-08] [--days 6] [--period 1] [--record] [--size smoke]

`--data` is a prepared folder with dates, made for half of ML-1M. What came before `--first` is prepared as a log of one's own (`dti prepare
custom`) and trains the first model. Then day after day is added to it (`--extend`), and every model is scored on the day after the one
that it was trained to, with streaming prompts:

    continued    the model of the day before, on the targets that are new (`--init`), for `--continue-epochs` at `--continue-rate`
    anew         all training targets so far, for `--epochs` at `--rate`
    left alone   the first model

A day is a period of `--period` days, since some logs have few interactions on one. All is done from `--seeds` seeds: of two models that are
trained alike one is often better by more than a day is worth. Compared is the mean AUC over the targets of all days, with 95 % bootstrap
intervals over users and seeds, and the seconds from a prepared folder to a saved model. The run ends with "doubtful" (76) unless
continuing costs at most a tenth and loses at most .002. Killed and started again, it goes on with the models that are missing; the
folder of another run's models is refused.
"""

from __future__ import annotations

import csv
import datetime
import json
import shutil
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers.utils import logging

from benchmarks.quality import Floats, auc_difference, started
from benchmarks.recording import DOUBTFUL, SCRATCH, Rows, make_parser, parse_measuring
from dti_model.config import ModelConfig, OptimConfig, TrainConfig
from dti_model.data import CONTEXT, STATS_FILE, Clock, PreparedData
from dti_model.evaluation import click_metrics, score_targets
from dti_model.files import without_nan, write_json
from dti_model.model import MODEL_FOLDER, Run

ARMS = CONTINUED, ANEW, ALONE = "continued", "anew", "left alone"
NOTHING = {"seconds": 0.0, "trained_targets": 0, "tokens": 0}
MOST_COST, MOST_LOSS = 0.1, 0.002
SMOKE: dict[str, Any] = {"layers": 1, "width": 16, "days": 2, "epochs": 1, "vocab": 300}
SMOKE |= {"token_budget": 400, "continue_budget": 400, "runs": SCRATCH / "days-smoke"}
_DAY = 86_400
_SETTINGS = [
    *("first", "period", "days", "k", "window", "seeds", "epochs", "rate", "token_budget"),
    *("continue_epochs", "continue_rate", "continue_budget", "context_text", "title_tokens"),
    *("layers", "width", "vocab", "precision"),
]
_METRICS = ("auc", "log_loss", "gauc")


@dataclass(frozen=True)
class Recipe:
    """How a model is trained.

    Attributes:
        epochs: passes over its targets.
        rate: peak of the learning rate.
        token_budget: rows of a batch.
    """

    epochs: int
    rate: float
    token_budget: int


@dataclass(frozen=True)
class Days:
    """Interactions of a data set by periods of equal length: 0 is before `first`, and -1 all that came before it.

    Attributes:
        source: the data set.
        seconds: of every row.
        first: the second at which period 1 begins.
        period: its length in seconds.
    """

    source: PreparedData
    seconds: npt.NDArray[np.int64]
    first: int
    period: int

    @staticmethod
    def of(source: PreparedData, first: datetime.datetime, period: float) -> Days:
        """Of a data set; `period` in days."""
        seconds = Clock.of(source.stats, str(source.path)).seconds(source.timestamp)
        return Days(source, seconds, int(first.timestamp()), round(period * _DAY))

    def bounds(self, day: int) -> tuple[int, int]:
        """The first second of a period, and that of the next one."""
        start = self.first + (day - 1) * self.period
        return (-(2**62) if day < 0 else start), start + self.period

    def name(self, day: int) -> str:
        """The date on which a period begins."""
        return datetime.datetime.fromtimestamp(self.bounds(day)[0], datetime.UTC).date().isoformat()

    def write(self, day: int, folder: Path) -> dict[str, Path]:
        """The log and the items of a period, as files of one's own."""
        low, high = self.bounds(day)
        rows = np.flatnonzero((self.seconds >= low) & (self.seconds < high))
        if not rows.size:
            raise ValueError(f"the period from {self.name(day)} has no interaction: choose another --first")
        data = self.source
        users, items = np.array(data.user_ids, object), np.array(data.item_ids, object)
        columns = users[data.users_of(rows)], items[data.item[rows]], data.rating[rows], self.seconds[rows]
        folder.mkdir(parents=True, exist_ok=True)
        files = {"interactions": folder / "log.csv", "items": folder / "items.csv"}
        for path, head, lines in (
            (files["interactions"], ("user", "item", "rating", "timestamp"), zip(*columns)),
            (files["items"], ("item", "text_of_item"), zip(data.item_ids, data.item_texts)),
        ):
            with path.open("w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                writer.writerow(head)
                writer.writerows(lines)
        return files

    def targets(self, data: PreparedData, day: int) -> npt.NDArray[np.int64]:
        """Rows of a folder that are targets of a period."""
        low, high = self.bounds(day)
        rows = np.flatnonzero((data.timestamp >= low) & (data.timestamp < high))
        targets: npt.NDArray[np.int64] = rows[data.split[rows] != CONTEXT]
        return targets


class Bench:
    """Folders and models of all days, each made once."""

    def __init__(self, days: Days, out: Path, options: Namespace) -> None:
        self.days, self.out, self.options = days, out, options
        self.recipes = {
            ANEW: Recipe(options.epochs, options.rate, options.token_budget),
            CONTINUED: Recipe(options.continue_epochs, options.continue_rate, options.continue_budget),
        }

    def data_of(self, day: int) -> Path:
        """The prepared folder that ends with a period."""
        folder = self.out / f"data-{day}"
        if (folder / STATS_FILE).exists():
            return folder
        from dti_model.data import CustomFiles, extend, files_like, prepare  # making folders needs polars

        files = self.days.write(day, self.out / f"log-{day}")
        if day < 0:
            stats = self.days.source.stats
            clicks = {"rating": "rating", "threshold": stats["threshold"]}
            log = CustomFiles(
                files["interactions"],
                files["items"],
                "{text_of_item}",
                **clicks,
                max_chars=500,
            )
            texts = {"context_text": self.options.context_text, "title_tokens": self.options.title_tokens}
            prepare(log, folder, min_context=stats["min_context"], vocab_size=self.options.vocab, **texts)
        else:
            older = self.data_of(day - 1)
            extend(older, files_like(older, **files), folder)
        return folder

    def labels_and_users(self, day: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.object_]]:
        """Of the targets of a period."""
        data = PreparedData.open(self.data_of(day))
        rows = self.days.targets(data, day)
        return data.label[rows].astype(np.int64), np.array(data.user_ids, object)[data.users_of(rows)]

    def run_of(self, arm: str, day: int, seed: int) -> Path:
        """The run of an arm that is trained up to a period; the first model is that of all arms of a seed."""
        return self.out / f"seed-{seed}" / ("first" if day == 0 or arm == ALONE else f"{arm}-{day}")

    def train(self, arm: str, day: int, seed: int) -> dict[str, Any]:
        """Train a model, unless that is done; what it cost."""
        folder = self.run_of(arm, day, seed)
        path = folder / "cost.json"
        if path.exists():
            found: dict[str, Any] = json.loads(path.read_text())
            return found
        shutil.rmtree(folder, ignore_errors=True)
        config = self._config(arm, day, seed)
        start = time.perf_counter()
        run, trainer, dataset = started(config)
        trainer.train()
        run.save_model(folder / MODEL_FOLDER)
        seconds = time.perf_counter() - start
        config.save(folder)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        epochs = config.optim.epochs
        cost = {
            "seconds": round(seconds, 2),
            "trained_targets": epochs * int(run.train_targets.size),
            "tokens": epochs * int(dataset.num_rows.sum()),
            "steps": trainer.state.global_step,
            "precision": run.precision,
        }
        write_json(path, cost)
        return cost

    def _config(self, arm: str, day: int, seed: int) -> TrainConfig:
        options, recipe = self.options, self.recipes[arm]
        return TrainConfig(
            data=self.data_of(day),
            out=self.run_of(arm, day, seed),
            init=self.run_of(arm, day - 1, seed) if arm == CONTINUED else None,
            k=options.k,
            window=options.window,
            validation_k=options.k,
            seed=seed,
            progress=False,
            logging_steps=10**6,
            report_to=(),
            model=ModelConfig(layers=options.layers, width=options.width),
            optim=OptimConfig(
                epochs=recipe.epochs,
                learning_rate=recipe.rate,
                token_budget=recipe.token_budget,
                precision=options.precision,
                patience=0,
            ),
        )

    def score(self, arm: str, day: int, seed: int) -> Floats:
        """Probabilities of the targets of a period, from the model of the period before."""
        run = Run.load(self.run_of(arm, day - 1, seed), self.data_of(day), other_data=True)
        rows = self.days.targets(run.data, day)
        return score_targets(run.model, run.config.dti, run.builder, rows, k=self.options.k, precision="fp32")


def play(bench: Bench) -> Iterator[dict[str, Any]]:
    """Train and score day after day, seed after seed; a row for every arm, day and seed, then one for every arm, and their differences."""
    seeds, num_days = range(bench.options.seeds), bench.options.days
    scores: dict[str, list[Floats]] = {arm: [] for arm in ARMS}
    costs: dict[str, Rows] = {arm: [] for arm in ARMS}
    labels, ids = zip(*(bench.labels_and_users(day + 1) for day in range(1, num_days + 1)))
    of_all, users = np.concatenate(labels), np.unique(np.concatenate(ids), return_inverse=True)[1]
    users_by_day = np.split(users, np.cumsum([len(x) for x in labels])[:-1])
    for seed in seeds:
        first = bench.train(ANEW, 0, seed)
        print(f"first model: {first['trained_targets']:,} targets, {first['seconds']:.0f} s", flush=True)
        found: dict[str, list[Floats]] = {arm: [] for arm in ARMS}
        for day, (label, user) in enumerate(zip(labels, users_by_day), 1):
            for arm in ARMS:
                costs[arm].append(NOTHING if arm == ALONE else bench.train(arm, day, seed))
            for arm in ARMS:
                found[arm].append(bench.score(arm, day + 1, seed))
                metrics = click_metrics(label, found[arm][-1], user)
                row = {"benchmark": "days", "arm": arm, "day": bench.days.name(day + 1), "seed": seed}
                row |= {"targets": len(label), **_rounded(metrics), **costs[arm][-1]}
                print(
                    f"{row['day']} {arm:12} AUC {row['auc']:.4f}, log loss {row['log_loss']:.4f}, trained on "
                    f"{row['trained_targets']:,} targets in {row['seconds']:.1f} s",
                    flush=True,
                )
                yield row
        for arm in ARMS:
            scores[arm].append(np.concatenate(found[arm]))
    yield from _compared(of_all, users, scores, costs)


def _compared(
    labels: npt.NDArray[np.int64],
    users: npt.NDArray[np.int64],
    scores: dict[str, list[Floats]],
    costs: dict[str, Rows],
) -> Iterator[dict[str, Any]]:
    """Rows of every arm over all days, the mean of its seeds, and of the differences from training anew."""
    mean = {arm: _mean_cost(costs[arm]) for arm in ARMS}
    for arm in ARMS:
        seeds = [click_metrics(labels, found, users) for found in scores[arm]]
        metrics = {name: float(np.mean([one[name] for one in seeds])) for name in _METRICS}
        yield {
            "benchmark": "days-total",
            "arm": arm,
            "targets": len(labels),
            **_rounded(metrics),
            **mean[arm],
        }
    for arm in (CONTINUED, ALONE):
        difference = auc_difference(labels, users, scores[arm], scores[ANEW])
        yield {
            "benchmark": "days-difference",
            "arm": arm,
            "against": ANEW,
            "auc_difference": round(difference.value, 5),
            "low": round(difference.low, 5),
            "high": round(difference.high, 5),
            "share_of_seconds": round(mean[arm]["seconds"] / mean[ANEW]["seconds"], 4),
            "share_of_targets": round(mean[arm]["trained_targets"] / mean[ANEW]["trained_targets"], 5),
        }


def _rounded(metrics: dict[str, float]) -> dict[str, Any]:
    kept: dict[str, Any] = without_nan({name: metrics[name] for name in _METRICS})
    return {name: value if value is None else round(value, 5) for name, value in kept.items()}


def _mean_cost(costs: Rows) -> dict[str, float]:
    names = ("seconds", "trained_targets", "tokens")
    return {name: round(float(np.mean([cost[name] for cost in costs])), 2) for name in names}


def verdict(rows: Rows) -> tuple[str, bool]:
    """Whether continuing is as cheap and as good as it shall be, in a line."""
    (row,) = (x for x in rows if x["benchmark"] == "days-difference" and x["arm"] == CONTINUED)
    cost, loss = row["share_of_seconds"], -row["auc_difference"]
    holds = cost <= MOST_COST and loss <= MOST_LOSS
    said = f"continuing costs {cost:.3f} of training anew per day (at most {MOST_COST:g}) and loses {loss:.4f} AUC (at most {MOST_LOSS:g})"
    return f"{said}: {'it holds' if holds else 'it does not hold'}", holds


def claim(folder: Path, settings: dict[str, Any]) -> None:
    """Write down what a folder's models are made with; more days and seeds may come to it.

    Raises:
        SystemExit: it has models that were made otherwise.
    """
    kept = {name: value for name, value in settings.items() if name not in ("days", "seeds")}
    kept = json.loads(json.dumps(kept))
    path = folder / "settings.json"
    if not path.exists() and not any(folder.glob("data-*")):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, kept)
        return
    found = json.loads(path.read_text()) if path.exists() else {}
    changed = sorted(name for name in kept.keys() | found.keys() if kept.get(name) != found.get(name))
    if changed:
        raise SystemExit(
            f"{folder} has models of other settings ({', '.join(changed)}): delete it, or name another folder with --runs"
        )


def _options() -> Namespace:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder made by `dti prepare`")
    text = "the day, or moment, from which on models go on or are trained anew; default: %(default)s"
    add("--first", default="2000-12-08", help=text)
    add("--period", type=float, default=1, metavar="DAYS", help="length of a day of this benchmark; default: %(default)s")  # fmt: skip
    for name, default, text in (
        ("days", 6, "days that are trained on, each scored on the next one"),
        ("layers", 2, "of the model"),
        ("width", 128, "of the model"),
        ("k", 50, "targets per prompt, in training and scoring"),
        ("epochs", 2, "of a model that is trained anew"),
        ("continue-epochs", 1, "over the new targets"),
        ("token-budget", 8192, "rows of a batch of a model that is trained anew"),
        ("continue-budget", 4096, "rows of a batch of one that goes on"),
        ("vocab", 4096, "of the tokenizer"),
        ("seeds", 3, "so many, from 0 on"),
        ("window", 20, "interactions before a target that it may use"),
        ("title-tokens", 0, "so many titles are a token each"),
    ):
        add(f"--{name}", type=int, default=default, help=f"{text}; default: %(default)s")
    for name, number in (("rate", 2e-3), ("continue-rate", 3e-5)):
        add(f"--{name}", type=float, default=number, help="peak of the learning rate; default: %(default)s")
    add("--context-text", help='behind every item, as dti prepare takes it: "{item_rate}"; default: none')
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="of training")
    add("--runs", type=Path, default=SCRATCH / "days", help="folder of data and models; default: %(default)s")
    return parse_measuring(parser, "days", smoke=SMOKE)


def main() -> int:
    """Parse, play, write down."""
    options = _options()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    first = datetime.datetime.fromisoformat(options.first).replace(tzinfo=datetime.UTC)
    days = Days.of(PreparedData.open(options.data), first, options.period)
    settings = {name: getattr(options, name) for name in _SETTINGS}
    settings["data"] = days.source.stats["source"]["name"]
    claim(options.runs, {**settings, "source": days.source.stats["source"]})
    rows = [{**row, "settings": settings} for row in play(Bench(days, options.runs, options))]
    options.rows.keep(rows)
    said, holds = verdict(rows)
    print(said)
    return 0 if holds or options.size == "smoke" else DOUBTFUL


if __name__ == "__main__":
    sys.exit(main())
