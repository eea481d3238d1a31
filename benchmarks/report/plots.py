"""Plots of recorded rows: AUC over k, the leak by layers, training time over k, attention time over T, and a GPU's roofline."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.cards import Card
from benchmarks.recording import Rows

COLORS = ("#1f5fa8", "#d1602b", "#4a8f4a", "#7a5aa6", "#8a8a8a", "#b58900")
ARM_COLORS = {"DTI": COLORS[0], "DTI-minus": COLORS[1]}


def _axes(title: str, xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    return figure, axes


def _save(figure: Figure, path: Path) -> None:
    # Without the version of matplotlib in it, equal rows give equal files.
    figure.savefig(path, dpi=110, metadata={"Software": None})


def auc_over_k(rows: Rows, path: Path) -> None:
    """Figure 2: test AUC over targets per prompt, with and without the fixes; one dot per seed."""
    figure, axes = _axes("test AUC, one sliding-window prompt per target", "targets per prompt (k)", "AUC")
    runs = [row for row in rows if row["benchmark"] == "quality"]
    for (name, color), marker in zip(ARM_COLORS.items(), "os"):
        arm = [row for row in runs if row["arm"].startswith(f"{name}, ")]
        ks = sorted({row["k"] for row in arm})
        means = [np.mean([row["test_auc"] for row in arm if row["k"] == k]) for k in ks]
        axes.plot(ks, means, color=color, marker=marker, label=name)
        axes.scatter([row["k"] for row in arm], [row["test_auc"] for row in arm], color=color, s=8, alpha=0.6)
    for style, arm_name in zip(("--", ":"), ("SW", "SW, position fix")):
        values = [row["test_auc"] for row in runs if row["arm"] == arm_name]
        if values:
            axes.axhline(float(np.mean(values)), color=COLORS[4], linestyle=style, label=arm_name)
    axes.set_xscale("log")
    axes.set_xticks(ks, [str(k) for k in ks])
    axes.minorticks_off()
    axes.legend()
    _save(figure, path)


def leak_by_layers(rows: Rows, path: Path) -> None:
    """Share of the gradient that lies outside the window, by layers and reset."""
    figure, axes = _axes("leak of a [SUM], random weights", "layers", "gradient outside the window / all")
    resets = list(dict.fromkeys(row["reset"] for row in rows))
    for color, marker, reset in zip(COLORS, "osv^Dx", resets):
        chosen = sorted((row["layers"], row["leak"]) for row in rows if row["reset"] == reset)
        axes.plot(*zip(*chosen), color=color, marker=marker, markersize=5, label=reset)
    axes.legend(fontsize=8)
    _save(figure, path)


def time_over_k(rows: Rows, path: Path) -> None:
    """Targets/s over those of sliding windows, beside the ratio of rows and equation 3; one line per model."""
    figure, axes = _axes(
        "training speed over sliding windows", "targets per prompt (k)", "times as many targets/s"
    )
    largest = max((row["k"] for row in rows if row["k"] != "all"), default=1)
    for color, model in zip(COLORS, dict.fromkeys(row["model"] for row in rows)):
        chosen = [row for row in rows if row["model"] == model]
        x = [2 * largest if row["k"] == "all" else row["k"] for row in chosen]
        axes.plot(x, [row["speedup"] for row in chosen], color=color, marker="o", label=f"measured, {model}")
    counted = {row["k"]: row["rows_ratio"] for row in rows}  # of the prompts, whatever the model
    x = sorted((2 * largest if k == "all" else k, ratio) for k, ratio in counted.items())
    axes.plot(*zip(*x), color=COLORS[3], linestyle="--", label="ratio of rows")
    ks = sorted({row["k"]: row["equation_3"] for row in rows if row["k"] != "all"}.items())
    axes.plot(*zip(*ks), color=COLORS[4], linestyle=":", label="equation 3")
    axes.set_xscale("log")
    ticks = [k for k, _ in ks] + [2 * largest]
    axes.set_xticks(ticks, [str(k) for k, _ in ks] + ["all"])
    axes.minorticks_off()
    axes.legend(fontsize=8)
    _save(figure, path)


def attention_over_rows(rows: Rows, path: Path) -> None:
    """Milliseconds of attention, forward and backward, over the rows T of the batch."""
    figure, axes = _axes("attention, forward and backward", "rows of the packed batch (T)", "ms (median)")
    chosen = [row for row in rows if row["mode"] == "forward+backward"]
    for color, marker, provider in zip(COLORS, "osv^D", dict.fromkeys(row["provider"] for row in chosen)):
        line = sorted((row["rows"], row["p50_ms"]) for row in chosen if row["provider"] == provider)
        axes.plot(*zip(*line), color=color, marker=marker, label=provider)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.legend()
    _save(figure, path)


def roofline(rows: Rows, path: Path, card: Card | None) -> None:
    """Useful TFLOP/s of attention over FLOPs per byte of q, k, v and out, below a GPU's peak and bandwidth.

    Args:
        rows: with `provider`, `mode`, `flops_per_byte` and `useful_tflops`.
        path: of the picture.
        card: whose peak and bandwidth; None: not known, and not drawn.
    """
    figure, axes = _axes(
        "attention on a GPU (hollow: forward and backward)",
        "useful FLOPs per byte of q, k, v and out",
        "useful TFLOP/s",
    )
    chosen = [row for row in rows if row["mode"] in ("forward", "forward+backward")]
    intensities = [max(row["flops_per_byte"], 1.0) for row in chosen]
    if card is not None:
        tflops, gb_s = card.tflops, card.memory_gb_s
        x = np.geomspace(min(intensities) / 4, max(max(intensities), 1000 * tflops / gb_s) * 2, 200)
        axes.plot(x, np.minimum(tflops, x * gb_s / 1000), color="black", label="published peak")
    names = dict.fromkeys(row["provider"] for row in chosen)
    for i, provider in enumerate(names):
        color, marker = COLORS[i % len(COLORS)], "osv^DPX*"[i % 8]
        for mode, face in (("forward", color), ("forward+backward", "none")):
            points = [
                (row["flops_per_byte"], row["useful_tflops"])
                for row in chosen
                if (row["provider"], row["mode"]) == (provider, mode)
            ]
            label = provider if mode == "forward" else None
            if points:
                axes.scatter(*zip(*points), edgecolors=color, facecolors=face, marker=marker, label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.legend(fontsize=8)
    _save(figure, path)
