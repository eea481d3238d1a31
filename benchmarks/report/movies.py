"""The README part of the larger run from scratch: half of MovieLens-1M, several seeds of `configs/ml-1m.yaml`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.recording import RESULTS
from benchmarks.report.tables import markdown_table

_METRICS = ("auc", "log_loss", "ece", "gauc")
_HEAD = "| test | AUC | log loss | ECE | GAUC |"


def recorded(results: Path = RESULTS) -> list[dict[str, Any]]:
    """One run a seed."""
    return [json.loads(path.read_text()) for path in sorted(results.glob("ml-1m-half*.json"))]


def movies(runs: list[dict[str, Any]] | None = None) -> str:
    """A line for every baseline, every seed, and the mean of the seeds."""
    runs = recorded() if runs is None else runs
    first = runs[0]["metrics"]
    lines = [_line(name.replace("_", " "), found) for name, found in first["baselines"]["test"].items()]
    tests = [run["metrics"]["test"] for run in runs]
    lines += [_line(f"model, seed {seed}", test) for seed, test in enumerate(tests)]
    lines.append(_line("model, mean", {name: float(np.mean([x[name] for x in tests])) for name in _METRICS}))
    made, training = runs[0]["provenance"], first["training"]
    about = (
        f"{training['parameters']:,} parameters, {training['targets']:,} training targets, {training['epochs']:g} epochs; "
        f"{tests[0]['targets']:,} test targets with a prompt each. ({made['machine']}, commit {made['commit']}; `{runs[0]['command']}`.)"
    )
    return f"{markdown_table(_HEAD, lines)}\n\n{about}"


def _line(name: str, found: dict[str, Any]) -> str:
    return f"| {name} | {' | '.join(f'{found[metric]:.4f}' for metric in _METRICS)} |"
