"""Tables and plots of rows measured on CPUs: of float32 alone, as all older rows are, and of both precisions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes

from benchmarks.recording import Rows, read_rows
from benchmarks.report import quality as of_quality
from benchmarks.report import report
from benchmarks.report.movies import movies
from benchmarks.report.plots import attention_over_rows, time_over_k

MADE = {"date": "2026-11-27", "commit": "abc", "machine": "a processor, 2 threads"}


def train_rows() -> Rows:
    rows: Rows = []
    for precision, factor in (("fp32", 1.0), ("bf16", 1.5)):
        for k, speedup in ((1, 1.0), (50, 12.0)):
            row: dict[str, Any] = {
                **MADE,
                "data": "ml",
                "model": "4 x 128",
                "mode": "dti",
                "precision": precision,
                "k": k,
            }
            row |= {"targets_per_s": 100 * speedup * factor, "speedup": speedup, "rows_ratio": speedup}
            row |= {
                "flops_ratio": speedup,
                "equation_3": 0.95 * speedup,
                "attention_share": 0.2,
                "peak_mib": 300 / factor,
            }
            rows.append(row | ({"over_fp32": factor} if precision == "bf16" else {}))
    return rows


def attention_rows() -> Rows:
    p50 = {"windowed_attn": 10, "windowed_attn_dti": 11, "sdpa_dense_mask": 50, "windowed_attn_torch": 60}
    p50 |= {"windowed_attn_bf16": 5, "windowed_attn_dti_bf16": 6, "sdpa_dense_mask_bf16": 40}
    rows: Rows = []
    for times in (1, 4):
        for name, ms in p50.items():
            row: dict[str, Any] = {**MADE, "workload": f"cpu_{times}", "rows": 4096 * times, "provider": name}
            row |= {"precision": "bf16" if name.endswith("bf16") else "fp32", "mode": "forward+backward"}
            row |= {f"p{p}_ms": float(ms * times) for p in (20, 50, 80)}
            if times == 1 or name.startswith("windowed"):
                rows.append(row | {"useful_gflops": 100.0})
    return rows


def score_rows() -> Rows:
    rows: Rows = []
    for precision, factor in (("fp32", 1.0), ("bf16", 2.0)):
        about = {**MADE, "model": "4 x 128", "precision": precision}
        about |= {"over_fp32": factor} if precision == "bf16" else {}
        for name, ms in (("one pass", 20.0), ("one prompt each", 300.0)):
            row = {**about, "part": "candidates", "history": 20, "candidates": 100, "provider": name}
            row |= {"p50_ms": ms / factor, "p99_ms": 2 * ms / factor, "repeats": 100}
            rows.append(row | {"candidates_per_s": 1e5 * factor / ms, "speedup": 300 / ms})
        for name, speed in (("packed", 400.0), ("careful", 200.0), ("plain", 100.0)):
            row = {**about, "part": "evaluation", "data": "ml", "targets": 50, "provider": name}
            rows.append(row | {"targets_per_s": speed * factor, "speedup": speed / 100})
    return rows


MAKERS = {"TRAIN_CPU": train_rows, "ATTENTION_CPU": attention_rows, "SCORE_CPU": score_rows}


@pytest.fixture(params=["both precisions", "older rows"])
def older(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Recorded rows are those made above, or the float32 ones among them without a word about precision; whether they are."""
    older = request.param == "older rows"
    for name, make in MAKERS.items():
        rows = [row for row in make() if not older or row["precision"] == "fp32"]
        if older:
            rows = [{key: value for key, value in row.items() if key != "precision"} for row in rows]
        (tmp_path / name).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        monkeypatch.setattr(report, name, tmp_path / name)
    return older


def test_tables(older: bool) -> None:
    """Every column has a head; a pair of figures is float32's and bfloat16's."""
    made = {"train": report.train_cpu(), "attention": report.attention_cpu(), "score": report.score_cpu()}
    for text in made.values():
        assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1
        assert ("bfloat16" in text) != older
    expected = {
        "train": "| 4 x 128 | 50 | 1,200 / 1,800 | 1.50 | 12.0 / 12.0 | 12.0 | 12.0 | 11.4 | 20% / 20% | 300 / 200 |",
        "attention": "In bfloat16 2.0 times as fast as in float32, and 10.0 times as fast as SDPA in float32 (8.0 times as SDPA in bfloat16).",
        "score": "| 100 | one pass | 20 / 40 | 10 / 20 | 5,000 | 10,000 | 15.0 x | 15.0 x |",
    }  # fmt: skip
    if older:
        expected = {
            "train": "| 4 x 128 | 50 | 1,200 | 12.0 | 12.0 | 12.0 | 11.4 | 20% | 300 |",
            "attention": "5.0 times as fast as SDPA under the equal dense mask",
            "score": "| 100 | one pass | 20 / 40 | 5,000 | 15.0 x |",
        }
    for name, line in expected.items():
        assert line in made[name]


def test_a_table_of_compiled_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a precision has been measured compiled, its figure stands beside the other's."""
    rows = [row | {"over_eager": 1.1 if row["precision"] == "fp32" else 1.2} for row in train_rows()]
    (tmp_path / "rows").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    monkeypatch.setattr(report, "TRAIN_CPU", tmp_path / "rows")
    table = report.train_cpu()
    assert "| 4 x 128 | 50 | 1,200 / 1,800 | 1.50 | 1.10 / 1.20 | 12.0 / 12.0 |" in table
    assert "Compiled: times as many targets/s with `--optim.compile true`." in table
    assert len({line.count("|") for line in table.splitlines() if line.startswith("|")}) == 1


def test_plots(older: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every line of a plot that has rows is drawn: zipped with five markers, a sixth provider was left out."""
    drawn: list[str] = []
    plot = Axes.plot

    def noting(axes: Axes, *args: Any, **kwargs: Any) -> Any:
        drawn.append(kwargs.get("label", ""))
        return plot(axes, *args, **kwargs)

    monkeypatch.setattr(Axes, "plot", noting)
    attention_over_rows(read_rows(report.ATTENTION_CPU), tmp_path / "attention.png")
    assert drawn == list(dict.fromkeys(row["provider"] for row in read_rows(report.ATTENTION_CPU)))
    drawn.clear()
    time_over_k(report.training_rows(), tmp_path / "train.png")
    measured = (
        ["measured, 4 x 128"]
        if older
        else ["measured, 4 x 128, float32", "measured, 4 x 128, bfloat16", "4 x 128"]
    )
    assert drawn == [*measured, "ratio of rows", "equation 3"]


def test_precision_is_part_of_quality_where_there_are_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    about = {"data": "ml", "model": "2 x 64", "commit": "abc", "machine": "here", "k": 50}
    about |= {"targets_per_step": 64, "train_targets": 9, "epochs": 3}
    rows: Rows = [
        {**about, "benchmark": "quality", "arm": arm}
        | {"val_auc": auc, "val-fp32_auc": auc + 0.001, "val-bf16_auc": auc}
        for arm, auc in (("fp32", 0.750), ("bf16", 0.749))
    ]
    compared = {"arm": "bf16", "split": "val", "targets": 9, "users": 3, "low": -0.002, "high": 0.0005}
    rows.append({**compared, "benchmark": "quality-difference", "against": "fp32", "auc_difference": -0.001})
    rows.append({**compared, "benchmark": "quality-scoring", "auc_difference": 0.0001})
    recorded, of_precision = of_quality.quality_rows, [rows, []]
    monkeypatch.setattr(
        of_quality, "quality_rows", lambda plan: of_precision[0] if plan == "precision" else recorded(plan)
    )
    whole = of_quality.quality()
    del of_precision[0]
    others = of_quality.quality()
    assert whole.startswith(others)
    assert "bfloat16" not in others
    assert "| bf16 | 1 | 0.7490 | 0.7500 | 0.7490 | -0.0010 (-0.0020 to +0.0005) |" in whole
    assert "less that in float32: +0.0001 (-0.0020 to +0.0005) of bf16." in whole


def test_a_run_of_several_seeds() -> None:
    """Every baseline once, every seed, and their mean."""
    recorded = json.loads(report.QUICKSTART.read_text())
    other = json.loads(json.dumps(recorded))
    other["metrics"]["test"]["auc"] += 0.01
    lines = movies({0: recorded, 10: other}).splitlines()
    auc = recorded["metrics"]["test"]["auc"]
    names = [line.split(" | ")[0] for line in lines if line.startswith("| ")]
    assert names == [
        "| test", "| item mean", "| item user mean", "| logistic regression", "| item user residual", "| gradient boosting",
        "| model, seed 0", "| model, seed 10", "| model, mean",
    ]  # fmt: skip
    assert f"| model, mean | {auc + 0.005:.4f} | " in "\n".join(lines)
    training = recorded["metrics"]["training"]
    assert lines[-1].startswith(
        f"{training['parameters']:,} parameters, {training['targets']:,} training targets, "
    )
    assert "model, mean" not in movies({3: recorded})
    assert movies({}) == "(No run is recorded yet.)"
    other["metrics"]["provenance"]["data"] = "other"
    with pytest.raises(ValueError, match="different data"):
        movies({0: recorded, 1: other})
