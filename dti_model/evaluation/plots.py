"""Plots of a run and of a layout's mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dti_kernels import StreamLayout
from dti_model.evaluation.metrics import expected_calibration_error, groups_of

REPORT_MARK = {"Software": "dti train"}  # a text in the PNG of a run
MODEL_COLOR, LINE_COLOR, SUM_COLOR = "#1f5fa8", "#8a8a8a", "#d1602b"
RAW_COLOR = SUM_COLOR
# One for each baseline.
LINE_STYLES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (8, 2, 1, 2, 1, 2)))
SPLIT_NAMES = {"val": "validation"}


def plot_report(
    path: Path,
    log_history: Sequence[Mapping[str, float]],
    labels: npt.NDArray[Any],
    probabilities: npt.NDArray[np.float64],
    baselines: Mapping[str, Mapping[str, Mapping[str, float]]],
    raw: npt.NDArray[np.float64] | None = None,
    split: str = "test",
) -> None:
    """Training loss, validation AUC beside the baselines, and calibration on a split, as one PNG.

    Args:
        path: the PNG.
        log_history: Trainer's log entries, with `epoch` and `loss` or `eval_auc`.
        labels: `(S,)` labels of the split, 0 or 1.
        probabilities: `(S,)` its scores.
        baselines: metrics by split and baseline.
        raw: `(S,)` its scores before they were calibrated; None: they were not.
        split: which one that is.
    """
    from matplotlib.figure import Figure  # a second to import, which only plots need

    figure = Figure(figsize=(13, 4), layout="constrained")
    loss_axes, auc_axes, calibration_axes = figure.subplots(1, 3)
    losses = [(entry["epoch"], entry["loss"]) for entry in log_history if "loss" in entry]
    aucs = [(entry["epoch"], entry["eval_auc"]) for entry in log_history if "eval_auc" in entry]
    loss_axes.plot(*zip(*losses), color=MODEL_COLOR, linewidth=1)
    # The first steps, from ln(vocabulary) down, would flatten the rest: the axis is that of the last two thirds.
    later = [loss for _, loss in losses[len(losses) // 3 :]]
    margin = 0.1 * (max(later) - min(later)) or 0.1
    loss_axes.set_ylim(min(later) - margin, max(later) + 2 * margin)
    loss_axes.set(xlabel="epoch", ylabel="cross-entropy at the [SUM]s (nats)", title="training loss")
    auc_axes.plot(*zip(*aucs), color=MODEL_COLOR, marker="o", label="model")
    for (name, metrics), style in zip(baselines["val"].items(), cycle(LINE_STYLES)):
        auc_axes.axhline(
            metrics["auc"], color=LINE_COLOR, linewidth=1, linestyle=style, label=name.replace("_", " ")
        )
    auc_axes.set(xlabel="epoch", ylabel="AUC", title="validation AUC")
    auc_axes.legend(fontsize=8, loc="lower right")
    if raw is not None:
        _plot_calibration(calibration_axes, labels, raw, "as trained", RAW_COLOR)
    _plot_calibration(calibration_axes, labels, probabilities, "model" if raw is None else "calibrated")
    calibration_axes.plot([0, 1], [0, 1], color=LINE_COLOR, linewidth=1, zorder=1)
    calibration_axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="mean prediction", ylabel="clicked share")
    calibration_axes.set_title(f"calibration on {SPLIT_NAMES.get(split, split)}")
    calibration_axes.legend(fontsize=8, loc="upper left")
    figure.savefig(path, dpi=110, format="png", metadata=REPORT_MARK)  # whatever the path ends in


def _plot_calibration(
    axes: Any,
    labels: npt.NDArray[Any],
    probabilities: npt.NDArray[np.float64],
    name: str,
    color: str = MODEL_COLOR,
) -> None:
    """Clicked share against mean prediction in the groups of the ECE, with two standard errors."""
    group = groups_of(probabilities)
    size = np.bincount(group)
    size, sums = size[size > 0], [np.bincount(group, weights=x)[size > 0] for x in (probabilities, labels)]
    predicted, clicked = (each / size for each in sums)
    error = 2 * np.sqrt(clicked * (1 - clicked) / size)
    label = f"{name}, ECE {expected_calibration_error(labels, probabilities):.4f}"
    axes.errorbar(
        predicted, clicked, yerr=error, color=color, marker="o", markersize=4, linewidth=1, label=label
    )


def plot_mask(layout: StreamLayout, path: Path) -> None:
    """Draw which context key every row of a small layout sees: prefix and item text, label text, and the [SUM] rows.

    Args:
        layout: at most a few hundred rows, on any device.
        path: the PNG.
    """
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    layout = layout.to("cpu")
    num_context, num_rows = layout.num_context, layout.num_rows
    picture = np.zeros((num_rows, num_rows), np.int64)
    picture[:, :num_context] = layout.dense_visibility().numpy()
    picture[num_context:][picture[num_context:] == 1] = 2
    picture[range(num_context, num_rows), range(num_context, num_rows)] = 2
    figure = Figure(figsize=(7.5, 7.5), layout="constrained")
    axes = figure.subplots()
    axes.imshow(picture, cmap=ListedColormap(["white", MODEL_COLOR, SUM_COLOR]), interpolation="nearest")
    edges = np.flatnonzero(np.diff(layout.interaction.numpy()[:num_context])) + 0.5
    for edge in edges:
        axes.axvline(edge, color="#cccccc", linewidth=0.6)
        axes.axhline(edge, color="#cccccc", linewidth=0.6)
    axes.axhline(num_context - 0.5, color="black", linewidth=1)
    axes.axvline(num_context - 0.5, color="black", linewidth=1)
    axes.set(xlabel="key", ylabel="row", title="context rows (blue) and [SUM] rows (orange)")
    figure.savefig(path, dpi=110)
