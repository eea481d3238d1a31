"""Plots of recorded rows: AUC over k, the leak by layers, training speed over k, attention time over T, and a GPU's roofline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.attention import BF16
from benchmarks.cards import Card
from benchmarks.measuring import precision_of
from benchmarks.recording import Rows
from benchmarks.report.tables import precisions_in

COLORS = ("#1f5fa8", "#d1602b", "#4a8f4a", "#7a5aa6", "#8a8a8a", "#b58900")
NAMES = {"fp32": "float32", "bf16": "bfloat16"}
# Of lines, by precision.
STYLES: dict[str, dict[str, Any]] = {"fp32": {}, "bf16": {"linestyle": "-.", "markerfacecolor": "white"}}
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
    """Targets/s over those of sliding windows, beside the ratio of rows and equation 3; one line per model and precision.

    Rows in two precisions give a second panel: targets/s in bfloat16 over those in float32.
    """
    precisions = precisions_in(rows)
    figure = Figure(figsize=(7 if len(precisions) < 2 else 11, 4.2), layout="constrained")
    speedup, *others = figure.subplots(1, len(precisions), squeeze=False)[0]
    speedup.set(title="training speed over sliding windows", ylabel="times as many targets/s")
    largest = max((row["k"] for row in rows if row["k"] != "all"), default=1)

    def line(axes: Axes, model: str, precision: str, field: str, **style: Any) -> None:
        of = [row for row in rows if (row["model"], precision_of(row)) == (model, precision) and field in row]
        x = [2 * largest if row["k"] == "all" else row["k"] for row in of]
        if of:
            axes.plot(x, [row[field] for row in of], marker="o", **style)

    for color, model in zip(COLORS, dict.fromkeys(row["model"] for row in rows)):
        for precision in precisions:
            label = f"measured, {model}" + (f", {NAMES[precision]}" if others else "")
            line(speedup, model, precision, "speedup", color=color, **STYLES[precision], label=label)
        for axes in others:
            line(axes, model, "bf16", "over_fp32", color=color, **STYLES["bf16"], label=model)
    counted = {row["k"]: row["rows_ratio"] for row in rows}  # of the prompts, whatever the model
    x = sorted((2 * largest if k == "all" else k, ratio) for k, ratio in counted.items())
    speedup.plot(*zip(*x), color=COLORS[3], linestyle="--", label="ratio of rows")
    ks = sorted({row["k"]: row["equation_3"] for row in rows if row["k"] != "all"}.items())
    speedup.plot(*zip(*ks), color=COLORS[4], linestyle=":", label="equation 3")
    for axes in others:
        axes.set(title="bfloat16 over float32 at the same k", ylabel="times as many targets/s")
        axes.axhline(1.0, color=COLORS[4], linestyle=":")
    for axes in (speedup, *others):
        axes.set_xlabel("targets per prompt (k)")
        axes.grid(alpha=0.3)
        axes.set_xscale("log")
        axes.set_xticks([k for k, _ in ks] + [2 * largest], [str(k) for k, _ in ks] + ["all"])
        axes.minorticks_off()
        axes.legend(fontsize=8)
    _save(figure, path)


def attention_over_rows(rows: Rows, path: Path) -> None:
    """Milliseconds of attention, forward and backward, over the rows T of the batch; one color per provider, bfloat16 dashed."""
    figure, axes = _axes("attention, forward and backward", "rows of the packed batch (T)", "ms (median)")
    chosen = [row for row in rows if row["mode"] == "forward+backward"]
    names = dict.fromkeys(row["provider"].removesuffix(BF16) for row in chosen)
    looks = dict(zip(names, zip(COLORS, "osv^D")))
    for provider in dict.fromkeys(row["provider"] for row in chosen):
        of = [row for row in chosen if row["provider"] == provider]
        color, marker = looks[provider.removesuffix(BF16)]
        line = sorted((row["rows"], row["p50_ms"]) for row in of)
        style = STYLES[precision_of(of[0])]
        axes.plot(*zip(*line), color=color, marker=marker, label=provider, **style)
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
