"""README parts made from the rows of `bench_quality` and `leak_meter`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import RESULTS
from benchmarks.report_plots import last_run

Rows = list[dict[str, Any]]
LEAK = RESULTS / "leak.jsonl"


def read_rows(path: Path) -> Rows:
    """JSON lines; none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def quality_rows(plan: str) -> Rows:
    """Recorded rows of a plan."""
    return read_rows(RESULTS / f"quality-{plan}.jsonl")


def quality_table(plan: str, split: str, hidden: tuple[str, ...] = ()) -> str:
    """Arms with their means over seeds and the difference of AUC to the arm they are compared with.

    Args:
        plan: whose rows.
        split: "test" or "val", the split whose scores are shown.
        hidden: arms that are left out.
    """
    rows = quality_rows(plan)
    compared = [row for row in rows if row["benchmark"] == "quality-difference"]
    against = compared[0]["against"]
    differences = {row["arm"]: row for row in compared if row["against"] == against}
    runs: dict[str, Rows] = {}
    for row in rows:
        if row["benchmark"] == "quality" and row["arm"] not in hidden:
            runs.setdefault(row["arm"], []).append(row)
    lines = [
        f"| | seeds | AUC | log loss | AUC less that of {against} (95 % interval) |",
        "|---|---|---|---|---|",
    ]
    for arm, seeds in runs.items():
        auc, loss = (np.mean([row[f"{split}_{metric}"] for row in seeds]) for metric in ("auc", "log_loss"))
        shown = difference_text(differences[arm]) if arm in differences else ""
        lines.append(f"| {arm} | {len(seeds)} | {auc:.4f} | {loss:.4f} | {shown} |")
    return "\n".join(lines)


def difference_text(row: dict[str, Any]) -> str:
    """A difference with its interval."""
    return f"{row['auc_difference']:+.4f} ({row['low']:+.4f} to {row['high']:+.4f})"


def control_text() -> str:
    """DTI at the largest k beside sliding windows with the same [SUM]s: what streaming itself costs."""
    rows = [row for row in quality_rows("table1") if row.get("against") == "SW, position fix"]
    row = [row for row in rows if row["arm"].startswith("DTI, ")][-1]
    return (
        f"SW and DTI-minus rotate their [SUM]s, DTI does not. With equal [SUM]s, what streaming itself costs is "
        f"{row['arm']} less {row['against']}: {difference_text(row)}, with {row['seeds'][0]} and {row['seeds'][1]} seeds."
    )


def setting_text(plan: str) -> str:
    """What was trained, on what, by which commit."""
    rows = quality_rows(plan)
    run = next(row for row in rows if row["benchmark"] == "quality")
    compared = next(row for row in rows if row["benchmark"] == "quality-difference")
    sizes = {row["targets_per_step"] for row in rows if row["benchmark"] == "quality"}
    per_step = (
        f", about {run['targets_per_step']} targets per optimizer step at every k" if len(sizes) == 1 else ""
    )
    if any(row.get("k") == 0 for row in rows):
        per_step = ""  # a whole history is the least a step can hold
    return (
        f"{run['model']} Llama from scratch, {run['train_targets']:,} training targets of {run['data']}, "
        f"{run['epochs']} epoch{'s' if run['epochs'] != 1 else ''}{per_step}; "
        f"{compared['targets']:,} {'test' if compared['split'] == 'test' else 'validation'} targets of {compared['users']} users, one sliding-window "
        f"prompt each. Intervals resample users and seeds. (Commit {run['commit']}, {run['machine']}.)"
    )


def quality() -> str:
    """Table 1, Figure 3 and whole histories."""
    parts = [quality_table("table1", "test"), setting_text("table1")]
    parts.append(control_text())
    parts += ["Each fix alone:", quality_table("figure3", "test", hidden=("SW",))]
    parts += [
        "Longer prompts, on validation (one seed):",
        quality_table("whole", "val"),
        setting_text("whole"),
    ]
    return "\n\n".join(parts)


def leak() -> str:
    """Leak by layers and reset."""
    rows = [row for row in last_run(read_rows(LEAK)) if row["weights"] == "random weights"]
    layers = sorted({row["layers"] for row in rows})
    lines = [
        "| reset of the [SUM]s | " + " | ".join(f"{n} layer{'s' if n > 1 else ''}" for n in layers) + " |"
    ]
    lines.append("|---|" + "---|" * len(layers))
    for reset in dict.fromkeys(row["reset"] for row in rows):
        values = {row["layers"]: row["leak"] for row in rows if row["reset"] == reset}
        cells = [f"{values[n]:.3f}" if values[n] else "0" for n in layers]
        lines.append(f"| {reset} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
