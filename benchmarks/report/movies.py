"""The README part of the larger run from scratch: half of MovieLens-1M, a seed or several of `configs/ml-1m.yaml`.

    python -m benchmarks.report --record-run RUN --name ml-1m-half-seed-0

records one of them; the number is its seed.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.recording import RESULTS
from benchmarks.report.tables import markdown_table

_METRICS = ("auc", "log_loss", "ece", "gauc")
_HEAD = "| test | AUC | log loss | ECE | GAUC |"


def recorded(results: Path = RESULTS) -> dict[int, dict[str, Any]]:
    """One run a seed, by seed."""
    found = ((re.fullmatch(r"ml-1m-half-seed-(\d+)", path.stem), path) for path in results.glob("*.json"))
    seeds = {int(name[1]): path for name, path in found if name is not None}
    return {seed: json.loads(seeds[seed].read_text()) for seed in sorted(seeds)}


def movies(seeds: dict[int, dict[str, Any]] | None = None) -> str:
    """A line for every baseline, every seed, and the mean of several seeds.

    Raises:
        ValueError: seeds are of different data.
    """
    seeds = recorded() if seeds is None else seeds
    if not seeds:
        return "(No run is recorded yet.)"
    runs = list(seeds.values())
    if len({run["metrics"]["provenance"]["data"] for run in runs}) > 1:
        raise ValueError(
            "ml-1m-half-seed-*.json: runs on different data: record the same one from every seed"
        )
    first = runs[0]["metrics"]
    lines = [_line(name.replace("_", " "), found) for name, found in first["baselines"]["test"].items()]
    tests = [run["metrics"]["test"] for run in runs]
    lines += [_line(f"model, seed {seed}", test) for seed, test in zip(seeds, tests)]
    if len(tests) > 1:
        mean = {name: float(np.mean([x[name] for x in tests])) for name in _METRICS}
        lines.append(_line("model, mean", mean))
    made, training = runs[0]["provenance"], first["training"]
    about = (
        f"{training['parameters']:,} parameters, {training['targets']:,} training targets, {training['epochs']:g} epochs; "
        f"{tests[0]['targets']:,} test targets with a prompt each. ({made['machine']}, commit {made['commit']}.)"
    )
    return f"{markdown_table(_HEAD, lines)}\n\n{about}"


def _line(name: str, found: dict[str, Any]) -> str:
    return f"| {name} | {' | '.join(f'{found[metric]:.4f}' for metric in _METRICS)} |"
