"""Metrics as a table of text, and what to say about them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

COLUMNS = ("auc", "log_loss", "gauc", "f1", "mean_prediction")
HEADINGS = ("AUC", "log loss", "GAUC", "F1", "mean p")


def metrics_table(result: Mapping[str, Any]) -> str:
    """One block per split of `metrics.json`: the lines without text, then the model, then facts of the split."""
    blocks = []
    for split in ("val", "test", "train"):
        if split not in result:
            continue
        model = result[split]
        lines = [f"{split + ':':24}" + "".join(f"{heading:>10}" for heading in HEADINGS)]
        for name, metrics in {**result["baselines"][split], "model": model}.items():
            lines.append(f"  {name.replace('_', ' '):22}" + "".join(f"{metrics[c]:>10.4f}" for c in COLUMNS))
        lines.append(
            f"  {model['targets']:,} targets, base rate {model['base_rate']:.4f}, "
            f"F1 of always yes {model['f1_always_yes']:.4f}"
        )
        blocks.append("\n".join(lines))
    if "training" in result:
        blocks.append(training_lines(result["training"]))
    return "\n".join(blocks)


def training_lines(facts: Mapping[str, Any]) -> str:
    """Tokens and speed of a run in words."""
    frozen = facts.get("frozen_parameters", 0)
    beside = f" beside {frozen:,} frozen ones" if frozen else ""
    lines = [
        f"trained {facts['parameters']:,} parameters{beside} on {facts['targets']:,} targets for {facts['epochs']:g} epochs "
        f"(best: {facts['best_epoch']:g})",
        f"  {facts['tokens']:,} tokens; sliding-window prompts would have needed {facts['tokens_sliding_window']:,} "
        f"({facts['tokens_sliding_window'] / facts['tokens']:.1f} x)",
    ]
    if "throughput" in facts:
        dti, sw = facts["throughput"]["streaming"], facts["throughput"]["sliding_window"]
        lines.append(
            f"  {dti['targets_per_s']:,.0f} targets/s against {sw['targets_per_s']:,.0f} with sliding-window prompts, "
            f"same model and attention, measured in this process ({dti['targets_per_s'] / sw['targets_per_s']:.1f} x)"
        )
    return "\n".join(lines)


def sentence_about_baselines(model: Mapping[str, float], baselines: Mapping[str, Mapping[str, float]]) -> str:
    """Whether the model has learnt more than lines that read no text."""
    best = max(baselines, key=lambda name: baselines[name]["auc"])
    auc, bar = model["auc"], baselines[best]["auc"]
    if auc > bar:
        return f"AUC {auc:.4f} is above every line without text (best: {best.replace('_', ' ')}, {bar:.4f})"
    return (
        f"WARNING: AUC {auc:.4f} is not above the best line without text ({best.replace('_', ' ')}, {bar:.4f}): "
        "the model has not learnt the task yet. Train longer, or check the data with `dti prepare`'s report"
    )
