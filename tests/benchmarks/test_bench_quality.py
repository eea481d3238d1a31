"""The quality benchmark: small data keeps whole users, runs are shared and resumed, differences are right. Its AUCs prove nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from benchmarks import bench_quality
from benchmarks.quality import PLANS, SIZES, Cell, scores_of
from benchmarks.quality import full as quality_full
from benchmarks.quality.runs import UserBatches, restrict_targets
from benchmarks.quality.stats import auc_difference, weighted_auc
from benchmarks.recording import RESULTS, read_rows
from dti_model.cli import main
from dti_model.config import TrainConfig
from dti_model.data import PreparedData, prepare
from dti_model.model.run import Run
from dti_model.prompts import PackedPrompts, Prompts
from tests.data.movielens_files import some_ratings, write_1m


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared data of 60 users in MovieLens-1M's format."""
    raw, out = tmp_path_factory.mktemp("raw"), tmp_path_factory.mktemp("prepared") / "data"
    prepare("ml-1m", out, write_1m(raw, some_ratings(60)), subset=True, vocab_size=400)
    return out


def test_small_data_keeps_whole_users_and_histories(folder: Path, tmp_path: Path) -> None:
    restrict_targets(folder, tmp_path / "small", train_targets=60, val_share=0.5, test_share=1.0)
    whole, small = PreparedData.open(folder), PreparedData.open(tmp_path / "small")
    assert (whole.item == small.item).all()
    assert (whole.label == small.label).all()
    kept, all_rows = small.targets("train"), whole.targets("train")
    users = np.unique(small.users_of(kept))
    assert len(users) < len(np.unique(whole.users_of(all_rows)))
    assert len(kept) >= 60 > len(kept) - 3  # no user has more than 3 targets
    np.testing.assert_array_equal(kept, all_rows[np.isin(whole.users_of(all_rows), users)])
    assert len(small.targets("val")) == round(0.5 * len(whole.targets("val")))
    np.testing.assert_array_equal(small.targets("test"), whole.targets("test"))
    assert small.fingerprint != whole.fingerprint
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_batches_of_few_users_hold_every_prompt_once(folder: Path) -> None:
    run = Run.start(TrainConfig(data=folder, out=folder / "unused", window=3))
    prompts = Prompts.streaming(run.data, run.data.targets("train"), 3, 1)
    users = run.data.users_of(prompts.first)
    mean_users = {}
    for kind in (PackedPrompts, UserBatches):
        dataset = kind(run.builder, prompts, 300, 0)
        dataset.set_epoch(1)
        assert sorted(np.concatenate(dataset.plan).tolist()) == list(range(len(prompts)))
        assert len(dataset) == len(dataset.plan)
        mean_users[kind] = np.mean([len(np.unique(users[batch])) for batch in dataset.plan])
    assert mean_users[UserBatches] < 0.7 * mean_users[PackedPrompts]


def test_a_killed_benchmark_goes_on_and_plans_share_runs(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = []
    run_cell = bench_quality.run_cell

    def counting(cell, data, out):
        if not (out / "cell.json").exists():
            trained.append(cell.name)
            if len(trained) == 4:
                raise KeyboardInterrupt
        return run_cell(cell, data, out)

    monkeypatch.setattr(bench_quality, "run_cell", counting)
    with pytest.raises(KeyboardInterrupt):
        bench_quality.run(["table1"], "smoke", folder, tmp_path, record=False)
    assert not (tmp_path / "quality-table1.jsonl").exists()
    bench_quality.run(["table1", "figure3", "depth", "whole"], "smoke", folder, tmp_path, record=False)
    assert len(trained) == len(set(trained)) + 1  # the killed one twice, no other
    rows = {
        plan: [json.loads(line) for line in (tmp_path / f"quality-{plan}.jsonl").read_text().splitlines()]
        for plan in ("table1", "figure3", "depth", "whole")
    }
    of_arm = {
        plan: {(row["arm"], row["seed"]): row for row in plan_rows if row["benchmark"] == "quality"}
        for plan, plan_rows in rows.items()
    }
    shared = ("DTI-minus, k = 2", 0)
    assert of_arm["table1"][shared]["run"] == of_arm["figure3"][shared]["run"]
    assert {row["mode"] for row in of_arm["figure3"].values()} >= {"dti-minus", "dti-position"}
    for row in of_arm["table1"].values():
        assert 0 <= row["test_auc"] <= 1
        assert row["train_targets"] >= 60
    sliding, stream = of_arm["table1"]["SW", 0], of_arm["table1"]["DTI, k = 2", 0]
    assert sliding["steps"] == stream["steps"]  # equal targets per optimizer step
    assert sliding["rows_per_target"] > 1.3 * stream["rows_per_target"]
    assert not any("test_auc" in row for row in of_arm["whole"].values())  # decides on validation
    assert {row["model"] for row in of_arm["depth"].values()} == {"4 x 16"}
    assert all(0 <= row["val-streaming_auc"] <= 1 for row in of_arm["depth"].values())
    differences = [row for row in rows["table1"] if row["benchmark"] == "quality-difference"]
    assert {row["against"] for row in differences} == {"SW", "SW, position fix"}
    assert all(row["low"] <= row["auc_difference"] <= row["high"] for row in differences)


def test_recorded_runs_keep_their_names() -> None:
    """Settings that cells have got since are in no name: otherwise every finished run would be trained anew."""
    for path in sorted(RESULTS.glob("quality-*.jsonl")):
        rows = [row for row in read_rows(path) if row["benchmark"] == "quality"]
        plan = PLANS[rows[0]["plan"]](SIZES[rows[0]["size"]])
        names = {(arm.name, cell.seed): cell.name for arm in plan.arms for cell in arm.cells}
        assert {(row["arm"], row["seed"]): row["run"] for row in rows}.items() <= names.items()
    assert len({Cell(1).name, Cell(1, precision="bf16").name, Cell(1, val_share=1.0).name}) == 3


def test_both_precisions_on_every_validation_target(folder: Path, tmp_path: Path) -> None:
    """Each run is judged in its own precision, and scored in both."""
    bench_quality.run(["precision"], "smoke", folder, tmp_path, record=False)
    rows = read_rows(tmp_path / "quality-precision.jsonl")
    *runs, difference, of_float32, of_bfloat16 = rows
    assert [(row["precision"], row["seed"]) for row in runs] == [
        (precision, seed) for precision in ("fp32", "bf16") for seed in (0, 1)
    ]
    for row in (difference, of_float32, of_bfloat16):
        assert row["seeds"] == [2, 2]
        assert row["low"] <= row["auc_difference"] <= row["high"]
    assert [row["arm"] for row in (of_float32, of_bfloat16)] == list(
        dict.fromkeys(row["arm"] for row in runs)
    )
    for row, arm in ((of_float32, runs[:2]), (of_bfloat16, runs[2:])):
        expected = np.mean([run["val-bf16_auc"] - run["val-fp32_auc"] for run in arm])
        assert row["auc_difference"] == pytest.approx(expected, abs=2e-5)  # of rounded AUCs
    assert difference["targets"] == len(PreparedData.open(folder).targets("val"))
    for row in runs:
        of_run = tmp_path / "smoke" / "runs" / row["run"]
        scores = {name: scores_of(of_run, name) for name in ("val", "val-fp32", "val-bf16")}
        own, other = ("val-fp32", "val-bf16")[:: 1 if row["precision"] == "fp32" else -1]
        np.testing.assert_array_equal(scores["val"], scores[own])
        assert np.abs(scores["val"] - scores[other]).max() > 0
        assert row["val_auc"] == row[f"{own}_auc"]


def test_other_data_in_the_same_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    bench_quality.Bench("smoke", folder, tmp_path)
    other = tmp_path / "other"
    prepare("ml-1m", other, write_1m(tmp_path / "raw", some_ratings(30)), subset=True, vocab_size=400)
    with pytest.raises(ValueError, match="other data"):
        bench_quality.Bench("smoke", other, tmp_path)


def test_weighted_auc_is_that_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 200)
    scores = np.round(rng.random(200), 1)  # many ties
    weights = rng.integers(0, 4, (5, 200)).astype(float)
    found = weighted_auc(labels, scores, weights)
    for weight, auc in zip(weights, found):
        assert auc == pytest.approx(roc_auc_score(labels, scores, sample_weight=weight), abs=1e-12)


def test_paired_differences_find_what_is_there() -> None:
    """Equal models differ by 0 exactly; a better one is found although its AUC's own interval is wide."""
    rng = np.random.default_rng(0)
    users = np.repeat(np.arange(60), 20)
    taste = rng.normal(size=60)[users] + rng.normal(size=1200)
    labels = (taste + rng.normal(size=1200) > 0).astype(np.int64)
    good, noisy = taste, taste + 0.5 * rng.normal(size=1200)
    same = auc_difference(labels, users, [good], [good])
    assert (same.value, same.low, same.high) == (0, 0, 0)
    found = auc_difference(labels, users, [good], [noisy])
    assert found.value == pytest.approx(roc_auc_score(labels, good) - roc_auc_score(labels, noisy), abs=1e-12)
    assert 0 < found.low < found.value < found.high
    # Runs with good and bad seeds: what a seed does to both halves of a pair is no difference between the models.
    runs = [taste, taste + rng.normal(size=1200), taste + 3 * rng.normal(size=1200)]
    pairs = auc_difference(labels, users, runs, runs, paired=True)
    assert (pairs.value, pairs.low, pairs.high) == (0, 0, 0)
    apart = auc_difference(labels, users, runs, runs)
    assert apart.low < -0.05 < 0.05 < apart.high
    with pytest.raises(ValueError, match="pairs must have two halves"):
        auc_difference(labels, users, runs, runs[:2], paired=True)
    with pytest.raises(ValueError, match="b must hold at least one array"):
        auc_difference(labels, users, [good], [])


def test_commands_of_the_full_size_are_distinct(capsys: pytest.CaptureFixture[str]) -> None:
    lines = quality_full.commands(
        ["table1", "table3", "figure3", "sweep", "depth", "whole", "users", "precision"]
    )
    training = [line for line in lines if " train " in line]
    outs = [line.split("--out ")[1].split()[0] for line in training]
    assert len(set(outs)) == len(outs)
    assert sum("dti prepare" in line for line in lines) == 3
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    listed = capsys.readouterr().out
    for word in {word for line in training for word in line.split() if word.startswith("--")}:
        assert word in listed or word == "--nproc-per-node", word
