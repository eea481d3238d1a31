"""The results of a finished run besides its model: metrics, predictions, a plot, and their checksums."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dti_model.config import CONFIG_FILE, MORE_IS_BETTER, Metric
from dti_model.evaluation import (
    baselines_of_splits,
    calibration_facts,
    eval_targets,
    fit_calibration,
    metrics_table,
    plot_report,
    score_split,
    sentence_about_baselines,
    split_metrics,
    write_predictions,
)
from dti_model.files import CHECKSUMS_FILE, sha256_of, whole_file, without_nan, write_sealed
from dti_model.model import Run
from dti_model.prompts import PackedPrompts, Prompts
from dti_model.ranks import first_rank_does, world_size
from dti_model.training.compare import Kind, measure_training
from dti_model.training.start import METRICS_FILE, REPORT_FILE, check_results_are_ours
from dti_model.training.trainer import StreamTrainer

Scores = dict[str, npt.NDArray[np.float64]]


def score_at_end(run: Run) -> Scores:
    """Score with all ranks, and give the run the calibration that rank 0 fits to validation, where its settings want one.

    It comes before the model is saved, which keeps the calibration.

    Returns:
        Scores by split, in the order of `eval_targets`, not calibrated.
    """
    splits = ("test", "val") if run.config.score_test else ("val",)
    scores = {split: score_split(run, split, progress=run.config.progress) for split in splits}
    if run.config.calibrate:
        labels = run.data.label[eval_targets(run.data, "val", run.config)]
        run.calibration = first_rank_does(lambda: fit_calibration(labels, scores["val"]))
    return scores


def finish(run: Run, trainer: StreamTrainer, scores: Scores) -> dict[str, Any]:
    """Rank 0 writes everything down. Gives the content of metrics.json."""
    result: dict[str, Any] = first_rank_does(lambda: _write_results(run, trainer, scores))
    return result


def _write_results(run: Run, trainer: StreamTrainer, scores: Scores) -> dict[str, Any]:
    """Write all files, metrics.json last: a folder with one is finished.

    Raises:
        RunExistsError: somebody's own file came into the place of one of these; it is untouched.
        WriteError: the disk is full.
    """
    config, data = run.config, run.data
    check_results_are_ours(config.out)  # hours after the first look
    result: dict[str, Any] = {split: split_metrics(run, split, scores[split]) for split in scores}
    rows = {split: eval_targets(data, split, config) for split in scores}
    result["baselines"] = baselines_of_splits(data, rows)
    for split in scores:
        write_predictions(run, config.out / f"predictions-{split}.parquet", split, scores[split])
    if run.calibration is not None:
        result["calibration"] = calibration_facts(run, scores)
    result["training"] = _training_facts(run, trainer)
    last = next(iter(scores))  # test, where it is scored
    with whole_file(config.out / REPORT_FILE) as temporary:
        plot_report(
            temporary,
            trainer.state.log_history,
            data.label[rows[last]],
            run.calibrated(scores[last]),
            result["baselines"],
            raw=None if run.calibration is None else scores[last],
            split=last,
        )
    result["provenance"] = asdict(run.provenance)
    result = dict(without_nan(result))
    with whole_file(config.out / METRICS_FILE) as temporary:
        temporary.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")
        _write_checksums(config.out, [*scores], temporary)
    print(metrics_table(result))
    print(sentence_about_baselines(result[last], result["baselines"][last]))
    return result


def _write_checksums(folder: Path, splits: Sequence[str], metrics: Path) -> None:
    """Of the files in a run folder itself; `model/` and the checkpoints have their own.

    `metrics` is metrics.json before it has its name: with that the folder is finished, so this comes first.
    """
    names = [CONFIG_FILE, REPORT_FILE, *(f"predictions-{split}.parquet" for split in sorted(splits))]
    paths = {name: folder / name for name in names}
    paths[METRICS_FILE] = metrics
    files = {name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for name, path in paths.items()}
    write_sealed(folder / CHECKSUMS_FILE, {"files": files})


def _training_facts(run: Run, trainer: StreamTrainer) -> dict[str, Any]:
    """Tokens trained, tokens that sliding-window prompts would have needed, and the speed of both where it was measured."""
    config, dataset, state = run.config, trainer.train_dataset, trainer.state
    assert isinstance(dataset, PackedPrompts)
    rows = run.train_targets
    sliding = run.builder.num_rows(Prompts.streaming(run.data, rows, config.window, 1)).sum()
    epochs = state.global_step / (len(dataset) / config.optim.accumulation / world_size())
    trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    facts: dict[str, Any] = {
        "parameters": trained,
        "frozen_parameters": sum(p.numel() for p in run.model.parameters()) - trained,
        "targets": len(rows),
        "processes": world_size(),
        "precision": run.precision,
        "optimizer_steps": state.global_step,
        "epochs": round(epochs, 4),
        "best_epoch": round(_epoch_of_best(state.log_history, config.select_by), 4),
        "tokens": int(epochs * dataset.num_rows.sum()),
        "tokens_sliding_window": int(epochs * sliding),
    }
    if config.compare_steps:
        ks = {"streaming": config.targets_per_prompt, "sliding_window": 1}
        kinds = {name: Kind(k, run.precision, config.optim.compile) for name, k in ks.items()}
        measured = measure_training(run, list(kinds.values()), config.compare_steps)
        facts["throughput"] = {name: asdict(measured[kind]) for name, kind in kinds.items()}
    return facts


def _epoch_of_best(log_history: list[dict[str, float]], metric: Metric) -> float:
    name = f"eval_{metric}"
    validations = [entry for entry in log_history if name in entry and entry["step"]]
    best = max if MORE_IS_BETTER[metric] else min
    return best(validations, key=lambda entry: entry[name])["epoch"] if validations else 0.0
