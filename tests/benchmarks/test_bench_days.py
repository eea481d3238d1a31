"""The benchmark of new days: which rows every arm is trained and scored on, and what its rows say. Its AUCs prove nothing."""

from __future__ import annotations

import datetime
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import bench_days
from benchmarks.bench_days import ALONE, ANEW, CONTINUED, Bench, Days
from benchmarks.recording import RESULTS, read_rows
from benchmarks.report.days import days_table
from dti_model.cli import main
from dti_model.config import TrainConfig
from dti_model.data import PreparedData
from dti_model.model import Run
from tests.data.movielens_files import some_ratings, write_1m

FIRST, DAY = 120, 20  # seconds


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("days")
    raw = write_1m(folder / "raw", some_ratings(60))
    words = ["--raw-dir", str(raw), "--out", str(folder / "data"), "--subset", "--vocab-size", "300"]
    assert main(["prepare", "ml-1m", *words, "--min-context", "2"]) == 0
    return folder / "data"


def test_every_model_is_trained_up_to_a_day_and_scored_on_the_next(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in RESULTS.iterdir()}
    out, runs = tmp_path / "rows.jsonl", tmp_path / "runs"
    moment = datetime.datetime.fromtimestamp(FIRST, datetime.UTC).replace(tzinfo=None).isoformat()
    words = ["--data", str(source), "--first", moment, "--period", str(DAY / 86_400), "--size", "smoke"]
    words += ["--runs", str(runs), "--out", str(out), "--k", "3", "--width", "32"]
    words += ["--seeds", "2", "--context-text", "{item_rate}", "--title-tokens", "5", "--window", "3"]
    monkeypatch.setattr(sys, "argv", ["bench_days", *words])
    assert bench_days.main() == 0
    assert "continuing costs " in capsys.readouterr().out
    rows = read_rows(out)
    by_day = [row for row in rows if row["benchmark"] == "days"]
    assert [(row["seed"], row["arm"], row["targets"] > 0) for row in by_day] == [
        (seed, arm, True) for seed in (0, 1) for _ in (1, 2) for arm in (CONTINUED, ANEW, ALONE)
    ]
    whole, days = PreparedData.open(source), Days(PreparedData.open(source), np.zeros(0), FIRST, DAY)
    for day in (1, 2):
        folder = PreparedData.open(runs / f"data-{day}")
        assert int(folder.timestamp.max()) < FIRST + day * DAY <= int(whole.timestamp.max())
        anew, continued = by_day[3 * day - 2], by_day[3 * day - 3]
        assert anew["trained_targets"] == folder.targets("train").size
        assert continued["trained_targets"] == folder.targets("train", after=day).size
        # One is scored on the rows of the day after, in which neither has been trained.
        scored = PreparedData.open(runs / f"data-{day + 1}")
        targets = days.targets(scored, day + 1)
        times = scored.timestamp[targets]
        assert times.min() >= FIRST + day * DAY
        assert times.max() < FIRST + (day + 1) * DAY
        assert {row["targets"] for row in by_day[3 * day - 3 : 3 * day]} == {len(targets)}
    assert TrainConfig.load(runs / "seed-1" / "continued-1").init == runs / "seed-1" / "first"
    assert TrainConfig.load(runs / "seed-1" / "continued-2").init == runs / "seed-1" / "continued-1"
    assert TrainConfig.load(runs / "seed-1" / "anew-2").init is None
    config = TrainConfig.load(runs / "seed-1" / "anew-2")
    assert (config.seed, config.window) == (1, 3)
    rules = PreparedData.open(runs / "data-2").stats
    assert rules["source"]["context"]["text"] == "{item_rate}"
    assert Run.load(runs / "seed-1" / "first").train_targets.size == PreparedData.open(runs / "data-0").targets("train").size  # fmt: skip
    totals = {row["arm"]: row for row in rows if row["benchmark"] == "days-total"}
    assert totals[ALONE]["trained_targets"] == totals[ALONE]["seconds"] == 0
    assert totals[ANEW]["trained_targets"] == np.mean([by_day[1]["trained_targets"], by_day[4]["trained_targets"]])  # fmt: skip
    differences = {row["arm"]: row for row in rows if row["benchmark"] == "days-difference"}
    for arm in (CONTINUED, ALONE):
        gap = totals[arm]["auc"] - totals[ANEW]["auc"]  # each the mean of two seeds
        assert differences[arm]["auc_difference"] == pytest.approx(gap, abs=2e-5)
    # Again: everything is there.
    monkeypatch.setattr(Bench, "_config", lambda *_: pytest.fail("trained again"))
    assert bench_days.main() == 0
    again = read_rows(out)[len(rows) :]
    assert [row["auc"] for row in again if "auc" in row] == [row["auc"] for row in rows if "auc" in row]
    assert days_table(rows).count("\n| ") == 3
    assert "(item texts and `{item_rate}`, titles of 5 items as one token), mean of 2 seeds" in days_table(
        rows
    )
    assert f"| {CONTINUED} | {totals[CONTINUED]['auc']:.4f} |" in days_table(rows)
    assert {path: path.read_bytes() for path in RESULTS.iterdir()} == before


def test_models_of_other_settings_are_refused(tmp_path: Path) -> None:
    """More days and seeds may come to a folder's models; older folders say nothing of theirs."""
    settings = {"window": 20, "days": 3, "seeds": 1, "rate": 2e-3}
    bench_days.claim(tmp_path / "a", settings)
    bench_days.claim(tmp_path / "a", {**settings, "days": 4, "seeds": 3})
    with pytest.raises(SystemExit, match=r"other settings \(rate, window\).*--runs"):
        bench_days.claim(tmp_path / "a", {**settings, "window": 50, "rate": 1e-3})
    (tmp_path / "b" / "data--1").mkdir(parents=True)
    with pytest.raises(SystemExit, match="other settings"):
        bench_days.claim(tmp_path / "b", settings)


def test_the_claim() -> None:
    row = {"benchmark": "days-difference", "arm": CONTINUED, "share_of_seconds": 0.1, "auc_difference": -0.002}  # fmt: skip
    assert bench_days.verdict([row])[1]
    for worse in ({"share_of_seconds": 0.11}, {"auc_difference": -0.0021}):
        said, holds = bench_days.verdict([{**row, **worse}])
        assert not holds
        assert said.endswith("it does not hold")
