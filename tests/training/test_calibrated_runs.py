"""The calibration of a run: who uses it, who is asked not to, runs that have none, and a folder where it was tampered with."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import yaml

from dti_model.cli import main
from dti_model.config import DTIConfig, OptimConfig, TrainConfig
from dti_model.evaluation import OLDER_PREDICTION_COLUMNS, evaluate_run, fit_calibration, score_split
from dti_model.evaluation.report import calibration_lines
from dti_model.files import DamagedFileError, write_checksums
from dti_model.model import Calibration, Run, RunExistsError, export_run
from dti_model.model.fingerprints import settings_fingerprint
from dti_model.scorer import Scorer, score_file
from dti_model.training import search, train
from tests.training.small_runs import small_run, train_until


@pytest.fixture(scope="module")
def config(small_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    optim = OptimConfig(epochs=3, token_budget=300, learning_rate=1e-2, patience=0)
    out = tmp_path_factory.mktemp("calibrated") / "run"
    return small_run(small_folder, out, optim=optim, dti=DTIConfig(mode="dti-minus"))


@pytest.fixture(scope="module")
def result(config: TrainConfig) -> dict[str, Any]:
    return train(config)


def evaluated(folder: Path, **options: Any) -> dict[str, Any]:
    return evaluate_run(folder, None, "test", progress=False, **options)


def told(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "model" / "dti.json").read_text())
    return content


def change(folder: Path, calibration: Any) -> None:
    """Write another calibration, with checksums that fit; None: no field at all, as versions before it wrote."""
    content = {**told(folder), "calibration": calibration}
    if calibration is None:
        del content["calibration"]
    model = folder / "model"
    (model / "dti.json").write_text(json.dumps(content))
    card = (model / "README.md").read_text()
    for name in ("checksums.json", "README.md"):
        (model / name).unlink()
    write_checksums(model)
    (model / "README.md").write_text(card)


def test_it_is_fitted_to_validation(config: TrainConfig, result: dict[str, Any]) -> None:
    run = Run.load(config.out)
    labels = run.data.label[run.data.targets("val")]
    assert run.calibration == fit_calibration(labels, score_split(run, "val"))
    assert told(config.out)["calibration"] == dataclasses.asdict(run.calibration)
    facts = result["calibration"]
    assert {**facts, "before": 0, "after": 0} == {
        **told(config.out)["calibration"],
        "before": 0,
        "after": 0,
    }
    assert facts["after"]["val"]["log_loss"] < facts["before"]["val"]["log_loss"]
    for split in ("val", "test"):
        assert facts["after"][split] == {name: result[split][name] for name in ("log_loss", "ece")}
        assert facts["before"][split]["log_loss"] != facts["after"][split]["log_loss"]


def test_predictions_have_both(config: TrainConfig, result: dict[str, Any]) -> None:
    run = Run.load(config.out)
    assert run.calibration is not None
    for split in ("val", "test"):
        predictions = pl.read_parquet(config.out / f"predictions-{split}.parquet")
        raw = predictions["raw_probability"].to_numpy()
        assert (raw == score_split(run, split)).all()
        assert (predictions["probability"].to_numpy() == run.calibration(raw)).all()
        assert predictions["probability"].mean() == pytest.approx(result[split]["mean_prediction"])


def test_evaluate_uses_it_or_not(config: TrainConfig, result: dict[str, Any]) -> None:
    """AUC and GAUC are the same, and log loss and ECE those that metrics.json has of before."""
    calibrated, raw = evaluated(config.out), evaluated(config.out, calibration=False)
    assert calibrated["test"] == result["test"]
    for moment in ("before", "after"):
        assert calibrated["calibration"][moment] == {"test": result["calibration"][moment]["test"]}
    assert "calibration" not in raw
    before = result["calibration"]["before"]["test"]
    assert {name: raw["test"][name] for name in before} == before
    for name in ("auc", "gauc", "gauc_coverage"):
        assert raw["test"][name] == calibrated["test"][name]
    streaming = evaluated(config.out, k=3)["calibration"]
    assert streaming["temperature"] == result["calibration"]["temperature"]


def test_the_command_says_so(
    config: TrainConfig, result: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", f"--run={config.out}", "--progress=false"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    facts = result["calibration"]
    before, after = (facts[moment]["test"]["ece"] for moment in ("before", "after"))
    assert f"calibrated on validation (temperature {facts['temperature']:.3f}, " in printed
    assert f"ECE {before:.4f} -> {after:.4f}" in printed
    assert max(map(len, printed.split("calibrated on")[0].splitlines())) <= 80
    assert main([*command, "--calibration=false"]) == 0
    assert "calibrated on" not in capsys.readouterr().out


def test_the_scorer_uses_it_or_not(config: TrainConfig, result: dict[str, Any], tmp_path: Path) -> None:
    """From a run and from an export, whose plain prompt says it too."""
    calibration = Calibration.from_dict(result["calibration"])
    export = tmp_path / "export"
    assert export_run(config.out, export).calibration == calibration
    ids = Run.load(config.out).data.item_ids
    history, candidates = [(ids[0], 1), (ids[1], 0)], ids[2:5]
    scores = {}
    for on in (True, False):
        scorer = Scorer.from_run(config.out, calibration=on)
        scores[on] = scorer.score(history, candidates)
        again = Scorer.from_export(export, config.data, calibration=on)
        assert (again.score(history, candidates) == scores[on]).all()
        assert (scorer.score(scorer.encode(history), candidates) == scores[on]).all()
    assert (scores[True] == calibration(scores[False])).all()
    assert (scores[True] != scores[False]).all()
    card = (export / "README.md").read_text()
    assert f"TEMPERATURE, BIAS = {calibration.temperature!r}, {calibration.bias!r}" in card


def test_a_job_of_another_calibration_is_another(
    config: TrainConfig, result: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    requests = tmp_path / "in.jsonl"
    candidates = Run.load(config.out).data.item_ids[:2]
    lines = [json.dumps({"history": [], "candidates": candidates})] * 65 + ["{}"]
    requests.write_text("\n".join(lines) + "\n")
    command = ["score", f"--run={config.out}", f"--input={requests}", "--progress=false"]
    command.append(f"--output={tmp_path / 'out.jsonl'}")
    assert main(command) == 2  # the last line is bad, and the others are kept
    capsys.readouterr()
    assert main([*command, "--calibration=false", "--bad-lines=skip"]) == 2
    assert "belongs to a job with another calibration: delete it" in capsys.readouterr().err
    assert main([*command, "--bad-lines=skip"]) == 0
    calibrated = json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])["probabilities"]
    raw = Scorer.from_run(config.out, calibration=False)
    score_file(raw, requests, tmp_path / "raw.jsonl", skip_bad_lines=True, progress=False)
    others = json.loads((tmp_path / "raw.jsonl").read_text().splitlines()[0])["probabilities"]
    calibration = Calibration.from_dict(result["calibration"])
    assert calibrated == pytest.approx(calibration(others).tolist(), abs=1e-8)
    assert calibrated != others


@pytest.fixture
def copied(config: TrainConfig, result: dict[str, Any], tmp_path: Path) -> Path:
    shutil.copytree(config.out, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    return tmp_path / "run"


def test_an_older_run_has_none(copied: Path, result: dict[str, Any], tmp_path: Path) -> None:
    """It scores as it did; so does its export."""
    change(copied, None)
    assert Run.load(copied).calibration is None
    found = evaluated(copied)
    assert "calibration" not in found
    before = result["calibration"]["before"]["test"]
    assert {name: found["test"][name] for name in before} == before
    assert export_run(copied, tmp_path / "export").calibration is None
    assert Scorer.from_export(tmp_path / "export").click_model.calibration is None


@pytest.mark.parametrize(
    "calibration", [{"temperature": 0.0, "bias": 0.1}, {"temperature": 1.0}, "none", [1, 2]]
)
def test_a_calibration_that_is_none_is_refused(copied: Path, calibration: Any) -> None:
    change(copied, calibration)
    with pytest.raises(DamagedFileError, match=r"dti\.json is damaged \(.*\)\. .*again"):
        Run.load(copied)
    assert Run.load(copied, calibration=False).calibration is None


def test_a_changed_calibration_is_damage(copied: Path) -> None:
    """Even one that is a calibration: the folder's checksums know another."""
    content = {**told(copied), "calibration": {"temperature": 1.5, "bias": 0.1}}
    (copied / "model" / "dti.json").write_text(json.dumps(content))
    for load in (Run.load, Scorer.from_run):
        with pytest.raises(DamagedFileError, match=r"dti\.json"):
            load(copied)


def test_a_run_may_do_without(config: TrainConfig, result: dict[str, Any], tmp_path: Path) -> None:
    """The same run, but for what the calibration changes; and validation alone is enough for one."""
    without = train(dataclasses.replace(config, out=tmp_path / "without", calibrate=False, score_test=False))
    assert "calibration" not in without
    assert told(tmp_path / "without")["calibration"] is None
    before = result["calibration"]["before"]["val"]
    assert {name: without["val"][name] for name in before} == before
    assert (without["val"]["auc"], without["val"]["gauc"]) == (result["val"]["auc"], result["val"]["gauc"])
    predictions = pl.read_parquet(tmp_path / "without" / "predictions-val.parquet")
    assert (predictions["probability"] == predictions["raw_probability"]).all()


def test_it_takes_the_targets_that_are_scored(small_folder: Path, tmp_path: Path) -> None:
    few = small_run(small_folder, tmp_path / "run", max_eval_targets=12, score_test=False)
    result = train(few)
    predictions = pl.read_parquet(few.out / "predictions-val.parquet")
    assert len(predictions) == 12
    found = fit_calibration(predictions["label"].to_numpy(), predictions["raw_probability"].to_numpy())
    assert Calibration.from_dict(result["calibration"]) == found
    assert result["calibration"]["before"].keys() == {"val"}


def test_a_run_that_began_before_there_was_one(small_folder: Path, tmp_path: Path) -> None:
    """Its fingerprint is the same; when it goes on, its settings say whether it gets one."""
    config = small_run(small_folder, tmp_path / "run", optim=OptimConfig(epochs=2, token_budget=300))
    train_until(8, config)
    file = config.out / "config.yaml"
    settings = yaml.safe_load(file.read_text())
    assert settings.pop("calibrate") is True
    settings.pop("select_by")
    file.write_text(yaml.safe_dump(settings))  # without a seal: the lines of a seal are tested elsewhere
    older = TrainConfig.load(config.out)
    assert (older.calibrate, older.select_by) == (False, "auc")
    assert settings_fingerprint(older) == settings_fingerprint(config)
    # Killed while it wrote its results, before their last column was there.
    values = [["1"], ["2"], [3], [1], [0.5]]
    predictions = config.out / "predictions-val.parquet"
    pl.DataFrame(dict(zip(OLDER_PREDICTION_COLUMNS, values))).write_parquet(predictions)
    assert "calibration" in train(config)
    assert pl.read_parquet(predictions).columns == [*OLDER_PREDICTION_COLUMNS, "raw_probability"]


def test_a_search_does_not_mix(small_folder: Path, tmp_path: Path) -> None:
    """Log losses with and without a calibration were in one mean."""
    base = small_run(small_folder, tmp_path / "search", calibrate=False)
    search(base, {"k": [3]}, [0])
    with pytest.raises(RunExistsError, match="finished without a calibration, .* give --calibrate false"):
        search(dataclasses.replace(base, calibrate=True), {"k": [3]}, [0])
    assert len(search(base, {"k": [3]}, [0])["cells"]) == 1


def test_a_temperature_at_its_limit_is_said() -> None:
    facts = {
        "before": {"val": {"log_loss": 0.7, "ece": 0.1}},
        "after": {"val": {"log_loss": 0.6, "ece": 0.05}},
    }
    said = calibration_lines({"temperature": 2.0, "bias": -0.1, **facts})
    assert said == (
        "calibrated on validation (temperature 2.000, bias -0.100): val log loss 0.7000 -> 0.6000, ECE 0.1000 -> 0.0500"
    )
    assert "WARNING: the temperature ended at its limit, 10: higher scores do not mean" in calibration_lines(
        {"temperature": 10.0, "bias": np.float64(0), **facts}
    )
