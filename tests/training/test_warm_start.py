"""Training that goes on from an earlier run: its weights, the targets that are new to it, and every run that does not fit."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dti_model.cli import main
from dti_model.config import DTIConfig, LoraSettings, ModelConfig, OptimConfig, TrainConfig
from dti_model.data import PreparedData, extend, files_like
from dti_model.evaluation import evaluate_run, score_split
from dti_model.model import MODEL_FOLDER, OtherOriginError, Provenance, Run, RunExistsError
from dti_model.training import search, train
from tests.cli.commands import refused
from tests.data.movielens_files import MOVIES
from tests.model.pretrained_files import pretrained_folder
from tests.training.small_runs import small_model, small_run, train_until


def new_day(older: Path, out: Path, seed: int, num_users: int = 30) -> Path:
    """The folder, and every other user's ratings of all movies after its last time."""
    folder = out.with_name(f"{out.name}-raw")
    folder.mkdir(parents=True)
    first = int(PreparedData.open(older).timestamp.max()) + 1
    rng = np.random.default_rng(seed)
    lines = [
        f"{user},{movie.item},{rng.integers(1, 6)},{first + place}"
        for user in range(1, 2 * num_users, 2)
        for place, movie in enumerate(MOVIES)
    ]
    (folder / "log.csv").write_text("user,item,rating,timestamp\n" + "\n".join(lines))
    (folder / "items.csv").write_text(
        "item,title,genres\n" + "".join(f"{m.item},Movie {m.item},Drama\n" for m in MOVIES)
    )
    extend(older, files_like(older, interactions=folder / "log.csv", items=folder / "items.csv"), out)
    return out


@pytest.fixture(scope="module")
def days(small_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A prepared folder and two that extend it."""
    folder = tmp_path_factory.mktemp("days")
    first = new_day(small_folder, folder / "1", 1)
    return [small_folder, first, new_day(first, folder / "2", 2)]


@pytest.fixture(scope="module")
def first_run(small_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained on the first day's folder."""
    out = tmp_path_factory.mktemp("first") / "run"
    train(small_run(small_folder, out))
    return out


def copied(run: Path, out: Path) -> Path:
    shutil.copytree(run, out)
    return out


def trained_rows(config: TrainConfig) -> tuple[Run, np.ndarray]:
    """Targets of one epoch's batches."""
    from dti_model.training import trainer_of, training_arguments

    run = Run.start(config)
    dataset: Any = trainer_of(run, training_arguments(config)).train_dataset
    return run, np.sort(np.concatenate([dataset[index].targets.numpy() for index in range(len(dataset))]))


def test_it_trains_on_exactly_the_targets_that_are_new(
    days: list[Path], first_run: Path, tmp_path: Path
) -> None:
    config = small_run(days[1], tmp_path / "one", init=first_run)
    run, rows = trained_rows(config)
    data = run.data
    assert data.since is not None
    assert np.array_equal(rows, np.flatnonzero(data.since == 1))
    older = PreparedData.open(days[0])
    scored = sum(older.targets(split).size for split in ("val", "test"))
    assert rows.size == scored + data.stats["extension"]["targets"] * 8 // 10
    result = train(config)
    assert result["training"]["targets"] == rows.size
    assert result["test"]["targets"] == data.targets("test").size
    # The next day, from both runs: what one has trained on, the other may not have.
    for run_folder, first in ((config.out, 2), (first_run, 1)):
        run, rows = trained_rows(small_run(days[2], tmp_path / "two", init=run_folder))
        assert run.data.since is not None
        assert np.array_equal(rows, np.flatnonzero(run.data.since >= first))
    _, rows = trained_rows(small_run(days[2], tmp_path / "two", init=first_run, init_targets="all"))
    assert np.array_equal(rows, np.sort(PreparedData.open(days[2]).targets("train")))


def of_random_weights(config: TrainConfig) -> Path:
    """A run folder as training leaves it, with other weights than a run of the same settings begins with."""
    run = Run.start(config)
    with torch.no_grad():
        for weight in run.model.parameters():
            if weight.requires_grad:
                weight += 0.1 * torch.randn_like(weight)
    config.save(config.out)
    run.save_model(config.out / MODEL_FOLDER)
    return config.out


@pytest.mark.parametrize("kind", ["from scratch", "slopes", "in full", "lora"])
def test_it_begins_with_the_weights_of_the_run(days: list[Path], tmp_path: Path, kind: str) -> None:
    settings: dict[str, Any] = {}
    if kind == "slopes":
        settings["dti"] = DTIConfig(train_slopes=True)
    if kind in ("in full", "lora"):
        base = str(pretrained_folder(tmp_path / "base"))
        settings["model"] = ModelConfig(pretrained=base, finetune="full" if kind == "in full" else "lora")
    first = of_random_weights(small_run(days[0], tmp_path / "first", **settings))
    scores = score_split(Run.load(first, days[1], other_data=True), "val")
    config = small_run(days[1], tmp_path / "next", init=first, **settings)
    run, anew = Run.start(config), Run.start(dataclasses.replace(config, init=None))
    assert np.array_equal(score_split(run, "val"), scores)
    assert not np.array_equal(score_split(anew, "val"), scores)
    trained, as_anew = (
        {name for name, weight in each.model.named_parameters() if weight.requires_grad}
        for each in (run, anew)
    )
    assert trained == as_anew


def test_an_interrupted_run_goes_on_bit_for_bit_and_with_the_same_run_only(
    days: list[Path], first_run: Path, tmp_path: Path
) -> None:
    run = copied(first_run, tmp_path / "moved" / "run")
    optim = OptimConfig(epochs=2, token_budget=300, save_steps=2, patience=0)
    config = small_run(days[1], tmp_path / "whole", init=run, optim=optim)
    whole = train(config)
    config = dataclasses.replace(config, out=tmp_path / "broken")
    train_until(3, config)
    other = tmp_path / "other"
    train(small_run(days[0], other, seed=1))
    with pytest.raises(OtherOriginError, match="the run that it goes on from changed after .*checkpoint-2"):
        train(dataclasses.replace(config, init=other))
    with pytest.raises(RunExistsError, match=r"with other settings \(init was '.*' and is now null"):
        train(dataclasses.replace(config, init=None))
    run.rename(tmp_path / "elsewhere")  # its path does not matter
    assert train(dataclasses.replace(config, init=tmp_path / "elsewhere")) == whole
    shutil.rmtree(tmp_path / "elsewhere")  # a finished one needs it no more
    assert evaluate_run(config.out, None, "test", progress=False)["test"] == whole["test"]
    made_of = Provenance.load(config.out / "model", "")
    assert made_of is not None
    assert made_of.init is not None


def test_lora_goes_on_with_its_adapter(days: list[Path], tmp_path: Path) -> None:
    model = ModelConfig(pretrained=str(pretrained_folder(tmp_path / "base")), lora=LoraSettings(rank=2))
    first = of_random_weights(small_run(days[0], tmp_path / "first", model=model))
    config = small_run(days[1], tmp_path / "next", model=model, init=first)
    result = train(config)
    run = Run.load(config.out)
    assert result["training"]["targets"] == run.train_targets.size
    moved = score_split(run, "test") - score_split(Run.load(first, days[1], other_data=True), "test")
    assert 0 < np.abs(moved).max() < 0.5
    other = str(pretrained_folder(tmp_path / "other", initializer_range=0.1))
    model = dataclasses.replace(model, pretrained=other)
    with pytest.raises(OtherOriginError, match=r"model\.pretrained, .*other, is not the model that "):
        Run.start(dataclasses.replace(config, model=model))


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"model": small_model(layers=2)}, r"model\.layers was 1 and is now 2"),
        ({"model": ModelConfig(pretrained="nowhere")}, r"model\.layers was 1 and is now 4|pretrained"),
        ({"dti": {"mode": "dti-minus"}}, r"dti\.mode was 'dti' and is now 'dti-minus'"),
    ],
)
def test_another_network_is_named(
    days: list[Path], first_run: Path, tmp_path: Path, settings: dict[str, Any], problem: str
) -> None:
    config = small_run(days[1], tmp_path / "run", init=first_run)
    if "dti" in settings:
        settings = {"dti": dataclasses.replace(config.dti, **settings["dti"])}
    with pytest.raises(OtherOriginError, match=problem):
        train(dataclasses.replace(config, **settings))
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_run_that_does_not_fit_the_data(days: list[Path], first_run: Path, tmp_path: Path) -> None:
    second = tmp_path / "second"
    train(small_run(days[1], second, init=first_run))
    with pytest.raises(OtherOriginError, match="does not extend the data that .*second was trained on"):
        train(small_run(days[0], tmp_path / "run", init=second))
    with pytest.raises(OtherOriginError, match="has no training target that .*second was not trained on"):
        train(small_run(days[1], tmp_path / "run", init=second))
    train(small_run(days[0], tmp_path / "run", init=second, init_targets="all"))
    with pytest.raises(FileNotFoundError, match=r"nowhere is not a run folder"):
        train(small_run(days[1], tmp_path / "other", init=tmp_path / "nowhere"))
    train_until(1, small_run(days[0], tmp_path / "unfinished"))
    with pytest.raises(FileNotFoundError, match="holds no model: the run has not ended"):
        train(small_run(days[1], tmp_path / "other", init=tmp_path / "unfinished"))
    with pytest.raises(ValueError, match="init_targets all is a setting of a run with init"):
        small_run(days[1], tmp_path / "other", init_targets="all")


def test_a_search_from_a_run(days: list[Path], first_run: Path, tmp_path: Path) -> None:
    base = small_run(days[1], tmp_path / "search", init=first_run)
    grid = {"optim.learning_rate": [1e-3]}
    found = search(base, grid, [0])
    assert search(base, grid, [0]) == found
    other = of_random_weights(small_run(days[0], tmp_path / "other"))
    with pytest.raises(OtherOriginError, match="the run that it goes on from of this search is not what "):
        search(dataclasses.replace(base, init=other), grid, [0])


def test_a_damaged_weight_is_found(days: list[Path], first_run: Path, tmp_path: Path) -> None:
    run = copied(first_run, tmp_path / "run")
    weights = run / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        train(small_run(days[1], tmp_path / "next", init=run))


def test_the_command_takes_the_network_of_the_run(
    days: list[Path], first_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "--data", str(days[1]), "--out", str(tmp_path / "run"), "--init", str(first_run)]
    words += ["--optim.epochs", "1", "--progress", "false", "--report-to", "[]"]
    line = refused([*words, "--model.layers", "3"], capsys)
    assert "(model.layers was 1 and is now 3): leave that out" in line.replace("--", "")
    assert main(words) == 0
    config, earlier = TrainConfig.load(tmp_path / "run"), TrainConfig.load(first_run)
    assert (config.model, config.dti, config.k, config.window) == (earlier.model, earlier.dti, 3, 3)
    assert config.init == first_run
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["training"]["targets"] > 0
    assert "nowhere is not a run folder" in refused([*words[:-7], "nowhere"], capsys)
    # The second day, from the first one's run, with a setting of its own.
    words[2], words[4], words[6] = str(days[2]), str(tmp_path / "run2"), str(tmp_path / "run")
    assert main([*words, "--k", "2"]) == 0
    assert TrainConfig.load(tmp_path / "run2").k == 2
