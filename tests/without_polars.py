"""Started by test_imports.py: trains and scores where what only prepared folders and the command line need is not installed."""

from __future__ import annotations

import importlib
import json
import pkgutil
import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

import numpy as np
import torch

MISSING = ("polars", "msgspec", "jsonargparse", "gguf")
PACKAGES = ("dti_kernels", "dti_model", "benchmarks")
# Those that make prepared folders or parse a command line; every other module, a new one too, must do without.
NEED_THEM = {
    "dti_model.cli",
    *(
        f"dti_model.data.{name}"
        for name in (
            "sources.amazon",
            "sources.amazon_fields",
            "build",
            "sources.custom",
            "extension",
            "index",
            "sources.item_frames",
            "sources.delimited",
            "row_texts",
            "sources.movielens",
            "sources.user_frames",
            "rules",
            "sources.rows",
            "sources.source",
            "sources.csv_parquet",
        )
    ),
}


def hide_missing() -> None:
    """Let Python find none of `MISSING`. A None in sys.modules would not do: scikit-learn takes it for an imported polars."""
    find = PathFinder.find_spec

    def find_others(name: str, *place: Any) -> ModuleSpec | None:
        return None if name.partition(".")[0] in MISSING else find(name, *place)

    assert not sys.modules.keys() & set(MISSING)
    PathFinder.find_spec = find_others  # type: ignore[method-assign, assignment]


def import_all() -> None:
    """Every module but those of the list, and no module of the list that could be imported as well."""
    found = {
        module.name
        for package in PACKAGES
        for module in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}.")
    }
    assert found >= NEED_THEM, f"these are no modules any more: {NEED_THEM - found}"
    for name in sorted(found - NEED_THEM):
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != "triton":  # there is none for every machine
                raise
    for name in sorted(NEED_THEM):
        missing = None
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            missing = error.name
        assert missing in MISSING, f"{name} does without {', '.join(MISSING)}: take it off the list"


def train_and_score(data: Path, out: Path) -> None:
    """A run of two steps, and its scores by `score_targets`, by `Scorer` and of a file of requests."""
    from dti_model.config import ModelConfig, OptimConfig, TrainConfig
    from dti_model.data.texts import Template, template_text
    from dti_model.evaluation import eval_targets, score_targets, split_metrics
    from dti_model.model.run import Run
    from dti_model.scorer import Scorer
    from dti_model.scorer.file import score_file
    from dti_model.training import train
    from dti_model.training.grid_search import cell_config

    config = TrainConfig(
        data=data,
        out=out,
        k=3,
        window=3,
        progress=False,
        report_to=(),
        model=ModelConfig(layers=1, width=16, heads=2, kv_heads=1, mlp_width=24),
        optim=OptimConfig(max_steps=2, token_budget=300, precision="fp32"),
    )
    config = cell_config(config, {"optim.learning_rate": "1e-3"}, seed=1)
    result = train(config)
    assert result["val"]["auc"] > 0

    run = Run.load(out, device="cpu")
    targets = eval_targets(run.data, "val", run.config)
    probabilities = score_targets(run.model, run.config.dti, run.builder, targets, token_budget=300)
    assert split_metrics(run, "val", probabilities)["auc"] == result["val"]["auc"]

    scorer = Scorer.from_run(out, device="cpu")
    new = {"title": "Brazil (1985)", "genres": ["Sci-Fi"]}
    scores = scorer.score(scorer.history_of("5"), ["1", "9", new])
    assert scores.shape == (3,)
    requests, answers = out.parent / "requests.jsonl", out.parent / "scores.parquet"
    requests.write_text(json.dumps({"user": "5", "candidates": ["1", "9", new]}) + "\n")
    assert score_file(scorer, requests, answers, skip_bad_lines=False, progress=False).lines == 1
    fields = {"title": "Brazil", "year": 1985.0, "genres": ["Sci-Fi", None]}
    text = template_text(Template("{title} ({year}); {genres}"), fields, max_chars=200)
    assert text == "Brazil (1985); Sci-Fi"
    np.save(out.parent / "val.npy", probabilities)


def main(data: Path, out: Path) -> None:
    """Train and score, then import everything."""
    hide_missing()
    torch.set_num_threads(1)
    train_and_score(data, out)
    import_all()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
