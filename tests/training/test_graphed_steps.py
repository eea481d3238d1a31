"""Steps as CUDA graphs, without a GPU: a replay computes the captured step again. What is padded, captured, given up and left alone."""

from __future__ import annotations

import dataclasses
import hashlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.attention import Workload
from benchmarks.scoring import Rerun
from dti_model.config import OptimConfig, TrainConfig
from dti_model.model import Run
from dti_model.prompts import StreamBatch
from dti_model.training import (
    NO_LABEL,
    StepGraphs,
    StreamTrainer,
    padded_batch,
    train,
    trainer_of,
    training_arguments,
)
from tests.training.small_runs import small_model, small_run, train_until


@pytest.fixture
def config(small_folder: Path, tmp_path: Path) -> TrainConfig:
    optim = OptimConfig(epochs=3, token_budget=120, patience=0, precision="fp32")
    model = small_model(layers=2, dropout=0.1)
    return small_run(small_folder, tmp_path / "run", model=model, optim=optim)


class Counted(Rerun):
    """Like a capture on a GPU it runs the step twice: to warm up, whose gradients are to be forgotten, and to record."""

    last: Rerun  # that was made

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        Counted.last = self

    def capture(self, computation: Any) -> Any:
        computation()
        return super().capture(computation)


def trainer_with(config: TrainConfig, padded: bool = True) -> StreamTrainer:
    """A trainer, whose batches are padded and whose steps are not captured, or as they are without a GPU."""
    torch.manual_seed(0)
    run = Run.start(config)
    trainer = trainer_of(run, training_arguments(config))
    assert trainer.graphs is None, "there is no GPU"
    if padded:
        trainer.graphs = never(run.model)
    return trainer


def never(model: torch.nn.Module) -> StepGraphs:
    graphs = StepGraphs(model, Counted)
    graphs._failed = True
    return graphs


def trained(config: TrainConfig, make: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of all steps, weights at the end."""
    trainer = trainer_with(config)
    trainer.graphs = make(trainer.model)
    losses = []
    step = trainer.training_step

    def noted(*args: Any, **kwargs: Any) -> torch.Tensor:
        loss = step(*args, **kwargs)
        losses.append(float(loss))
        return loss

    trainer.training_step = noted  # type: ignore[method-assign]
    trainer.train()
    assert trainer.model is not None
    return losses, {name: x.detach().clone() for name, x in trainer.model.state_dict().items()}


def counts() -> tuple[int, int]:
    """Of captures and replays."""
    return Counted.last.captured, Counted.last.replayed


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_run_with_graphs_has_the_bits_of_one_without(config: TrainConfig, accumulation: int) -> None:
    """Losses and weights, with dropout, whose random numbers a capture must not use up."""
    optim = dataclasses.replace(config.optim, accumulation=accumulation)
    config = dataclasses.replace(config, optim=optim)
    losses, weights = trained(config, never)
    again, same = trained(config, lambda model: StepGraphs(model, Counted))
    captured, replayed = counts()
    assert captured >= 1
    assert replayed > captured
    assert again == losses
    for name, weight in weights.items():
        assert torch.equal(weight, same[name]), name


def test_padding_changes_loss_and_gradients_by_rounding_only(config: TrainConfig) -> None:
    config = dataclasses.replace(config, model=small_model(layers=2, dropout=0.0))
    found = []
    for padded in (False, True):
        trainer = trainer_with(config, padded=padded)
        (sample,), count = trainer.get_batch_samples(
            iter(trainer.get_train_dataloader()), 1, torch.device("cpu")
        )
        assert (sample["batch"].layout.num_rows > sample["rows"]) is padded
        loss = trainer.training_step(trainer.model, sample, num_items_in_batch=count)
        assert int(count) == sample["targets"]
        found.append((loss, [parameter.grad for parameter in trainer.model.parameters()]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-7)


def test_large_steps_stay_as_they_are(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of more FLOPs a layer than a GPU's host has time for: neither padded nor captured."""
    trainer = trainer_with(config)
    assert trainer.model is not None
    trainer.graphs = StepGraphs(trainer.model, Counted)
    samples = list(trainer.get_train_dataloader())
    flops = sorted(sample["flops"] for sample in samples)
    limit = flops[len(flops) // 2]
    assert flops[0] < limit < flops[-1]
    monkeypatch.setattr("dti_model.training.trainer.MOST_FLOPS", limit / 2)  # two layers
    for sample in trainer.get_train_dataloader():
        is_small = sample["flops"] <= limit
        assert sample["is_graphed"] is is_small
        assert (sample["batch"].layout.num_rows > sample["rows"]) is is_small
    run, ran = trainer.graphs.run, []
    trainer.graphs.run = lambda *x: ran.append(x) or run(*x)  # type: ignore[assignment, func-returns-value]
    trainer.train()
    assert 0 < len(ran) < trainer.state.global_step


def test_padded_batches_have_few_shapes(config: TrainConfig) -> None:
    run = Run.start(config)
    dataset = trainer_of(run, training_arguments(config)).train_dataset
    shapes = set()
    for batch in dataset:  # type: ignore[attr-defined]
        padded = padded_batch(batch)
        layout, old = padded.layout, batch.layout
        shapes.add((layout.num_context, layout.num_sum))
        assert old.num_context < layout.num_context <= old.num_context + 16
        assert old.num_sum <= layout.num_sum < old.num_sum + 16
        assert len(padded.input_ids) == layout.num_rows
        assert torch.equal(padded.labels[: old.num_sum], batch.labels)
        assert (padded.labels[old.num_sum :] == NO_LABEL).all()
        context = padded.input_ids[: old.num_context]
        assert torch.equal(context, batch.input_ids[: old.num_context])
        sums = padded.input_ids[layout.num_context :][: old.num_sum]
        assert torch.equal(sums, batch.input_ids[old.num_context :])
    assert len(shapes) < len(dataset) / 2  # type: ignore[arg-type]


@pytest.mark.parametrize(("number", "parts", "rounded"), [
    (1, 32, 16), (16, 32, 16), (17, 32, 32), (15_871, 32, 15_872), (15_873, 32, 16_128), (700, 8, 704), (705, 8, 768), (64, 8, 64),
    (16_384, 16, 16_384), (16_385, 16, 17_408), (7_937, 16, 8_192), (193, 4, 224), (51, 4, 64), (257, 4, 320),
])  # fmt: skip
def test_rounding(number: int, parts: int, rounded: int) -> None:
    from dti_model.training.graphed_steps import _rounded

    assert _rounded(number, parts) == rounded
    assert rounded - number < max(16, number / parts)


class Steps:
    """A model of one weight, and steps over batches of one shape: the gradient is the sum of the ids over the number of targets."""

    def __init__(self, batch: StreamBatch) -> None:
        self.batch = batch
        self.model = torch.nn.Linear(1, 1)
        with torch.no_grad():
            self.model.weight.fill_(1.0)
        self.unused = self.model.bias
        self.fails: Exception | None = None

    def step(self, batch: StreamBatch, count: torch.Tensor) -> torch.Tensor:
        if self.fails is not None:
            error, self.fails = self.fails, None
            self.model.weight.sum().backward()  # gradients of half a step
            raise error
        loss = self.model.weight.sum() * batch.input_ids.sum() / count
        loss.backward()
        return loss.detach()

    def run(self, graphs: StepGraphs, first: bool = True) -> tuple[float, float]:
        """Loss and gradient of a batch with other ids each time."""
        if first:
            self.model.zero_grad()
        self.batch.input_ids.add_(1)
        loss = graphs.run(self.batch, torch.tensor(2), self.step)
        assert self.model.bias.grad is None, "has no part in the loss"
        assert self.model.weight.grad is not None
        return float(loss), float(self.model.weight.grad)

    def expected(self) -> float:
        return float(self.batch.input_ids.sum()) / 2


@pytest.fixture
def steps(config: TrainConfig) -> Steps:
    run = Run.start(config)
    dataset = trainer_of(run, training_arguments(config)).train_dataset
    return Steps(padded_batch(dataset[0]))  # type: ignore[index]


@pytest.fixture(autouse=True)
def no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="training goes on without")
        yield


def test_gradients_add_up_within_a_step_and_begin_anew_with_the_next(steps: Steps) -> None:
    graphs = StepGraphs(steps.model, Counted)
    for _ in range(6):
        assert steps.run(graphs) == (steps.expected(), steps.expected())
        before = steps.expected()
        assert steps.run(graphs, first=False) == (steps.expected(), before + steps.expected())
    assert counts() == (1, 10)


def test_a_capture_that_fails_is_the_last(steps: Steps) -> None:
    class Failing(Counted):
        def capture(self, computation: Any) -> Any:
            computation()
            steps.model.weight.grad.add_(1e9)  # type: ignore[union-attr]
            try:
                raise ValueError("the reason")
            except ValueError:
                raise RuntimeError("the capture was not begun") from None

    graphs = StepGraphs(steps.model, Failing)
    steps.run(graphs)
    with pytest.warns(
        UserWarning, match=r"without CUDA graphs.*ValueError: the reason.*--optim.graphs false"
    ):
        assert steps.run(graphs) == (steps.expected(), steps.expected())
    for _ in range(3):
        assert steps.run(graphs) == (steps.expected(), steps.expected())


@pytest.mark.parametrize("factor", [1.05, float("nan")])
def test_a_replay_that_is_wrong_is_the_last(factor: float, steps: Steps) -> None:
    """A gradient that is no number passed for one of zeros."""

    class Wrong(Counted):
        def capture(self, computation: Any) -> Any:
            replay = super().capture(computation)

            def wrong() -> Any:
                loss = replay()
                steps.model.weight.grad.mul_(factor)  # type: ignore[union-attr]
                return loss

            return wrong

    graphs = StepGraphs(steps.model, Wrong)
    for _ in range(2):
        steps.run(graphs)
    with pytest.warns(UserWarning, match="something else than the step itself"):
        assert steps.run(graphs) == (steps.expected(), steps.expected())
    assert steps.run(graphs) == (steps.expected(), steps.expected())


def test_weights_that_move_end_graphs(steps: Steps) -> None:
    graphs = StepGraphs(steps.model, Counted)
    for _ in range(3):
        steps.run(graphs)
    before = steps.expected()
    steps.model.weight.data = steps.model.weight.data.clone()
    with pytest.warns(UserWarning, match="the weights have moved"):
        assert steps.run(graphs, first=False) == (steps.expected(), before + steps.expected())
    assert steps.run(graphs) == (steps.expected(), steps.expected())


def test_graphs_give_way_where_memory_ends(steps: Steps) -> None:
    """A batch of another shape finds no memory beside the graphs: it is computed without them. Without graphs the error is the caller's."""
    graphs = StepGraphs(steps.model, Counted, most_graphs=1)
    for _ in range(3):
        steps.run(graphs)
    steps.batch = padded_batch(steps.batch)
    assert counts()[0] == 1
    steps.fails = torch.OutOfMemoryError("no memory")
    with pytest.warns(UserWarning, match="memory does not suffice"):
        assert steps.run(graphs) == (steps.expected(), steps.expected())
    steps.fails = torch.OutOfMemoryError("no memory")
    with pytest.raises(torch.OutOfMemoryError):
        steps.run(graphs)


def test_a_replay_that_depends_on_the_batch_of_its_capture_is_found(steps: Steps) -> None:
    """Host code ran with the capture's batch, so the first replays, which have others, are compared."""
    graphs = StepGraphs(steps.model, Counted)
    step, seen = steps.step, []

    def frozen(batch: StreamBatch, count: torch.Tensor) -> torch.Tensor:
        loss = step(batch, count)
        if batch is not steps.batch:  # the buffers
            seen.append(float(loss))
            steps.model.weight.grad.add_(10 * (seen[0] - float(loss)))  # type: ignore[union-attr]
        return loss

    steps.step = frozen  # type: ignore[method-assign]
    for _ in range(2):
        steps.run(graphs)
    with pytest.warns(UserWarning, match="something else than the step itself"):
        assert steps.run(graphs) == (steps.expected(), steps.expected())


def test_three_replays_of_the_first_shape_and_one_of_every_other_are_compared(steps: Steps) -> None:
    graphs = StepGraphs(steps.model, Counted)
    for left in (3, 1):
        for i in range(2 + left):
            steps.run(graphs)
            if i:
                assert list(graphs._graphs.values())[-1].unchecked == left + 1 - i
        steps.batch = padded_batch(steps.batch)


def test_packed_batches_have_few_shapes() -> None:
    """Each costs as much as two dozen steps. Batches are as those of films in SmolLM2's tokens: 8,192 rows at most, and less by up to an eighth."""
    shapes, rows, more = set(), 0, 0
    for num_tokens in range(7000, 8001, 25):
        layout = Workload("films", num_tokens, 50, 1, 1, 1, mean_tokens=24 + num_tokens % 3).layout()
        ids, labels = (
            torch.zeros(layout.num_rows, dtype=torch.long),
            torch.zeros(layout.num_sum, dtype=torch.long),
        )
        padded = padded_batch(StreamBatch(ids, layout, labels, labels)).layout
        shapes.add((padded.num_context, padded.num_sum))
        rows, more = rows + layout.num_rows, more + padded.num_rows - layout.num_rows
    assert len(shapes) <= 10
    assert 0 < more < 0.03 * rows


def test_graphs_end_with_training_and_may_begin_anew(steps: Steps) -> None:
    graphs = StepGraphs(steps.model, Counted)
    for _ in range(2):
        for _ in range(4):
            assert steps.run(graphs) == (steps.expected(), steps.expected())
        graphs.end()
        assert counts() == (1, 2)
        assert not graphs._graphs
    assert graphs.num_graphs == 2


@pytest.mark.parametrize(
    ("settings", "graphed"),
    [({}, True), ({"graphs": False}, False), ({"activation_checkpointing": True}, False)],
)
def test_settings_decide(
    settings: dict[str, bool], graphed: bool, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On one GPU whose model can be captured, which a CPU stands for."""
    monkeypatch.setattr("dti_model.training.trainer.can_be_graphed", lambda model: True)
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, **settings))
    trainer = trainer_of(Run.start(config), training_arguments(config))
    assert (trainer.graphs is not None) is graphed
    (sample,), _ = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, torch.device("cpu"))
    assert sample["is_graphed"] is graphed
    assert (sample["batch"].layout.num_rows > sample["rows"]) is graphed


def test_no_more_graphs_than_are_wanted(steps: Steps) -> None:
    graphs = StepGraphs(steps.model, Counted, most_graphs=1)
    small, large = steps.batch, padded_batch(steps.batch)
    for batch in (small, large, small, large, large, small):
        steps.batch = batch
        assert steps.run(graphs) == (steps.expected(), steps.expected())
    assert counts() == (1, 1)


def test_a_run_from_before_there_were_graphs_goes_on_without(config: TrainConfig) -> None:
    """Its config.yaml has no such setting. A run that began with graphs may go on without them, where memory was short."""
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, save_steps=2))
    train_until(3, config)
    path = config.out / "config.yaml"
    text = path.read_text()
    assert "\n  graphs: true\n" in text
    body = text[: text.rindex("# sha256")].replace("  graphs: true\n", "")
    path.write_text(f"{body}# sha256 {hashlib.sha256(body.encode()).hexdigest()}\n")
    assert not TrainConfig.load(config.out).optim.graphs
    assert config.first_difference(TrainConfig.load(config.out), places=True) is None
    train(config)
    assert not TrainConfig.load(config.out).optim.graphs

    without = dataclasses.replace(config.optim, graphs=False)
    other = dataclasses.replace(config, out=config.out.with_name("other"))
    train_until(3, other)
    train(dataclasses.replace(other, optim=without))
    assert not TrainConfig.load(other.out).optim.graphs
