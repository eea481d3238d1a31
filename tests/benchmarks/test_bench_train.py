"""The training benchmark runs on real prompts and its rows hold together; its times prove nothing here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.bench_train import measure
from dti_model.config import ModelConfig, OptimConfig, TrainConfig
from dti_model.data import prepare
from dti_model.model.run import Run
from dti_model.prompts import Prompts
from dti_model.training import packed_epoch, small_steps, timed_step, trainer_of, training_arguments
from tests.conftest import needs_torch_compile
from tests.data.movielens_files import some_ratings, write_1m


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    prepare(
        "ml-1m", tmp_path / "data", write_1m(tmp_path / "raw", some_ratings(60)), subset=True, vocab_size=400
    )
    return TrainConfig(
        data=tmp_path / "data",
        out=tmp_path / "run",
        window=3,
        model=ModelConfig(layers=2, width=16, heads=2, kv_heads=1, mlp_width=24),
        optim=OptimConfig(token_budget=300),
    )


def test_a_measured_step_is_one_of_training(config: TrainConfig) -> None:
    """Its optimizer was AdamW of another implementation than Trainer's. What bfloat16 trains are float32 weights."""
    run = Run.start(config)
    measured = small_steps(run, run.model)
    trained = trainer_of(run, training_arguments(config)).create_optimizer()
    assert type(measured) is type(trained)
    assert measured.defaults["fused"]
    assert measured.defaults["fused"] == trained.defaults["fused"]
    before = [parameter.detach().clone() for parameter in run.model.parameters()]
    under_autocast: list[bool] = []
    mlp = run.model.model.layers[0].mlp
    mlp.register_forward_pre_hook(lambda *_: under_autocast.append(torch.is_autocast_enabled("cpu")))
    for precision in ("fp32", "bf16"):
        timed_step(run, run.model.train(), measured, packed_epoch(run, 2), 0, precision)
    assert under_autocast == [False, True]
    moments = [value for state in measured.state.values() for value in state.values()]
    assert {x.dtype for x in (*run.model.parameters(), *moments)} == {torch.float32}
    assert any((now != then).any() for now, then in zip(run.model.parameters(), before))


def test_rows_of_every_k(config: TrainConfig) -> None:
    rows = measure(config, [1, 2, None], 1, ["fp32", "bf16"])
    assert [(row["precision"], row["k"]) for row in rows] == [
        (precision, k) for precision in ("fp32", "bf16") for k in (1, 2, "all")
    ]
    run = Run.start(config)
    for row, k in zip(rows, 2 * (1, 2, None)):
        prompts = Prompts.streaming(run.data, run.data.targets("train"), 3, k)
        assert row["rows_per_target"] == pytest.approx(run.builder.num_rows(prompts).sum() / 144, abs=0.01)
        assert row["targets_per_s"] > 0
        assert 0 < row["attention_share"] < 1
        assert row["peak_mib"] > 0
    for base, row, in_bfloat16 in zip(3 * rows[:1], rows[:3], rows[3:]):
        assert "over_fp32" not in row
        ratio = in_bfloat16["targets_per_s"] / row["targets_per_s"]
        assert in_bfloat16["over_fp32"] == pytest.approx(ratio, abs=0.02)
        for of, first in ((row, base), (in_bfloat16, rows[3])):
            assert of["speedup"] == pytest.approx(of["targets_per_s"] / first["targets_per_s"], abs=0.02)
    assert rows[0]["speedup"] == rows[0]["rows_ratio"] == 1
    assert rows[1]["equation_3"] == 1.2
    assert rows[2]["rows_ratio"] > rows[1]["rows_ratio"] > 1
    assert rows[2]["flops_ratio"] > rows[1]["flops_ratio"] > rows[0]["flops_ratio"] == 1


@needs_torch_compile
def test_rows_of_compiled_steps(config: TrainConfig) -> None:
    rows = measure(config, [2], 1, ["fp32", "bf16"], compiled=True)
    assert [row["precision"] for row in rows] == ["fp32", "bf16"]
    assert all(row["over_eager"] > 0 for row in rows)
