"""Training on paper: it counts prompts as the product does, knows real models, and says what the paper measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import simulate
from benchmarks.simulate import GPUS, Histories, Setting, estimate, network
from dti_model.data import PreparedData, prepare
from dti_model.prompts import Prompts
from tests.data.movielens_files import some_ratings, write_1m


@pytest.mark.parametrize(
    ("name", "parameters"), [("llama-3.1-8b", 8_030e6), ("llama-3.2-1b", 1_236e6), ("smollm2-135m", 134.5e6)]
)
def test_parameters_of_real_models(name: str, parameters: float) -> None:
    """As their model cards say."""
    assert network(name, "full").parameters == pytest.approx(parameters, rel=0.002)


def test_low_rank_updates_are_those_of_peft() -> None:
    """Rank 16 on all seven projections of Llama-3.1-8B: peft reports 41,943,040 trainable parameters, beside the row of [SUM]."""
    assert network("llama-3.1-8b", "lora").trained == 41_943_040 + 4096


@pytest.mark.parametrize("k", [1, 2, 3, 0])
@pytest.mark.parametrize("window", [0, 2, 20])
def test_prompts_are_counted_as_they_are_cut(tmp_path: Path, k: int, window: int) -> None:
    folder = tmp_path / "data"
    prepare(
        "ml-1m",
        folder,
        write_1m(tmp_path / "raw", some_ratings(60)),
        subset=True,
        vocab_size=400,
        min_context=1,
    )
    data = PreparedData.open(folder)
    prompts = Prompts.streaming(data, data.targets("train"), window, k or None)
    counted = Histories.prepared(folder, tokens=10.0).prompts(window, k)
    assert counted == (len(prompts), int((prompts.stop - prompts.first).sum()))


def test_table_3_of_the_paper() -> None:
    """Ratios of hours to convergence within 25 % from the paper's setting, for each data set and k."""
    for row in simulate.table_3():
        assert abs(row["error"]) < 0.25, row


def test_more_gpus_take_less_time_and_streams_less_than_sliding_windows() -> None:
    setting = Setting(network("llama-3.1-8b", "full"), simulate.data_set("ml-1m"), GPUS["h100"])
    hours = [estimate(replace(setting, gpus=gpus), 50).hours for gpus in (8, 32, 512)]
    assert hours == sorted(hours, reverse=True)
    found = [estimate(setting, k) for k in (1, 10, 50, 0)]
    assert [e.hours for e in found] == sorted((e.hours for e in found), reverse=True)
    assert estimate(replace(setting, gpus=512), 50).gib < estimate(setting, 50).gib


def test_a_billion_interactions_fit_where_they_are_planned() -> None:
    rows = simulate.billion()
    assert [row["gpus"] for row in rows[:4]] == [8, 32, 128, 512]
    for row in rows:
        assert row["hours_whole"] < row["hours_k50"] < row["hours_sw"] / 8
        if "lora" in row["model"] or row["gpus"] >= 8:
            assert row["gib"] < 80
