"""The report of a run: every metric beside the baseline that is best in it, and a dash where one does not exist."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes

from dti_model.cli import main
from dti_model.evaluation import plot_report
from dti_model.evaluation.report import metrics_table, sentence_about_baselines

LINES = {
    "item_mean": {"auc": 0.7054, "log_loss": 0.6215, "gauc": 0.7047, "f1": 0.7219, "mean_prediction": 0.5682},
    "item_user_residual": {"auc": 0.7567, "log_loss": 0.5800, "gauc": 0.7071, "f1": 0.7435, "mean_prediction": 0.5541},
    "logistic_regression": {"auc": 0.7463, "log_loss": 0.5780, "gauc": 0.7059, "f1": 0.7403, "mean_prediction": 0.578},
}  # fmt: skip
MODEL = {"auc": 0.7670, "log_loss": 0.5697, "gauc": 0.6911, "f1": 0.7452, "mean_prediction": 0.5535}


def test_every_metric_is_judged() -> None:
    """A run was above every line by its AUC, and its GAUC was below four of them without a word."""
    assert sentence_about_baselines(MODEL, LINES) == (
        "beside the best baseline without text: AUC 0.7670 above item user residual's 0.7567 (better); "
        "log loss 0.5697 below logistic regression's 0.5780 (better); "
        "GAUC 0.6911 below item user residual's 0.7071 (worse)"
    )


def test_gradient_boosting_is_named_and_is_no_line_without_text() -> None:
    """It counts categories, which are parts of the item texts. A model below it alone has learnt the task: no warning."""
    lines = {**LINES, "gradient_boosting": {"auc": 0.7855, "log_loss": 0.5513, "gauc": 0.7206}}
    assert sentence_about_baselines(MODEL, lines) == (
        "beside the best baseline: AUC 0.7670 below gradient boosting's 0.7855 (worse); "
        "log loss 0.5697 above gradient boosting's 0.5513 (worse); GAUC 0.6911 below gradient boosting's 0.7206 (worse)"
    )
    warning = sentence_about_baselines({**MODEL, "auc": 0.75}, lines).splitlines()[1]
    assert "AUC 0.7500 is not above the best baseline without text (item user residual, 0.7567)" in warning


@pytest.mark.parametrize("auc", [0.7567, 0.7])
def test_an_auc_that_is_not_above_is_a_warning(auc: float) -> None:
    said, warning = sentence_about_baselines({**MODEL, "auc": auc, "log_loss": 0.6}, LINES).splitlines()
    place = (
        "below item user residual's 0.7567 (worse)" if auc == 0.7 else ", no better than item user residual;"
    )
    assert f"AUC {auc:.4f}{' ' if auc == 0.7 else ''}{place}" in said
    assert "log loss 0.6000 above logistic regression's 0.5780 (worse)" in said
    assert warning.startswith(f"WARNING: AUC {auc:.4f} is not above the best baseline without text")


def test_a_metric_that_does_not_exist() -> None:
    """null in metrics.json, NaN in Python."""
    for nothing in (None, math.nan):
        lines = {name: {**metrics, "gauc": nothing} for name, metrics in LINES.items()}
        model = {**MODEL, "gauc": nothing}
        assert sentence_about_baselines(model, lines).endswith("; no GAUC")
        facts = {"targets": 10, "base_rate": 0.5, "f1_always_yes": 0.6}
        table = metrics_table({"val": {**model, **facts}, "baselines": {"val": lines}})
        assert [line.split()[-3] for line in table.splitlines()[1:-1]] == ["-"] * 4
        assert "nan" not in table


def test_every_baseline_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There are four styles of lines: a fifth baseline was left out without a word."""
    drawn = []
    monkeypatch.setattr(Axes, "axhline", lambda *_, label, **__: drawn.append(label))
    baselines = {"val": {f"baseline {i}": {"auc": 0.5 + i / 100} for i in range(6)}}
    log = [{"epoch": 1.0, "loss": 0.7}, {"epoch": 1.0, "eval_auc": 0.6}]
    plot_report(tmp_path / "report.png", log, np.array([0, 1] * 20), np.linspace(0.1, 0.9, 40), baselines)
    assert drawn == [*baselines["val"]]


def no_constants(name: str) -> None:
    pytest.fail(f"{name} is not JSON")


def test_metrics_are_json(small_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """metrics.json held a bare NaN where no user had both classes, and strict readers refused it."""
    command = [
        "train",
        f"--data={small_folder}",
        f"--out={tmp_path / 'run'}",
        "--k=3",
        "--window=3",
        "--progress=false",
    ]
    command += [
        "--report-to=[]",
        "--model.layers=1",
        "--model.width=16",
        "--model.heads=2",
        "--model.kv-heads=1",
    ]
    # Two validation targets of two users.
    command += ["--optim.epochs=1", "--optim.token-budget=600", "--max-eval-targets=2", "--seed=12"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "run" / "metrics.json").read_text(), parse_constant=no_constants)
    assert None in (result["val"]["gauc"], result["test"]["gauc"])
    assert "beside the best baseline: AUC " in printed
    for split in ("val", "test"):
        evaluate = ["evaluate", f"--run={tmp_path / 'run'}", f"--split={split}", "--progress=false"]
        assert main([*evaluate, f"--json={tmp_path / 'out.json'}"]) == 0
        assert "beside the best baseline: AUC " in capsys.readouterr().out
        again = json.loads((tmp_path / "out.json").read_text(), parse_constant=no_constants)
        assert again[split] == result[split]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out.startswith("dti ")
