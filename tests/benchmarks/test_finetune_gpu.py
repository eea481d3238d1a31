"""Fine-tuning within a time limit: its learning rate, its epochs, and what it leaves when time runs out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.gpu.finetune import (
    TimedTrainer,
    TimeLimit,
    Watch,
    epochs_that_fit,
    main,
    measured_speed,
    rate_after,
)
from benchmarks.synthetic import made_up_data, made_up_model
from tests.conftest import ROOT


def test_learning_rate_rises_and_falls_to_zero() -> None:
    rates = [rate_after(share / 100) for share in range(101)]
    assert rates[0] == 0
    assert rates[5] == 1
    assert rates[1:6] == sorted(rates[1:6])
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[-1] == rate_after(1.5) < 1e-9


def test_learning_rate_follows_the_clock_where_time_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """After half the time between the first step and the limit it is where half the steps would have it, and at the limit zero."""
    now = [100.0]
    monkeypatch.setattr("benchmarks.gpu.finetune.time.monotonic", lambda: now[0])
    trainer = TimedTrainer.__new__(TimedTrainer)
    trainer.limit, trainer.first_step = TimeLimit(50, 100.0), None
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = trainer.create_scheduler(1000, optimizer)

    def rate_at(seconds: float) -> float:
        now[0] = 100.0 + seconds
        optimizer.step()
        scheduler.step()
        return scheduler.get_last_lr()[0]

    rate_at(10)  # validation before training took this long
    assert rate_at(30) == pytest.approx(rate_after(0.5))
    assert rate_at(50) == pytest.approx(rate_after(1.0))


def test_the_speed_is_that_of_streaming_training(tmp_path: Path) -> None:
    """Rows of another model, of sliding windows or of the other way do not count, nor those of a former call on another card."""
    rows = tmp_path / "rows.jsonl"
    assert measured_speed(rows, graphs=False) == 0
    for model, kind, way, tokens_per_s, speeds in (
        ("llama8b-slice", "streaming_k50", "eager", 500_000, (0, 0)),
        ("smollm", "sliding_window", "eager", 500_000, (0, 0)),
        ("smollm", "streaming_k50", "eager", 199_000, (199_000, 0)),
        ("smollm", "streaming_k50", "eager", 70_000, (70_000, 0)),
        ("smollm", "streaming_k50", "graph", 180_000, (70_000, 180_000)),
    ):
        row = {
            "benchmark": "training",
            "model": model,
            "kind": kind,
            "way": way,
            "tokens_per_s": tokens_per_s,
        }
        with rows.open("a") as file:
            file.write(json.dumps(row) + "\n")
        assert (measured_speed(rows, graphs=False), measured_speed(rows, graphs=True)) == speeds


def test_epochs_are_those_that_fit() -> None:
    """An epoch that is cut short costs more than one that leaves time over; scoring takes its share."""
    million = 1_000_000
    assert epochs_that_fit(8 * million, 0, 200) == 1
    assert epochs_that_fit(8 * million, 77_000, 150) == 1
    assert epochs_that_fit(8 * million, 152_000, 200) == 1
    assert epochs_that_fit(8 * million, 155_000, 200) == 2
    assert epochs_that_fit(8 * million, 10 * million, 200) == 3


def test_the_best_validation_is_tested_at_once() -> None:
    """A process that is killed afterwards has its result; weights before the first step and worse ones are not tested."""
    happened: list[str] = []
    watch = Watch(
        TimeLimit(60, 0.0), lambda **row: happened.append(row["part"]), lambda: happened.append("test")
    )
    model = torch.nn.Linear(1, 1)
    for step, auc in ((0, 0.9), (1, 0.6), (2, 0.7), (3, 0.65)):
        torch.nn.init.constant_(model.weight, float(step))
        state = SimpleNamespace(global_step=step, epoch=float(step))
        watch.on_evaluate(None, state, None, metrics={"eval_auc": auc}, model=model)
    assert happened == ["validation", "validation", "test", "validation", "test", "validation"]
    assert watch.best["weight"].item() == 2


def test_finetuning_stops_in_time(tmp_path: Path) -> None:
    """At its limit after one step: that step's weights are validated and tested all the same. Packages that only preparing data needs
    are not there."""
    data = made_up_data(tmp_path)
    weights = made_up_model(tmp_path / "model", data)
    rows, temporary = tmp_path / "rows.jsonl", tmp_path / "temporary"
    temporary.mkdir()
    code = "from tests.without_polars import hide_missing; hide_missing(); from benchmarks.gpu import finetune; finetune.main()"
    places = ["--data", str(data), "--weights", str(weights), "--out", str(rows)]
    subprocess.run(
        [
            sys.executable,
            "-c",
            code,
            "--seconds",
            "0",
            "--k",
            "4",
            "--template",
            "{item}: {label}\n",
            *places,
        ],
        cwd=ROOT,
        env=os.environ | {"DTI_REHEARSE": "1", "TMPDIR": str(temporary)},
        check=True,
        capture_output=True,
    )
    parts = [json.loads(line) for line in rows.read_text().splitlines()]
    names = [row["part"] for row in parts]
    assert names == ["start", "validation", "validation", "test", "training", "test"]
    assert [row["step"] for row in parts if row["part"] == "validation"] == [0, 1]
    for row in parts:
        assert (row["template"], row["contexts"], row["compile"]) == ("{item}: {label}\n", "", False)
        assert (row["token_budget"], row["accumulation"], row["epochs"]) == (4096, 1, 1)
    training = parts[4]
    assert training["settled_tokens_per_s"] == pytest.approx(training["tokens_per_s"], abs=1), "one line"
    assert (training["steps"], training["cut_by_time"], len(training["losses"])) == (1, True, 1)
    assert [(row["test_k"], row["targets"]) for row in (parts[3], parts[5])] == [(50, 200), (1, 100)]
    assert not list(temporary.iterdir())


def test_a_bad_template_is_told_before_anything_is_read(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        sys, "argv", ["finetune", "--data", "nowhere", "--weights", "nowhere", "--template", "{item}"]
    )
    with pytest.raises(SystemExit):
        main()
    assert "model.template" in capsys.readouterr().err
