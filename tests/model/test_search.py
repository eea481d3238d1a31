"""A search chooses on validation over seeds, goes on where it was, and refuses what is no setting."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from dti_model import search as searching
from dti_model.cli import main
from dti_model.config import ModelConfig, OptimConfig, TrainConfig
from dti_model.search import search
from dti_model.train import RunExistsError

GRID = {"optim.learning_rate": [0.001, 0.03], "dti.alpha_max": [0.5]}


@pytest.fixture
def base(small_folder: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        data=small_folder,
        out=tmp_path / "search",
        k=3,
        window=3,
        progress=False,
        report_to=(),
        model=ModelConfig(layers=1, width=16, heads=2, kv_heads=1, mlp_width=24),
        optim=OptimConfig(epochs=1, token_budget=600),
    )


def test_goes_on_and_chooses_on_validation(base: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    train, trained = searching.train, []

    def interrupted(config: TrainConfig) -> dict:
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(config)
        return train(config)

    monkeypatch.setattr(searching, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        search(base, GRID, [0, 1])
    monkeypatch.setattr(searching, "train", lambda config: trained.append(config) or train(config))
    table = search(base, GRID, [0, 1])
    assert [(config.optim.learning_rate, config.seed) for config in trained] == [
        (0.001, 0), (0.001, 1), (0.03, 0), (0.03, 1),
    ]  # fmt: skip
    found = {}
    for config in trained:
        metrics = json.loads((config.out / "metrics.json").read_text())
        assert "test" not in metrics
        assert not (config.out / "predictions-test.parquet").exists()
        found.setdefault(config.optim.learning_rate, []).append(metrics["val"]["auc"])
    best = max(found, key=lambda rate: np.mean(found[rate]))
    assert table["best"] == {"optim.learning_rate": best, "dti.alpha_max": 0.5}
    assert table["cells"][0]["val_auc_mean"] == pytest.approx(np.mean(found[best]))
    assert table["cells"][0]["val_auc_std"] == pytest.approx(np.std(found[best], ddof=1))
    assert json.loads((base.out / "search.json").read_text()) == table
    rows = list(csv.DictReader((base.out / "search.csv").open()))
    assert [float(row["val_auc_mean"]) for row in rows] == [c["val_auc_mean"] for c in table["cells"]]
    with pytest.raises(RunExistsError, match="with other settings"):
        search(dataclasses.replace(base, window=2), GRID, [0, 1])


@pytest.mark.parametrize(
    ("grid", "seeds", "message"),
    [
        ({"optim.rate": [1]}, [0], "'optim.rate' is not a setting"),
        ({"seed": [1]}, [0], "'seed' is not a setting that a search can vary"),
        ({"optim.learning_rate": ["fast"]}, [0], "'fast' is no value of optim.learning_rate"),
        ({"optim.learning_rate": [-1.0]}, [0], "learning_rate must be > 0"),
        ({"k": []}, [0], "a value of every setting"),
        ({"k": [5]}, [], "at least one seed"),
    ],
)
def test_what_is_no_search_is_refused_before_the_first_run(
    base: TrainConfig, grid: dict, seeds: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        search(base, grid, seeds)
    assert not base.out.exists()


def test_the_command_reads_a_grid_file(
    base: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "grid.yaml").write_text("optim.learning_rate: [1.0e-3]\ndti.reset_layers: [[0], [-1]]\n")
    arguments = ["search", f"--data={base.data}", f"--out={base.out}", f"--grid={tmp_path / 'grid.yaml'}"]
    arguments += ["--seeds=[0]", "--k=3", "--window=3", "--progress=false", "--report_to=[]"]
    arguments += ["--model.layers=1", "--model.width=16", "--model.heads=2", "--model.kv_heads=1"]
    arguments += ["--model.mlp_width=24", "--optim.epochs=1", "--optim.token_budget=600"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "cell 2 of 2, learning_rate=0.001,reset_layers=" in printed
    assert "best: --optim.learning_rate 0.001 --dti.reset_layers" in printed
