"""A search chooses on validation over seeds, goes on where it was, and refuses what is no setting."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from dti_model.cli import main
from dti_model.config import ModelConfig, TrainConfig
from dti_model.model import RunExistsError
from dti_model.model.fingerprints import OtherOriginError
from dti_model.training import grid_search as searching
from dti_model.training.grid_search import cell_config, cell_name, search
from tests.files.test_damage import unsealed
from tests.model.pretrained_files import pretrained_folder
from tests.training.small_runs import small_run

GRID = {"optim.learning_rate": [0.001, 0.03], "dti.alpha_max": [0.5]}


@pytest.fixture
def base(small_folder: Path, tmp_path: Path) -> TrainConfig:
    return small_run(small_folder, tmp_path / "search")


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
        ({"optim": [{"epochs": 1}]}, [0], "'optim' is not a setting"),
        ({"k": ["010"]}, [0], "'010' is no value of k: k must be >= 0"),
        ({"k": [5.0]}, [0], "5.0 is no value of k: k must be >= 0"),
        ({"optim.learning_rate": ["fast"]}, [0], "'fast' is no value of optim.learning_rate"),
        ({"optim.learning_rate": [-1.0]}, [0], "learning_rate must be > 0"),
        ({"k": []}, [0], "a value of every setting"),
        ({"k": [5]}, [], "at least one seed"),
        (
            {"k": [5], "optim.learning_rate": [0.001, "1e-3"]},
            [0],
            r"one cell twice, --k 5 --optim.learning-rate 0.001 and --k 5 --optim.learning-rate 1e-3:",
        ),
        ({"model.pretrained": ["b/x", "./b/x/"]}, [0], "one cell twice"),
        (
            {"model.pretrained": ["b/x", "b_x"]},
            [0],
            "--model.pretrained b/x and --model.pretrained b_x would share the folder pretrained=b_x:",
        ),
        ({"model.instruction": ["a b", "ab"]}, [0], "would share the folder instruction=ab:"),
    ],
)
def test_what_is_no_search_is_refused_before_the_first_run(
    base: TrainConfig,
    grid: dict,
    seeds: list[int],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two cells in one folder, or one cell twice, were found out after hours, or not at all."""
    monkeypatch.chdir(tmp_path)
    if any(name.startswith("model.") for name in grid):
        for name in ("b/x", "b_x"):
            (tmp_path / name).mkdir(parents=True)
            (tmp_path / name / "config.json").touch()
        base = dataclasses.replace(base, model=ModelConfig(pretrained="b/x"))
    with pytest.raises(ValueError, match=message):
        search(base, grid, seeds)
    assert not base.out.exists()


@pytest.mark.parametrize(
    ("name", "value", "setting"),
    [
        ("dti.alpha_max", 1, 1.0),
        ("dti.alpha_max", "1", 1.0),
        ("dti.reset_layers", [0, -1], (0, -1)),
        ("dti.reset_layers", "[0]", (0,)),
        ("model.dropout", 0, 0.0),
        ("model.dropout", "null", None),
        ("model.layers", "2", 2),
        ("optim.precision", "bf16", "bf16"),
        ("optim.learning_rate", "1e-3", 1e-3),
        ("report_to", [], ()),
    ],
)
def test_values_take_the_types_of_their_settings(
    base: TrainConfig, name: str, value: Any, setting: Any
) -> None:
    found: Any = cell_config(base, {name: value}, seed=0)
    for part in name.split("."):
        found = getattr(found, part)
    assert repr(found) == repr(setting)


def test_the_command_reads_a_grid_file(
    base: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "grid.yaml").write_text("optim.learning_rate: [1.0e-3]\ndti.reset_layers: [[0], [-1]]\n")
    arguments = ["search", f"--data={base.data}", f"--out={base.out}", f"--grid={tmp_path / 'grid.yaml'}"]
    arguments += ["--seeds=[0]", "--k=3", "--window=3", "--progress=false", "--report-to=[]"]
    arguments += ["--model.layers=1", "--model.width=16", "--model.heads=2", "--model.kv-heads=1"]
    arguments += ["--model.mlp-width=24", "--optim.epochs=1", "--optim.token-budget=600"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "cell 2 of 2, learning_rate=0.001,reset_layers=" in printed
    assert "best: --optim.learning-rate 0.001 --dti.reset-layers" in printed


def test_names_of_cells_and_the_marker_stay() -> None:
    """Folders of searches go on."""
    assert searching.MARKER == {"made by": "dti search"}
    assert cell_name({}) == "base"
    assert (
        cell_name({"optim.learning_rate": 0.001, "dti.alpha_max": 0.5}) == "learning_rate=0.001,alpha_max=0.5"
    )
    assert cell_name({"dti.reset_layers": [0, -1]}) == "reset_layers=[0,-1]"
    assert cell_name({"model.pretrained": "models/x"}) == "pretrained=models_x"


def test_a_finished_cell_of_another_base_model_is_refused(
    base: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its metrics were reported as those of the model that was asked for, and nothing was trained."""
    one = pretrained_folder(tmp_path / "one")
    shutil.copytree(one, tmp_path / "moved")
    pretrained_folder(tmp_path / "two", initializer_range=0.1)
    shutil.copytree(one, tmp_path / "tokens")
    tokenizer = AutoTokenizer.from_pretrained(one)
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(tmp_path / "tokens")

    def of(name: str) -> TrainConfig:
        return dataclasses.replace(base, model=ModelConfig(pretrained=str(tmp_path / name)))

    table = search(of("one"), {"k": [3]}, [0])
    monkeypatch.setattr(searching, "train", lambda _: pytest.fail("trained"))
    assert search(of("moved"), {"k": [3]}, [0]) == table
    for name, what in (("two", "pretrained model"), ("tokens", "tokenizer")):
        before = (base.out / "search.json").read_bytes()
        # Also where another cell, which is not finished, comes before it.
        with pytest.raises(
            OtherOriginError, match=f"the {what} of this search is not what .*k=3/seed-0 was"
        ) as error:
            search(of(name), {"k": [2, 3]}, [0])
        assert "give the former one, or search into another --out" in str(error.value)
        assert (base.out / "search.json").read_bytes() == before


@pytest.mark.parametrize("name", ["search.csv", "search.json", "search-folder.json"])
def test_a_search_writes_through_no_link(
    base: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Their targets were written over, also by a search that had begun before the link came."""
    mine = tmp_path / "mine"
    mine.write_text(
        '{"made by": "dti search"}' if name == "search-folder.json" else '{"cells": 1, "best": 1}'
    )
    before = mine.read_bytes()

    def train(_: TrainConfig) -> dict:
        (base.out / name).unlink(missing_ok=True)
        (base.out / name).symlink_to(mine)
        return {"val": {"auc": 0.5, "log_loss": 0.5, "gauc": 0.5}}

    monkeypatch.setattr(searching, "train", train)
    for _ in range(2):
        with pytest.raises(RunExistsError, match=f"{name} is a symbolic link, and the search writes a file"):
            search(base, {"k": [3]}, [0])
        monkeypatch.setattr(searching, "train", lambda _: pytest.fail("trained"))
    (base.out / name).unlink()
    (base.out / name).mkdir()
    with pytest.raises(RunExistsError, match=f"{name} is no regular file"):
        search(base, {"k": [3]}, [0])
    assert mine.read_bytes() == before


@pytest.mark.parametrize(
    "content", ["", "mine", "[]", '{"made by": "me"}', '{"made by": "dti search", "a": 1}']
)
def test_a_marker_of_something_else_makes_no_search_folder(
    base: TrainConfig, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    """A file of that name was enough, whatever it held: the tables beside it were replaced."""
    monkeypatch.setattr(searching, "train", lambda _: pytest.fail("trained"))
    base.out.mkdir()
    files = {"search-folder.json": content, "search.csv": "a,b\n", "search.json": "{}"}
    for name, text in files.items():
        (base.out / name).write_text(text)
    with pytest.raises(
        RunExistsError, match=r"is not the folder of a search \(it holds search-folder.json\)"
    ):
        search(base, {"k": [3]}, [0])
    assert {path.name: path.read_text() for path in base.out.iterdir()} == files


def test_a_search_goes_on_over_a_damaged_marker(base: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cells say whose the folder is."""
    table = search(base, {"k": [3]}, [0])
    (base.out / "search-folder.json").write_text("")
    monkeypatch.setattr(searching, "train", lambda _: pytest.fail("trained"))
    assert search(base, {"k": [3]}, [0]) == table
    assert json.loads((base.out / "search-folder.json").read_text()) == searching.MARKER


def test_a_finished_cell_that_was_damaged_is_not_read(base: TrainConfig) -> None:
    search(base, {"k": [3]}, [0])
    path = base.out / "k=3" / "seed-0" / "metrics.json"
    metrics = json.loads(path.read_text())
    metrics["val"]["auc"] = 0.9999
    path.write_text(json.dumps(metrics, indent=2) + "\n")
    with pytest.raises(ValueError, match=r"metrics\.json .*Delete .*seed-0 and give the same command again"):
        search(base, {"k": [3]}, [0])
    (path.parent / "checksums.json").unlink()
    with pytest.raises(ValueError, match=r"checksums\.json is missing. Delete .*seed-0"):
        search(base, {"k": [3]}, [0])
    (path.parent / "model" / "provenance.json").unlink()
    unsealed(path.parent)  # as version 0.1.0 left it
    path.write_text("{")
    with pytest.raises(ValueError, match=r"metrics\.json is damaged .*Delete .*seed-0"):
        search(base, {"k": [3]}, [0])
