"""The report of a run: every metric beside the baseline that is best in it, and a dash where one does not exist."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

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
    """There were four styles of lines: a fifth baseline was left out without a word, and then had the first one's."""
    drawn, styles = [], []

    def noted(*_: Any, label: str, linestyle: Any, **__: Any) -> None:
        drawn.append(label)
        styles.append(linestyle)

    monkeypatch.setattr(Axes, "axhline", noted)
    baselines = {"val": {f"baseline {i}": {"auc": 0.5 + i / 100} for i in range(6)}}
    log = [{"epoch": 1.0, "loss": 0.7}, {"epoch": 1.0, "eval_auc": 0.6}]
    plot_report(tmp_path / "report.png", log, np.array([0, 1] * 20), np.linspace(0.1, 0.9, 40), baselines)
    assert drawn == [*baselines["val"]]
    assert len(set(styles[:5])) == 5


def test_the_axis_of_losses_is_that_of_later_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = []
    set_ylim = Axes.set_ylim

    def noted(self: Axes, *args: Any, **kwargs: Any) -> Any:
        limits.append(args)
        return set_ylim(self, *args, **kwargs)

    monkeypatch.setattr(Axes, "set_ylim", noted)
    for losses in ([8.0, 2.3, 0.6, 0.58, 0.57, 0.56], [0.7]):
        log = [{"epoch": float(i), "loss": loss} for i, loss in enumerate(losses)]
        log.append({"epoch": 1.0, "eval_auc": 0.6})
        plot_report(
            tmp_path / "report.png", log, np.array([0, 1] * 20), np.linspace(0.1, 0.9, 40), {"val": {}}
        )
    of_losses = [args for args in limits if len(args) == 2]
    assert of_losses == [pytest.approx((0.556, 0.608)), pytest.approx((0.6, 0.9))]


def test_calibration_is_drawn_before_and_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One curve where there is no calibration; the split is the one of the labels."""
    drawn: list[tuple[str, int]] = []
    titles: list[str] = []
    errorbar, set_title = Axes.errorbar, Axes.set_title

    def note_curve(self: Axes, x: np.ndarray, *args: Any, label: str, **kwargs: Any) -> Any:
        drawn.append((label, len(x)))
        return errorbar(self, x, *args, label=label, **kwargs)

    def note_title(self: Axes, title: str, *args: Any, **kwargs: Any) -> Any:
        titles.append(title)
        return set_title(self, title, *args, **kwargs)

    monkeypatch.setattr(Axes, "errorbar", note_curve)
    monkeypatch.setattr(Axes, "set_title", note_title)
    baselines = {"val": {"item mean": {"auc": 0.5}}}
    log = [{"epoch": 1.0, "loss": 0.7}, {"epoch": 1.0, "eval_auc": 0.6}]
    labels, scores = np.array([0, 1] * 20), np.full(40, 0.75)
    plot_report(tmp_path / "report.png", log, labels, np.linspace(0.4, 0.6, 40), baselines, raw=scores)
    assert [label.split(", ")[0] for label, _ in drawn] == ["as trained", "calibrated"]
    assert drawn[0] == ("as trained, ECE 0.2500", 1)
    assert drawn[1][1] == 10
    assert titles[-1] == "calibration on test"
    plot_report(tmp_path / "report.png", log, labels, scores, baselines, split="val")
    assert drawn[2:] == [("model, ECE 0.2500", 1)]
    assert titles[-1] == "calibration on validation"


def test_a_table_has_the_columns_of_its_run() -> None:
    """Runs of earlier versions have no ECE; their tables are as they were. With it, the lines are no longer than a terminal's."""
    facts = {"targets": 10, "base_rate": 0.5, "f1_always_yes": 0.6}
    older = metrics_table({"val": {**MODEL, **facts}, "baselines": {"val": LINES}}).splitlines()
    assert older[0].split() == ["val:", "AUC", "log", "loss", "GAUC", "F1", "mean", "p"]
    assert {len(line) for line in older[:-1]} == {74}
    newer = metrics_table({"val": {**MODEL, "ece": 0.0123, **facts}, "baselines": {"val": LINES}})
    lines = newer.splitlines()
    assert lines[-2].split() == ["model", "0.7670", "0.5697", "0.0123", "0.6911", "0.7452", "0.5535"]
    assert lines[1].split()[4] == "-"
    assert {len(line) for line in lines[:-1]} == {78}


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
