"""The training benchmark runs on real prompts and its rows hold together; its times prove nothing here."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.bench_train import measure
from dti_model.config import ModelConfig, OptimConfig, TrainConfig
from dti_model.data import prepare
from dti_model.model.run import Run
from dti_model.prompts import Prompts
from tests.data.movielens_files import some_ratings, write_1m


def test_rows_of_every_k(tmp_path: Path) -> None:
    prepare(
        "ml-1m", tmp_path / "data", write_1m(tmp_path / "raw", some_ratings(60)), subset=True, vocab_size=400
    )
    config = TrainConfig(
        data=tmp_path / "data",
        out=tmp_path / "run",
        window=3,
        model=ModelConfig(layers=2, width=16, heads=2, kv_heads=1, mlp_width=24),
        optim=OptimConfig(token_budget=300),
    )
    rows = measure(config, [1, 2, None], num_steps=1)
    assert [row["k"] for row in rows] == [1, 2, "all"]
    run = Run.start(config)
    for row, k in zip(rows, (1, 2, None)):
        prompts = Prompts.streaming(run.data, run.data.targets("train"), 3, k)
        assert row["rows_per_target"] == pytest.approx(run.builder.num_rows(prompts).sum() / 144, abs=0.01)
        assert row["targets_per_s"] > 0
        assert 0 < row["attention_share"] < 1
        assert row["peak_mib"] > 0
    assert rows[0]["speedup"] == rows[0]["rows_ratio"] == 1
    assert rows[1]["equation_3"] == 1.2
    assert rows[2]["rows_ratio"] > rows[1]["rows_ratio"] > 1
    assert rows[2]["flops_ratio"] > rows[1]["flops_ratio"] > rows[0]["flops_ratio"] == 1
