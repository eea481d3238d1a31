"""The README holds: its Python runs, its figures are those of the recorded results. Its commands: test_readme_commands.py."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from benchmarks.report import report
from benchmarks.synthetic import made_up_data
from dti_model.config import ModelConfig, TrainConfig
from dti_model.model import MODEL_FOLDER, Run
from tests.conftest import ROOT

TEXT = (ROOT / "README.md").read_text()
PYTHON_BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def test_python_blocks_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a folder with a quickstart run, untrained."""
    folder = tmp_path / "runs" / "quickstart"
    config = TrainConfig(
        data=made_up_data(tmp_path), out=folder, model=ModelConfig(layers=1, width=16, heads=2, kv_heads=1)
    )
    folder.mkdir(parents=True)
    config.save(folder)
    run = Run.start(config)
    run.save_model(folder / MODEL_FOLDER)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in PYTHON_BLOCKS:
        exec(block, names)
    assert names["q"].grad is not None
    ranked = [line for line in capsys.readouterr().out.splitlines() if line.startswith("0.")]
    assert len(ranked) == len(names["candidates"])
    probabilities = [float(line.split()[0]) for line in ranked]
    assert sorted(probabilities, reverse=True) == probabilities
    assert [len(scores) for scores in names["of_two_users"]] == [len(names["candidates"]), 2]
    assert any(line.endswith("The Grand Budapest Hotel (2014); Comedy, Drama") for line in ranked)


def test_ci_runs_the_test_command_of_the_readme() -> None:
    assert "\nmake test\n" in TEXT
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_generated_parts_are_those_of_the_results() -> None:
    assert report.render(TEXT) == TEXT


def test_paths_named_in_the_readme_exist() -> None:
    paths = [path for path in re.findall(r"\]\(([^)]+)\)", TEXT) if "://" not in path]
    assert len(paths) >= 6
    for path in paths:
        assert (ROOT / path).is_file(), path


def test_the_sentence_about_the_quickstart_is_that_of_its_record() -> None:
    """It once said that a model below the baselines has not learnt the task and that every run says so, above a test GAUC below all of
    them, of which the run said nothing."""
    metrics = json.loads(report.QUICKSTART.read_text())["metrics"]
    model, lines = metrics["test"], dict(metrics["baselines"]["test"])
    boosting = lines.pop("gradient_boosting")
    assert "The fifth and strongest line, gradient boosting, beats it in all three." in TEXT
    assert boosting["auc"] > model["auc"]
    assert boosting["log_loss"] < model["log_loss"]
    assert boosting["gauc"] > model["gauc"]
    baselines = lines.values()
    assert "This one beats those four\nin all three." in TEXT
    assert len(baselines) == 4
    assert all(model["auc"] > each["auc"] and model["gauc"] > each["gauc"] for each in baselines)
    assert all(model["log_loss"] < each["log_loss"] for each in baselines)


@pytest.mark.parametrize(
    ("name", "config"),
    [("quickstart", "quickstart"), *((f"ml-1m-half-seed-{seed}", "ml-1m") for seed in range(3))],
)
def test_recorded_runs_are_of_the_configuration_that_the_readme_names(name: str, config: str) -> None:
    """Figures of older settings stood below the text about the new ones for as long as nobody recorded a run."""
    path = ROOT / "configs" / f"{config}.yaml"
    recorded = json.loads((report.RESULTS / f"{name}.json").read_text())["settings"]
    for group, value in yaml.safe_load(path.read_text()).items():
        if group != "logging_steps":  # what is printed
            assert value == (
                recorded[group]
                if not isinstance(value, dict)
                else {key: recorded[group][key] for key in value}
            )
    if config == "quickstart":
        assert recorded["text"] is None
        assert f"FACTS = {recorded['context']}\n" in (ROOT / "Makefile").read_text()
    else:
        command = f'--text "{recorded["text"]}" --context-text "{recorded["context"]}"'
        assert command in path.read_text()


def test_what_strict_time_costs_is_that_of_its_record() -> None:
    plain = json.loads(report.QUICKSTART.read_text())["metrics"]
    strict = json.loads((report.RESULTS / "quickstart-strict.json").read_text())
    assert strict["strict_time"]
    assert strict["provenance"] == plain["provenance"]
    said = f"test AUC is {plain['test']['auc']:.4f} without and {strict['test']['auc']:.4f} with it"
    assert said in TEXT.replace("\n", " ")
