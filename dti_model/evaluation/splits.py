"""A split of a run: its targets, their scores and metrics, and the file of predictions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from dti_model.config import TrainConfig
from dti_model.data import SPLIT_CODES, PreparedData
from dti_model.devices import device_of_rank, precision_of_ranks, say_precision
from dti_model.evaluation.baselines import baseline_metrics
from dti_model.evaluation.metrics import click_metrics, probability_metrics
from dti_model.evaluation.scoring import score_targets
from dti_model.files import whole_file, without_nan
from dti_model.model import Run
from dti_model.precision import DEFAULT, Precision

OLDER_PREDICTION_COLUMNS = ["user", "item", "timestamp", "label", "probability"]
PREDICTION_COLUMNS = [*OLDER_PREDICTION_COLUMNS, "raw_probability"]


def eval_targets(data: PreparedData, split: str, config: TrainConfig) -> npt.NDArray[np.int64]:
    """The rows of a split that a run is measured on, in the order of `data.targets`: all, or `max_eval_targets` drawn by the seed."""
    rows, limit = data.targets(split), config.max_eval_targets
    if not limit or len(rows) <= limit:
        return rows
    rng = np.random.default_rng([config.seed, SPLIT_CODES[split]])
    return rows[np.sort(rng.choice(len(rows), limit, replace=False))]


def score_split(
    run: Run, split: str, k: int | None = 1, progress: bool = False, strict_time: bool = False
) -> npt.NDArray[np.float64]:
    """Click probabilities in the order of `eval_targets`, from prompts of `k` targets (None: whole histories), in the run's precision.

    `strict_time`: without context of a target's own time stamp, k = 1. They are the model's own, before the run's calibration.
    """
    return score_targets(
        run.model,
        run.config.dti,
        run.builder,
        eval_targets(run.data, split, run.config),
        token_budget=run.config.optim.token_budget,
        k=k,
        progress=f"scoring {split}" if progress else None,
        precision=run.precision,
        strict_time=strict_time,
    )


def split_metrics(run: Run, split: str, probabilities: npt.NDArray[np.float64]) -> dict[str, float]:
    """`click_metrics` of the scores of a split, after the run's calibration where it has one."""
    rows = eval_targets(run.data, split, run.config)
    labels, users = run.data.label[rows], run.data.users_of(rows)
    return click_metrics(labels, run.calibrated(probabilities), users, order=probabilities)


def calibration_facts(run: Run, scores: Mapping[str, npt.NDArray[np.float64]]) -> dict[str, Any]:
    """What metrics.json says of a run's calibration: its numbers, and log loss and ECE without and with it.

    Args:
        run: with a calibration.
        scores: results of `score_split` by split.
    """
    assert run.calibration is not None
    labels = {split: run.data.label[eval_targets(run.data, split, run.config)] for split in scores}
    return {
        **asdict(run.calibration),
        "before": {split: probability_metrics(labels[split], scores[split]) for split in scores},
        "after": {
            split: probability_metrics(labels[split], run.calibrated(scores[split])) for split in scores
        },
    }


def write_predictions(run: Run, path: Path, split: str, probabilities: npt.NDArray[np.float64]) -> None:
    """Write one Parquet row per target, in a file that appears when complete.

    `probability` is after the run's calibration, `raw_probability` before; without one they are the same.
    """
    data, rows = run.data, eval_targets(run.data, split, run.config)
    users = np.asarray(data.user_ids, object)[data.users_of(rows)]
    items = np.asarray(data.item_ids, object)[data.item[rows]]
    names = [pa.array(each, pa.large_string()) for each in (users, items)]
    columns = [*names, data.timestamp[rows], data.label[rows]]
    columns += [run.calibrated(probabilities), probabilities]
    table = pa.table(dict(zip(PREDICTION_COLUMNS, columns, strict=True)))
    with whole_file(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def evaluate_run(
    folder: Path,
    data_folder: Path | None,
    split: str,
    device: str | None = None,
    progress: bool = True,
    k: int | None = 1,
    other_data: bool = False,
    base: str | None = None,
    precision: Precision = DEFAULT,
    calibration: bool = True,
    strict_time: bool = False,
) -> dict[str, Any]:
    """Score a split with a trained run, and the baselines on the same targets.

    Args:
        folder: the run folder.
        data_folder: as in `Run.load`, like `other_data`, `base` and the errors.
        split: "val" or "test".
        device: of this process; of several processes, which share the work, its type alone.
        progress: show a bar.
        k: targets per prompt; None: whole histories.
        precision: to compute in, alike on all ranks; it need not be that of the training.
        calibration: use the run's, where it has one.
        strict_time: leave out of every target's context what shares its time stamp.

    Returns:
        Metrics under the name of the split, those of the baselines, the calibration if one was used, the precision, and the run's provenance.

    Raises:
        ValueError: `precision` auto is another one on another rank, or `strict_time` is asked with another k than 1.
    """
    if strict_time and k != 1:
        raise ValueError(
            f"strict_time gives every target a prompt of its own, so k must be 1, got {0 if k is None else k}"
        )
    device = device_of_rank(device)
    run = Run.load(folder, data_folder, device, other_data, base, calibration)
    run.precision = precision_of_ranks(precision, device, "--precision")
    say_precision(precision, device, "--precision")
    scores = score_split(run, split, k, progress, strict_time)
    baselines = baseline_metrics(run.data, split, eval_targets(run.data, split, run.config))
    result = {
        split: split_metrics(run, split, scores),
        "baselines": {split: baselines},
        **({} if run.calibration is None else {"calibration": calibration_facts(run, {split: scores})}),
        **({"strict_time": True} if strict_time else {}),
        "precision": run.precision,
        "provenance": asdict(run.provenance),
    }
    return dict(without_nan(result))
