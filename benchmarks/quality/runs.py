"""One training run of the quality benchmark: a cell, its folder, its scores.

A cell is every setting that decides a result. Its name is a digest of them, so plans that ask for the same cell share one run,
and a benchmark that was killed goes on with the cells that are missing. A finished cell's folder holds the model, `cell.json`
(settings, facts and metrics) and the validation scores; test scores are added only by a final table.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from transformers import set_seed

from dti_model.config import DTIConfig, ModelConfig, OptimConfig, TrainConfig
from dti_model.data import COLUMNS, CONTEXT, SPLIT_CODES, STATS_FILE, PreparedData, write_stats, write_table
from dti_model.evaluation import click_metrics, score_targets
from dti_model.files import whole_folder, write_json
from dti_model.model import MODEL_FOLDER, Run, apply_dti, model_from
from dti_model.precision import Resolved
from dti_model.prompts import PackedPrompts, Prompts
from dti_model.training import StreamTrainer, trainer_of, training_arguments

CELL_FILE = "cell.json"
SCORING_BUDGET = 8192


@dataclass(frozen=True)
class Cell:
    """Settings of one run."""

    k: int  # targets per prompt; 1 sliding windows, 0 whole histories
    seed: int = 0  # of weights and shuffles
    train_targets: int = 0  # users in random order train until there are this many targets; 0: all
    # of an optimizer step, about; the same for every k, unless one prompt holds more
    targets_per_step: int = 128
    mixed: bool = True  # batches mix users; False: a batch holds prompts of as few users as possible
    dti: DTIConfig = field(default_factory=DTIConfig)  # what [SUM] rows get
    model: ModelConfig = field(default_factory=ModelConfig)  # the network
    epochs: int = 2  # passes over the training targets
    learning_rate: float = 2e-3  # peak
    weight_decay: float = 0.1  # on matrices
    precision: Resolved | None = None  # fp32 or bf16; None: fp32, and bf16 at the paper's own size
    # of the validation targets, at random: the best epoch is chosen on them; None: the size's
    val_share: float | None = None

    @property
    def computes_in(self) -> Resolved:
        """The precision of training and of the scores that the run is judged by."""
        return self.precision or "fp32"

    @property
    def name(self) -> str:
        """Digest of the settings that are not None: a setting that is None came later, and finished runs keep their names."""
        settings = {key: value for key, value in asdict(self).items() if value is not None}
        if settings["model"]["template"] is None:
            del settings["model"]["template"]
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def restrict_targets(
    source: Path, out: Path, train_targets: int, val_share: float, test_share: float, seed: int = 0
) -> None:
    """A prepared folder with fewer targets: whole users for training, every n-th target for validation and test.

    Histories stay whole: what is no target any more is context. All users of the validation and test splits stay, since
    differences are judged by user.

    Args:
        source: prepared folder.
        out: prepared folder to make; kept as it is where it exists.
        train_targets: users in random order keep their training targets until there are this many.
        val_share: share of the validation targets, at random.
        test_share: share of the test targets, at random.
        seed: of the random order.
    """
    if (out / STATS_FILE).exists():
        return
    data = PreparedData.open(source)
    rng = np.random.default_rng(seed)
    split = np.array(data.split)
    train = data.targets("train")
    rank_of_user = rng.permutation(data.num_users)[data.users_of(train)]
    last = np.sort(rank_of_user)[min(train_targets or len(train), len(train)) - 1]
    split[train[rank_of_user > last]] = CONTEXT
    for name, share in (("val", val_share), ("test", test_share)):
        rows = data.targets(name)
        dropped = rng.permutation(rows)[round(share * len(rows)) :]
        split[dropped] = CONTEXT
    columns = {name: pa.array(getattr(data, name), kind) for name, kind in COLUMNS.items()}
    columns["split"] = pa.array(split, COLUMNS["split"])
    stats = dict(data.stats)
    stats["splits"] = {
        name: {
            "targets": int((split == code).sum()),
            "base_rate": float(np.asarray(data.label)[split == code].mean()),
        }
        for name, code in SPLIT_CODES.items()
    }
    stats["splits"]["context"] = {"interactions": int((split == CONTEXT).sum())}
    with whole_folder(out) as temporary:
        shutil.copytree(source, temporary, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".*"))
        write_table(pa.table(columns), temporary / "interactions.arrow")
        write_stats(temporary, stats)


class UserBatches(PackedPrompts):
    """Batches of consecutive prompts, so of as few users as possible: as correlated as those of whole histories."""

    def set_epoch(self, epoch: int) -> None:
        """Cut the prompts, users in order, into batches of about equal size; shuffle the batches."""
        rng = np.random.default_rng([self.seed, epoch])
        middle = np.cumsum(self.num_rows) - self.num_rows / 2
        batch_of = (middle * self.num_batches / self.num_rows.sum()).astype(np.int64)
        plan = np.split(np.arange(len(batch_of)), np.flatnonzero(np.diff(batch_of)) + 1)
        self.num_batches = len(plan)
        self.plan = [plan[i] for i in rng.permutation(len(plan))]


def train_config(cell: Cell, data: Path, out: Path) -> TrainConfig:
    """A cell as settings of `dti train`; the token budget holds `targets_per_step` targets, or the longest prompt."""
    config = TrainConfig(
        data=data,
        out=out,
        k=cell.k,
        validation_k=1,
        seed=cell.seed,
        progress=False,
        report_to=(),
        dti=cell.dti,
        model=cell.model,
        optim=OptimConfig(
            epochs=cell.epochs,
            learning_rate=cell.learning_rate,
            weight_decay=cell.weight_decay,
            patience=0,
            precision=cell.computes_in,
        ),
    )
    run = Run.start(config)
    prompts = Prompts.streaming(run.data, run.data.targets("train"), config.window, config.targets_per_prompt)
    rows = run.builder.num_rows(prompts)
    budget = max(int(cell.targets_per_step * rows.sum() / prompts.num_targets.sum()), int(rows.max()))
    return replace(config, optim=replace(config.optim, token_budget=budget))


def started(config: TrainConfig) -> tuple[Run, StreamTrainer, PackedPrompts]:
    """A run with its trainer and its prompts, from its seed, before the first step."""
    torch.use_deterministic_algorithms(True)
    set_seed(config.seed)
    run = Run.start(config)
    trainer = trainer_of(run, training_arguments(config))
    dataset = trainer.train_dataset
    assert isinstance(dataset, PackedPrompts)
    return run, trainer, dataset


def run_cell(cell: Cell, data: Path, folder: Path) -> dict[str, Any]:
    """Train a cell and score validation, unless that is done; the content of its `cell.json`."""
    path = folder / CELL_FILE
    if path.exists():
        return _read(path)
    shutil.rmtree(folder, ignore_errors=True)  # a killed run starts again: cells are short
    config = train_config(cell, data, folder)
    run, trainer, dataset = started(config)
    if not cell.mixed:
        dataset = UserBatches(run.builder, dataset.prompts, dataset.token_budget, cell.seed)
        trainer.train_dataset = dataset
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    run.save_model(folder / MODEL_FOLDER)
    config.save(folder)
    result = {
        "settings": asdict(cell),
        "train_targets": int(dataset.prompts.num_targets.sum()),
        "rows_per_target": round(float(dataset.num_rows.sum() / dataset.prompts.num_targets.sum()), 3),
        "steps": trainer.state.global_step,
        "seconds": round(seconds, 1),
        "val_by_epoch": [round(e["eval_auc"], 5) for e in trainer.state.log_history if "eval_auc" in e],
        "scores": {"val": _score(run, folder, "val", "val", cell.computes_in)},
    }
    write_json(path, result)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return result


def score_cell(
    folder: Path,
    name: str,
    split: str,
    precision: Resolved,
    k: int | None = 1,
    dti: DTIConfig | None = None,
) -> None:
    """Score a split with a finished cell, unless that is done; scores and metrics go under `name`.

    Args:
        folder: of the cell.
        name: of the scores.
        split: which targets.
        precision: to compute in, fp32 or bf16.
        k: targets per prompt; None: whole histories.
        dti: read with other fixes than those trained with.
    """
    result = _read(folder / CELL_FILE)
    if name in result["scores"]:
        return
    run = Run.load(folder)
    if dti is not None:
        model = apply_dti(model_from(folder / MODEL_FOLDER), dti)
        torch.nn.Module.to(model, run.model.device)
        run = replace(run, model=model, config=replace(run.config, dti=dti))
    result["scores"][name] = _score(run, folder, name, split, precision, k)
    write_json(folder / CELL_FILE, result)


def _score(
    run: Run, folder: Path, name: str, split: str, precision: Resolved, k: int | None = 1
) -> dict[str, float]:
    """Metrics of the scores as trained: runs are compared without a calibration."""
    rows = run.data.targets(split)
    scores = score_targets(
        run.model, run.config.dti, run.builder, rows, SCORING_BUDGET, k, precision=precision
    )
    np.save(folder / f"{name}.npy", scores)
    metrics = click_metrics(run.data.label[rows], scores, run.data.users_of(rows))
    return {key: round(value, 5) for key, value in metrics.items()}


def scores_of(folder: Path, name: str) -> npt.NDArray[np.float64]:
    """Scores that were kept under a name, in the order of the split's targets."""
    scores: npt.NDArray[np.float64] = np.load(folder / f"{name}.npy")
    return scores


def _read(path: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(path.read_text())
    return result
