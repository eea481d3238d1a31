"""Training: it learns, every target weighs 1, an interrupted run ends like an unbroken one, and bad runs are refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import polars as pl
import pytest
import torch
from torch.nn import functional as F

from dti_model.config import DTIConfig, ModelConfig, OptimConfig, TrainConfig
from dti_model.data import DataError, PreparedData, prepare
from dti_model.evaluation import evaluate_run, score_split
from dti_model.model import Run, RunExistsError
from dti_model.model.attention import token_logits
from dti_model.prompts import Prompts
from dti_model.training import train, trainer_of, training_arguments
from dti_model.training.setup import _checkpointing_option
from dti_model.training.start import METRICS_FILE
from dti_model.training.trainer import NonFiniteLossError, StreamTrainer
from tests.data.movielens_files import some_ratings, write_1m
from tests.model.pretrained_files import pretrained_folder
from tests.training.small_runs import small_model, small_run, train_until


@pytest.fixture
def config(small_folder: Path, tmp_path: Path) -> TrainConfig:
    optim = OptimConfig(epochs=3, token_budget=300, patience=0)
    return small_run(
        small_folder, tmp_path / "run", report_to=("tensorboard",), model=small_model(layers=2), optim=optim
    )


def test_overfits_a_handful_of_prompts(config: TrainConfig) -> None:
    run = Run.start(dataclasses.replace(config, model=ModelConfig(layers=2, width=32, heads=2, dropout=0.0)))
    prompts = Prompts.streaming(run.data, run.data.targets("train")[:12], window=3, k=3)
    batch = run.builder.batch(prompts)
    answers = torch.tensor(run.builder.format.labels)[batch.labels]
    optimizer = torch.optim.AdamW(run.model.parameters(), lr=3e-3)
    losses = []
    for _ in range(200):
        loss = F.cross_entropy(token_logits(run.model, batch.input_ids, batch.layout, config.dti), answers)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.02 < losses[0]


def test_every_target_weighs_one(config: TrainConfig) -> None:
    """The losses of the batches of one optimizer step add up to the mean over all their targets."""
    optim = dataclasses.replace(config.optim, accumulation=2)
    run = Run.start(
        dataclasses.replace(config, optim=optim, model=dataclasses.replace(config.model, dropout=0.0))
    )
    trainer = trainer_of(run, training_arguments(run.config))
    samples, count = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 2, torch.device("cpu"))
    batches = [sample["batch"] for sample in samples]
    assert int(count) == sum(len(batch.labels) for batch in batches)
    total = sum(trainer.compute_loss(run.model, sample, num_items_in_batch=count) for sample in samples)
    single = []
    for batch in batches:
        logits = token_logits(run.model, batch.input_ids, batch.layout, config.dti)
        answers = torch.tensor(run.builder.format.labels)[batch.labels]
        single.append(F.cross_entropy(logits, answers, reduction="none"))
    torch.testing.assert_close(total, torch.cat(single).mean())


@pytest.mark.parametrize(("kind", "step"), [("scratch", 3), ("scratch", 8), ("lora", 8)])
def test_an_interrupted_run_ends_like_an_unbroken_one(
    config: TrainConfig, kind: str, step: int, tmp_path: Path
) -> None:
    """Bit for bit: metrics and every prediction; killed before and after the first checkpoint, with an early-stopping counter."""
    if kind == "lora":
        pretrained = ModelConfig(pretrained=str(pretrained_folder(tmp_path / "base")), dropout=0.1)
        optim = OptimConfig(epochs=4, token_budget=600, patience=1, validate_every=3, learning_rate=1e-2)
        config = dataclasses.replace(config, model=pretrained, optim=optim)
    whole = train(config)
    broken = dataclasses.replace(config, out=config.out.with_name("broken"))
    train_until(step, broken)
    assert train(broken) == whole
    for name in ("predictions-val.parquet", "predictions-test.parquet"):
        assert pl.read_parquet(broken.out / name).equals(pl.read_parquet(config.out / name))


def test_activation_checkpointing_has_the_name_of_this_transformers(config: TrainConfig) -> None:
    """5.17, the oldest that is allowed, knows the old name only and refused the new one; both names say True or False later on."""
    assert _checkpointing_option({"gradient_checkpointing"}) == "gradient_checkpointing"
    both = {"gradient_checkpointing", "activation_checkpointing"}
    assert _checkpointing_option(both) == "activation_checkpointing"
    for on in (False, True):
        optim = dataclasses.replace(config.optim, activation_checkpointing=on)
        assert training_arguments(dataclasses.replace(config, optim=optim)).gradient_checkpointing is on


def test_a_finished_run_holds_what_is_promised(config: TrainConfig) -> None:
    result = train(dataclasses.replace(config, compare_steps=1))
    assert json.loads((config.out / METRICS_FILE).read_text()) == result
    assert set(result["test"]) >= {
        "auc",
        "log_loss",
        "ece",
        "f1",
        "f1_always_yes",
        "gauc",
        "base_rate",
        "mean_prediction",
    }
    assert set(result["baselines"]["test"]) >= {"item_mean", "item_user_mean", "logistic_regression"}
    assert set(result["training"]["throughput"]) == {"streaming", "sliding_window"}
    data = PreparedData.open(config.data)
    predictions = pl.read_parquet(config.out / "predictions-test.parquet")
    rows = data.targets("test")
    assert predictions["label"].to_list() == data.label[rows].tolist()
    assert predictions["item"].to_list() == [data.item_ids[i] for i in data.item[rows]]
    assert (config.out / "report.png").read_bytes().startswith(b"\x89PNG")
    assert not list((config.out / "model").glob("*.bin")), "a pickle in the model folder"
    assert evaluate_run(config.out, None, "test", progress=False)["test"] == result["test"]
    with_streaming_prompts = evaluate_run(config.out, None, "test", progress=False, k=3)["test"]
    assert with_streaming_prompts["auc"] == pytest.approx(result["test"]["auc"], abs=0.05)
    assert with_streaming_prompts["log_loss"] != result["test"]["log_loss"], (
        "two layers see beyond the window"
    )
    with pytest.raises(RunExistsError, match="holds a finished run"):
        train(dataclasses.replace(config, compare_steps=1))


def test_training_writes_nothing_into_new_buffers(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deterministic algorithms fill each empty buffer with NaN unless they are told not to: on a GPU a pass over memory each."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    train(dataclasses.replace(config, optim=dataclasses.replace(config.optim, max_steps=1)))
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory


def test_scores_do_not_depend_on_batches(config: TrainConfig) -> None:
    run = Run.start(config)
    scores = score_split(run, "test")
    small = dataclasses.replace(config, optim=dataclasses.replace(config.optim, token_budget=40))
    other = score_split(Run(small, run.model, run.tokenizer, run.data, run.builder), "test")
    assert abs(scores - other).max() < 1e-6


@pytest.mark.parametrize(
    ("step", "accumulation"), [*((step, 1) for step in (1, 2, 3, 4, 5, 8, 12)), (1, 2), (3, 2)]
)
def test_a_loss_that_is_not_finite_stops_the_run_and_says_where(
    step: int, accumulation: int, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of a step is read when the next one is under way, and before a log line, a validation, a checkpoint and the end."""
    compute_loss = StreamTrainer.compute_loss

    def broken(self: StreamTrainer, *args, **kwargs) -> torch.Tensor:
        loss = compute_loss(self, *args, **kwargs)
        return loss * float("nan") if self.state.global_step == step - 1 else loss

    monkeypatch.setattr(StreamTrainer, "compute_loss", broken)
    optim = dataclasses.replace(config.optim, max_steps=12, validate_every=5, save_steps=3)
    optim = dataclasses.replace(optim, accumulation=accumulation, token_budget=300 // accumulation)
    config = dataclasses.replace(config, optim=optim, logging_steps=4)
    with pytest.raises(
        NonFiniteLossError,
        match=rf"not finite at optimizer step {step} \(epoch \d\), in a batch of \d+ targets",
    ):
        train(config)
    saved = [
        int(path.name.removeprefix("checkpoint-")) for path in config.out.glob("checkpoints/checkpoint-*")
    ]
    assert max(saved, default=0) < step
    assert not (config.out / "model").exists()


def test_a_run_folder_of_other_settings_is_refused(config: TrainConfig) -> None:
    (config.out / "checkpoints" / "checkpoint-3").mkdir(parents=True)
    config.save(config.out)
    assert TrainConfig.load(config.out) == config
    with pytest.raises(RunExistsError, match="was started with other settings"):
        train(dataclasses.replace(config, k=4))
    foreign = dataclasses.replace(config, out=config.data)
    with pytest.raises(RunExistsError, match="is not a run folder"):
        train(foreign)


def test_one_class_is_refused_before_training(config: TrainConfig, tmp_path: Path) -> None:
    """Every target but those of the last user, which are test, is a click."""
    ratings = [(user, item, 1 + (user < 60), time) for user, item, _, time in some_ratings(num_users=60)]
    prepare("ml-1m", tmp_path / "one", write_1m(tmp_path / "raw", ratings), subset=True, threshold=1)
    with pytest.raises(DataError, match="train targets do not have both classes"):
        train(dataclasses.replace(config, data=tmp_path / "one"))
    assert not config.out.exists()


def test_a_run_that_cannot_start_leaves_nothing_in_the_way(config: TrainConfig) -> None:
    """A budget that is too small used to leave a config.yaml, and the corrected command was refused as another run's."""
    with pytest.raises(ValueError, match="raise the budget to at least"):
        train(dataclasses.replace(config, optim=dataclasses.replace(config.optim, token_budget=10)))
    assert not config.out.exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ModelConfig(heads=3), "model.width must be an even multiple of model.heads"),
        (lambda: ModelConfig(dropout=1.0), "dropout must be in"),
        (lambda: OptimConfig(epochs=0), "epochs must be >= 1"),
        (lambda: OptimConfig(learning_rate=-1.0), "learning_rate must be > 0"),
        (lambda: OptimConfig(warmup=1.0), "warmup < 1"),
        (lambda: TrainConfig(Path("a"), Path("b"), k=-1), "k must be >= 0"),
        (
            lambda: DTIConfig(alpha_min=0.9, alpha_max=0.1),
            "dti.alpha_min must be <= dti.alpha_max, 0.1, got 0.9",
        ),
    ],
)
def test_impossible_settings_are_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
