"""The table of pretrained models that were fine-tuned on a GPU, from rows of `benchmarks.gpu.finetune`."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.recording import Rows
from benchmarks.report.tables import markdown_table
from dti_model.config import GLUED, ITEM

# What tells runs apart, and what it was before rows said it.
_RUN = {"template": GLUED, "contexts": "", "compile": False, "graphs": False, "wanted_targets": 0}
_RUN |= {"learning_rate": 2e-4, "token_budget": 0, "accumulation": 1, "epochs": 1}
_KEY = ("data", "model", "k", *_RUN)
# Older rows have these in a run's first row only.
_START = ("data", "token_budget", "accumulation", "epochs", "learning_rate", "train_targets")
_METRICS = ("auc", "log_loss", "gauc", "item_user_auc")
_HEAD = (
    "| model | an interaction | trained at k | rows a step | targets | epochs | seconds, validation and test among them | scored at k | targets | AUC | "
    "log loss | GAUC | AUC of item and user means |"
)


def finetuned(rows: Rows) -> str:
    """A line for each run and way of scoring, with its best epoch; of runs with equal settings the last. Empty: there are no runs."""
    tests: dict[tuple[Any, ...], dict[int, dict[str, Any]]] = {}
    seconds: dict[tuple[Any, ...], float] = {}
    first: dict[str, Any] = {}
    for row in (row for row in rows if row.get("benchmark") == "finetune"):
        if row.get("part") == "start":
            first = {name: row[name] for name in _START if name in row}
        row = {**_RUN, **first, **row}
        run = tuple(row.get(name) for name in _KEY)
        if row.get("part") == "start":
            tests[run] = {}
            seconds.pop(run, None)
        elif row.get("part") == "training":
            seconds[run] = row["seconds"]
        elif row.get("part") == "test":
            tests.setdefault(run, {})[row["test_k"]] = row
    lines = [_line(row, seconds.get(run)) for run, found in tests.items() for row in found.values()]
    title = "A pretrained model, fine-tuned in full within the suite's minutes:"
    return markdown_table(_HEAD, lines, title) if lines else ""


def _line(row: dict[str, Any], seconds: float | None) -> str:
    step, targets = row["token_budget"] * row["accumulation"], row.get("train_targets")
    cells = [row["model"], _interaction(row), row["k"], f"{step:,}" if step else ""]
    cells += ["" if targets is None else f"{targets:,}", row["epochs"]]
    cells += ["" if seconds is None else f"{seconds:.0f}", row["test_k"], f"{row['targets']:,}"]
    cells += [f"{row[name]:.4f}" if name in row else "" for name in _METRICS]
    return f"| {' | '.join(map(str, cells))} |"


def _interaction(row: dict[str, Any]) -> str:
    """How an interaction stands in a run's prompts."""
    text = row["template"].replace(ITEM, f"{ITEM}; {row['contexts']}") if row["contexts"] else row["template"]
    shown = json.dumps(text, ensure_ascii=False)[1:-1].replace("|", "\\|").replace("`", "'")
    return f"`{shown}`" + (", compiled" if row["compile"] else "")
