"""README parts made from the rows of `bench_quality` and `leak_meter`."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.recording import RESULTS, Rows, last_run, read_rows
from benchmarks.report.tables import markdown_table

LEAK = RESULTS / "leak.jsonl"


def quality_rows(plan: str) -> Rows:
    """Recorded rows of a plan."""
    return read_rows(RESULTS / f"quality-{plan}.jsonl")


def quality_table(plan: str, scores: str | dict[str, str], hidden: tuple[str, ...] = ()) -> str:
    """Arms with their means over seeds and the differences of AUC to the arms they are compared with.

    Args:
        plan: whose rows.
        scores: "test" or "val", the scores whose AUC and log loss are shown; or column names of AUCs, by their scores.
        hidden: arms that are left out.
    """
    rows = quality_rows(plan)
    compared = [row for row in rows if row["benchmark"] == "quality-difference"]
    differences = {(row["arm"], row["against"]): row for row in compared}
    bases = list(dict.fromkeys(row["against"] for row in compared))
    runs: dict[str, Rows] = {}
    for row in rows:
        if row["benchmark"] == "quality" and row["arm"] not in hidden:
            runs.setdefault(row["arm"], []).append(row)
    if isinstance(scores, str):
        shown = {f"{scores}_auc": "AUC", f"{scores}_log_loss": "log loss"}
    else:
        shown = {f"{key}_auc": name for key, name in scores.items()}
    heads = ["", "seeds", *shown.values(), *(f"AUC less that of {base} (95 % interval)" for base in bases)]
    lines = []
    for arm in runs:
        means = [f"{np.mean([row[key] for row in runs[arm]]):.4f}" for key in shown]
        found = [differences.get((arm, base)) for base in bases]
        texts = ["" if row is None else difference_text(row) for row in found]
        lines.append(f"| {' | '.join([arm, str(len(runs[arm])), *means, *texts])} |")
    return markdown_table(f"| {' | '.join(heads)} |", lines)


def difference_text(row: dict[str, Any]) -> str:
    """A difference with its interval."""
    return f"{row['auc_difference']:+.4f} ({row['low']:+.4f} to {row['high']:+.4f})"


def setting_text(plan: str) -> str:
    """The trained model, its data, and the commit."""
    rows = quality_rows(plan)
    run = next(row for row in rows if row["benchmark"] == "quality")
    compared = next(row for row in rows if row["benchmark"] == "quality-difference")
    runs = [row for row in rows if row["benchmark"] == "quality"]
    sizes = {row["targets_per_step"] for row in runs}
    per_step = (
        f", about {run['targets_per_step']} targets per optimizer step at every k" if len(sizes) == 1 else ""
    )
    if any(row["k"] == 0 or row["k"] > row["targets_per_step"] for row in runs):
        # A prompt is the least a step can hold.
        per_step = f", optimizer steps of about {min(sizes)} targets or one prompt" if len(sizes) == 1 else ""
    return (
        f"{run['model']} Llama from scratch, {run['train_targets']:,} training targets of {run['data']}, "
        f"{run['epochs']} epoch{'s' if run['epochs'] != 1 else ''}{per_step}; "
        f"{compared['targets']:,} {'test' if compared['split'] == 'test' else 'validation'} targets of {compared['users']} users, one sliding-window "
        f"prompt each. Intervals resample users and seeds. (Commit {run['commit']}, {run['machine']}.)"
    )


def scoring_text(plan: str) -> str:
    """What scoring in the other precision does to the AUC of the same weights."""
    rows = [row for row in quality_rows(plan) if row["benchmark"] == "quality-scoring"]
    said = ", ".join(f"{difference_text(row)} of {row['arm']}" for row in rows)
    return f"AUC of the same weights scored in bfloat16, less that in float32: {said}."


def quality() -> str:
    """Table 1, Figure 3, larger steps, longer prompts, the layers that reset, and the precision."""
    both_ways = {"val": "AUC, one prompt per target", "val-streaming": "AUC, streaming as trained"}
    parts = [
        quality_table("table1", "test"),
        setting_text("table1"),
        "SW and DTI-minus rotate their [SUM]s, DTI does not: what streaming itself costs is the last column.",
        "The same where an optimizer step holds four times the targets, so several users (validation):",
        quality_table("users", "val"),
        setting_text("users"),
        "Longer training, longer prompts (validation):",
        quality_table("long", both_ways),
        setting_text("long"),
        "Each fix alone:",
        quality_table("figure3", "test", hidden=("SW",)),
        "Longer prompts, on validation:",
        quality_table("whole", "val"),
        setting_text("whole"),
        "A deeper model, scored in two ways, by the layers whose [SUM]s are reset:",
        quality_table("depth", both_ways),
        setting_text("depth"),
    ]
    if quality_rows("precision"):
        in_each = {"val": "AUC, as trained", "val-fp32": "AUC in float32", "val-bf16": "AUC in bfloat16"}
        parts += [
            "Trained and scored in bfloat16, and in float32 (validation, pairs of runs with equal seeds):",
            quality_table("precision", in_each),
            scoring_text("precision"),
            setting_text("precision"),
        ]
    return "\n\n".join(parts)


def leak() -> str:
    """Leak by layers and reset."""
    rows = [row for row in last_run(read_rows(LEAK)) if row["weights"] == "random weights"]
    layers = sorted({row["layers"] for row in rows})
    head = "| reset of the [SUM]s | " + " | ".join(f"{n} layer{'s' if n > 1 else ''}" for n in layers) + " |"
    lines = []
    for reset in dict.fromkeys(row["reset"] for row in rows):
        values = {row["layers"]: row["leak"] for row in rows if row["reset"] == reset}
        cells = [f"{values[n]:.3f}" if values[n] else "0" for n in layers]
        lines.append(f"| {reset} | " + " | ".join(cells) + " |")
    return markdown_table(head, lines)
