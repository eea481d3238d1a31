"""What the best epoch is chosen by: early stopping waits for it, a search ranks by it, and one that does not exist is refused."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from dti_model.cli import main
from dti_model.config import OptimConfig, TrainConfig
from dti_model.data import DataError
from dti_model.training import grid_search as searching
from dti_model.training import search, setup, train
from dti_model.training.grid_search import search_table
from tests.training.small_runs import small_run

# By validation: the metrics disagree about the best one, 1 by AUC, 2 by log loss, 3 by GAUC.
VALIDATIONS = [
    {"auc": 0.70, "log_loss": 0.60, "gauc": 0.50},
    {"auc": 0.60, "log_loss": 0.50, "gauc": 0.51},
    {"auc": 0.61, "log_loss": 0.55, "gauc": 0.60},
    {"auc": 0.62, "log_loss": 0.56, "gauc": 0.59},
    {"auc": 0.63, "log_loss": 0.57, "gauc": 0.58},
    {"auc": 0.64, "log_loss": 0.58, "gauc": 0.57},
]


@pytest.mark.parametrize(("select_by", "best", "epochs"), [("auc", 1, 3), ("log_loss", 2, 4), ("gauc", 3, 5)])
def test_the_best_epoch_and_early_stopping_follow_the_metric(
    select_by: Any,
    best: int,
    epochs: int,
    small_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two validations without a better one are enough, and the weights of the best one are kept."""
    optim = OptimConfig(epochs=6, token_budget=600, patience=2)
    config = small_run(small_folder, tmp_path / "run", optim=optim, select_by=select_by, score_test=False)
    found, told = iter(VALIDATIONS), setup.split_metrics
    monkeypatch.setattr(setup, "split_metrics", lambda *scored: {**told(*scored), **next(found)})
    facts = train(config)["training"]
    assert (facts["best_epoch"], facts["epochs"]) == (best, epochs)
    kept = config.out / "checkpoints" / f"checkpoint-{best * facts['optimizer_steps'] // epochs}"
    assert kept.is_dir()
    state = json.loads((max(kept.parent.iterdir(), key=_step) / "trainer_state.json").read_text())
    assert state["best_metric"] == VALIDATIONS[best - 1][select_by]


def _step(path: Path) -> int:
    return int(path.name.split("-")[1])


def test_a_gauc_that_does_not_exist_is_refused_at_the_start(
    small_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every comparison with NaN is false: no epoch would have been the best one."""
    # Two validation targets of two users.
    config = small_run(small_folder, tmp_path / "run", max_eval_targets=2, seed=12, select_by="gauc")
    message = "no user has both classes among the 2 validation targets, so there is no GAUC to choose the best epoch by"
    with pytest.raises(DataError, match=message):
        train(config)
    assert not config.out.exists()
    command = ["train", f"--data={small_folder}", f"--out={config.out}", "--max-eval-targets=2", "--seed=12"]
    assert main([*command, "--select-by=gauc"]) == 2
    assert "take --select-by auc or log_loss" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["accuracy", "AUC", ""])
def test_a_metric_that_is_none(value: Any) -> None:
    with pytest.raises(ValueError, match="select_by must be one of auc, log_loss, gauc, got"):
        TrainConfig(Path("data"), Path("out"), select_by=value)


@pytest.mark.parametrize(("select_by", "best"), [("auc", 1), ("log_loss", 2), ("gauc", 3)])
def test_a_search_ranks_by_the_metric(
    select_by: Any,
    best: int,
    small_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(searching, "train", lambda config: {"val": VALIDATIONS[config.k - 1]})
    base = small_run(small_folder, tmp_path / "search", select_by=select_by)
    table = search(base, {"k": [1, 2, 3, 4]}, [0])
    assert table["best"] == {"k": best}
    means = [cell[f"val_{select_by}_mean"] for cell in table["cells"]]
    assert means == sorted(means, reverse=select_by != "log_loss")
    printed = capsys.readouterr().out
    assert f"best: --k {best}" in printed
    assert ("val GAUC" in printed) == (select_by == "gauc")


def test_a_cell_without_the_metric_is_last(small_folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """An earlier call may have left a cell whose users had no GAUC."""

    def trained(config: TrainConfig) -> dict[str, Any]:
        metrics = VALIDATIONS[config.k - 1]
        return {"val": {**metrics, "gauc": None} if config.k == 1 else metrics}

    monkeypatch.setattr(searching, "train", trained)
    base = dataclasses.replace(small_run(small_folder, tmp_path / "search"), select_by="gauc")
    table = search(base, {"k": [1, 2, 3]}, [0])
    assert [cell["k"] for cell in table["cells"]] == [3, 2, 1]
    rows = search_table(table["cells"], ["k"], "gauc").splitlines()
    assert rows[1].split()[-3:] == ["0.6000", "±", "0.000"]
    assert rows[3].split()[-1] == "-"
    assert not any(isinstance(value, float) and math.isnan(value) for value in table["cells"][2].values())
