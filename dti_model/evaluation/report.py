"""Metrics as a table of text, and what to say about them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from dti_model.evaluation.baselines import BOOSTING
from dti_model.model import TEMPERATURES

HEADINGS = {
    "auc": "AUC",
    "log_loss": "log loss",
    "ece": "ECE",
    "gauc": "GAUC",
    "f1": "F1",
    "mean_prediction": "mean p",
}
# A run is judged by these: heading, and whether more is better.
VERDICTS = {"auc": ("AUC", True), "log_loss": ("log loss", False), "gauc": ("GAUC", True)}


def metrics_table(result: Mapping[str, Any]) -> str:
    """One block per split of `metrics.json`: the baselines, then the model, then facts of the split."""
    blocks = []
    for split in ("val", "test", "train"):
        if split not in result:
            continue
        model = result[split]
        columns = [name for name in HEADINGS if name in model]  # older runs have no ECE
        width = min(10, 56 // len(columns))
        lines = [f"{split + ':':24}" + "".join(f"{HEADINGS[name]:>{width}}" for name in columns)]
        for line, metrics in {**result["baselines"][split], "model": model}.items():
            lines.append(f"  {_words(line):22}" + "".join(_cell(metrics, name, width) for name in columns))
        lines.append(
            f"  {model['targets']:,} targets, base rate {model['base_rate']:.4f}, "
            f"F1 of always yes {model['f1_always_yes']:.4f}"
        )
        blocks.append("\n".join(lines))
    if "calibration" in result:
        blocks.append(calibration_lines(result["calibration"]))
    if "training" in result:
        blocks.append(training_lines(result["training"]))
    return "\n".join(blocks)


def _cell(metrics: Mapping[str, Any], name: str, width: int) -> str:
    value = _figure(metrics, name)
    return f"{'-':>{width}}" if value is None else f"{value:>{width}.4f}"


def calibration_lines(facts: Mapping[str, Any]) -> str:
    """A calibration in words: its numbers, and what it did to log loss and ECE; a second line where the scores are no good."""
    temperature, bias = facts["temperature"], facts["bias"]
    changes = []
    for split, before in facts["before"].items():
        after = facts["after"][split]
        ece = f"ECE {before['ece']:.4f} -> {after['ece']:.4f}"
        changes.append(f"{split} log loss {before['log_loss']:.4f} -> {after['log_loss']:.4f}, {ece}")
    lines = [
        f"calibrated on validation (temperature {temperature:.3f}, bias {bias:+.3f}): {'; '.join(changes)}"
    ]
    if any(math.isclose(temperature, limit, rel_tol=1e-6) for limit in TEMPERATURES):
        why = (
            "higher scores do not mean more clicks there, and all probabilities are near the share of clicks"
            if temperature > 1
            else "the scores there differ by very little"
        )
        lines.append(f"WARNING: the temperature ended at its limit, {temperature:g}: {why}")
    return "\n".join(lines)


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


def sentence_about_baselines(
    model: Mapping[str, float | None], baselines: Mapping[str, Mapping[str, float | None]]
) -> str:
    """Whether the model has learnt more than the baselines: each metric beside the baseline that is best in it.

    Its AUC may be above every baseline while its log loss or its GAUC is not: the order in which a user sees items depends on GAUC alone.

    Args:
        model: metrics of `click_metrics`; None or NaN where one does not exist.
        baselines: the same by baseline.

    Returns:
        One line, and a second one with a WARNING where AUC is not above every baseline without text.
    """
    parts = [_beside(name, model, baselines) for name in VERDICTS]
    without_text = {
        name: metrics for name, metrics in baselines.items() if name != BOOSTING
    }  # it counts categories
    best_one = "best baseline" if BOOSTING in baselines else "best baseline without text"
    sentence = f"beside the {best_one}: {'; '.join(parts)}"
    best = _best("auc", without_text)
    auc, bar = _figure(model, "auc"), None if best is None else _figure(baselines[best], "auc")
    if auc is None or bar is None or auc > bar:
        return sentence
    assert best is not None
    return (
        f"{sentence}\nWARNING: AUC {auc:.4f} is not above the best baseline without text ({_words(best)}, {bar:.4f}): "
        "the model has not learnt the task yet. Train longer, or check the data with `dti prepare`'s report"
    )


def _beside(name: str, model: Mapping[str, Any], baselines: Mapping[str, Mapping[str, Any]]) -> str:
    """One metric in words."""
    heading, more_is_better = VERDICTS[name]
    best, mine = _best(name, baselines), _figure(model, name)
    if best is None or mine is None:
        return f"no {heading}"
    bar = baselines[best][name]
    if mine == bar:
        return f"{heading} {mine:.4f}, no better than {_words(best)}"
    place, verdict = (
        "above" if mine > bar else "below",
        "better" if (mine > bar) == more_is_better else "worse",
    )
    return f"{heading} {mine:.4f} {place} {_words(best)}'s {bar:.4f} ({verdict})"


def _best(name: str, baselines: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The baseline that is best in a metric."""
    sign = 1 if VERDICTS[name][1] else -1
    found = {line: _figure(metrics, name) for line, metrics in baselines.items()}
    there = {line: sign * value for line, value in found.items() if value is not None}
    return max(there, key=lambda line: there[line]) if there else None


def _figure(metrics: Mapping[str, Any], name: str) -> float | None:
    """A metric that exists: files have null, and Python NaN, where one does not."""
    value = metrics.get(name)
    return None if value is None or math.isnan(value) else float(value)


def _words(line: str) -> str:
    return line.replace("_", " ")
