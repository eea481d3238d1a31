"""The table of pretrained models that were fine-tuned on a GPU, from rows of `benchmarks.gpu.finetune`."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.recording import Rows
from benchmarks.report.tables import markdown_table
from dti_model.config import GLUED, ITEM

# What tells runs apart, as it was before rows said it.
_RUN = {
    "template": GLUED,
    "contexts": "",
    "compile": False,
    "accumulation": 1,
    "wanted_targets": 0,
    "epochs": 1,
}
_START = ("token_budget", "accumulation", "epochs", "train_targets")
_HEAD = (
    "| model | an interaction | trained at k | rows a step | targets | epochs | seconds of training | scored at k | targets | AUC | "
    "log loss | GAUC | AUC of item and user means |"
)


def finetuned(rows: Rows) -> str:
    """A line for each run and way of scoring, with its best epoch; of runs with equal settings the last. Empty: there are no runs."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    seconds: dict[tuple[Any, ...], float] = {}
    run: dict[str, Any] = {}
    for row in (row for row in rows if row.get("benchmark") == "finetune"):
        if row["part"] == "start":
            run = {name: row[name] for name in _START if name in row}
        row = {**_RUN, **run, **row}  # a run's rows come one after another
        key = tuple(row.get(name) for name in ("model", *_RUN, "token_budget", "k"))
        if row["part"] == "training":
            seconds[key] = row["seconds"]
        elif row["part"] == "test":
            found[*key, row["test_k"]] = row
    lines = [_line(row, seconds.get(key[:-1])) for key, row in found.items()]
    title = "A pretrained model, fine-tuned in full within the suite's minutes:"
    return markdown_table(_HEAD, lines, title) if lines else ""


def _line(row: dict[str, Any], seconds: float | None) -> str:
    step, targets = row.get("token_budget", 0) * row["accumulation"], row.get("train_targets")
    cells = [row["model"], _interaction(row), row["k"], f"{step:,}" if step else ""]
    cells += ["" if targets is None else f"{targets:,}", row["epochs"]]
    cells += ["" if seconds is None else f"{seconds:.0f}", row["test_k"], f"{row['targets']:,}"]
    cells += [f"{row[name]:.4f}" for name in ("auc", "log_loss", "gauc", "item_user_auc")]
    return f"| {' | '.join(map(str, cells))} |"


def _interaction(row: dict[str, Any]) -> str:
    """How an interaction stands in a run's prompts."""
    text = row["template"].replace(ITEM, f"{ITEM}; {row['contexts']}") if row["contexts"] else row["template"]
    shown = json.dumps(text, ensure_ascii=False).strip('"')
    return f"`{shown}`" + (", compiled" if row["compile"] else "")
