"""The leak meter: exactly 0 where nothing can leak, more than 0 elsewhere, larger with depth, smaller with a reset."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.leak_meter import (
    RESETS,
    dti_config,
    leak,
    measure_random,
    measure_run,
    random_example,
    random_network,
)
from dti_model.config import ModelConfig, OptimConfig, TrainConfig
from dti_model.data import prepare
from dti_model.training import train
from tests.data.movielens_files import some_ratings, write_1m


@pytest.fixture(scope="module")
def leaks() -> dict[tuple[int, str], dict]:
    return {(row["layers"], row["reset"]): row for row in measure_random([1, 2, 3, 4], num_prompts=2)}


@pytest.mark.parametrize("reset", RESETS)
def test_one_layer_cannot_leak(leaks: dict, reset: str) -> None:
    assert leaks[1, reset]["largest"] == 0


@pytest.mark.parametrize("layers", [2, 3, 4])
def test_full_reset_stops_the_leak_and_nothing_less_does(leaks: dict, layers: int) -> None:
    """From the third layer on the target's own text has to be reset as well."""
    assert leaks[layers, "1, every layer, own text too"]["largest"] == 0
    assert (leaks[layers, "1, every layer"]["largest"] == 0) == (layers == 2)
    for reset in ("no reset", "0 .. 0.5, last layer", "0 .. 1, last layer"):
        assert leaks[layers, reset]["leak"] > 1e-3


def test_depth_leaks_more_and_a_reset_less(leaks: dict) -> None:
    without = [leaks[layers, "no reset"]["leak"] for layers in (2, 3, 4)]
    assert without == sorted(without)
    for layers in (2, 3, 4):
        assert leaks[layers, "1, last layer"]["leak"] < leaks[layers, "no reset"]["leak"]


def test_a_window_over_the_whole_history_has_no_outside() -> None:
    config = dti_config("no reset", 3)
    assert leak(random_network(3, config), config, random_example(15, 0, window=20), (0, 1)) == 0


def test_a_trained_run_is_measured_on_its_own_prompts(tmp_path: Path) -> None:
    prepare(
        "ml-1m", tmp_path / "data", write_1m(tmp_path / "raw", some_ratings(60)), subset=True, vocab_size=400
    )
    train(
        TrainConfig(
            data=tmp_path / "data",
            out=tmp_path / "run",
            k=3,
            window=1,
            progress=False,
            model=ModelConfig(layers=2, width=16, heads=2, kv_heads=1, mlp_width=24),
            optim=OptimConfig(epochs=1, token_budget=300),
        )
    )
    rows = {row["reset"]: row for row in measure_run(tmp_path / "run", 3)}
    assert rows["no reset"]["leak"] > 0
    assert rows["1, every layer"]["largest"] == rows["1, every layer, own text too"]["largest"] == 0
