"""What a run computes in: alike on all ranks, from its first step to its last, and written down."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dti_model import devices
from dti_model.config import OptimConfig, TrainConfig
from dti_model.devices import precision_of_ranks, say_once, say_precision
from dti_model.evaluation import evaluate_run
from dti_model.model import Provenance, Run, RunExistsError
from dti_model.precision import Precision
from dti_model.training import StreamTrainer, train
from dti_model.training.grid_search import cell_config
from tests.config.test_precision import use_processor
from tests.training.small_runs import small_run, train_until


@pytest.fixture(autouse=True)
def nothing_said() -> None:
    say_once.cache_clear()


def run_in(precision: Any, data: Path, out: Path) -> TrainConfig:
    return small_run(
        data, out, optim=OptimConfig(epochs=1, token_budget=600, save_steps=1, precision=precision)
    )


def dtypes_of_products(patch: pytest.MonkeyPatch) -> set[torch.dtype]:
    """Those that training steps will multiply in."""
    seen: set[torch.dtype] = set()
    training_step = StreamTrainer.training_step

    def watched(self: StreamTrainer, model: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        layer: Any = self._unwrapped().get_decoder().layers[0]  # type: ignore[operator]
        with_hook = layer.mlp.gate_proj.register_forward_hook(
            lambda module, inputs, output: seen.add(output.dtype)
        )
        try:
            return training_step(self, model, *args, **kwargs)
        finally:
            with_hook.remove()

    patch.setattr(StreamTrainer, "training_step", watched)
    return seen


@pytest.mark.parametrize(
    ("flags", "precision", "dtype", "line"),
    [
        (("avx512_bf16",), "bf16", torch.bfloat16, "computes in bfloat16 (AVX512-BF16); --optim.precision fp32 for float32\n"),
        ((), "fp32", torch.float32, "computes in float32: this processor has no bfloat16 instructions\n"),
    ],
)  # fmt: skip
def test_auto_follows_the_processor_and_is_written_down(
    flags: tuple[str, ...],
    precision: Precision,
    dtype: torch.dtype,
    line: str,
    small_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    use_processor(monkeypatch, *flags)
    config = run_in("auto", small_folder, tmp_path / "run")
    seen = dtypes_of_products(monkeypatch)
    metrics = train(config)
    assert seen == {dtype}
    assert capsys.readouterr().err.count(line) == 1
    assert metrics["training"]["precision"] == metrics["provenance"]["precision"] == precision
    assert json.loads((config.out / "model" / "provenance.json").read_text())["precision"] == precision
    use_processor(monkeypatch)
    assert Run.load(config.out).trained_in == precision
    again = evaluate_run(config.out, None, "test", progress=False, precision=precision)
    assert again["test"] == metrics["test"], "scored as it was at its end"


@pytest.mark.parametrize(
    ("before", "after", "precision", "line"),
    [
        (("avx512_bf16",), (), "bf16", "goes on in bfloat16, as the run began, and slowly: this processor has no bfloat16 instructions"),
        ((), ("avx512_bf16",), "fp32", "goes on in float32, as the run began; a new one here computes in bfloat16 (AVX512-BF16)"),
    ],
)  # fmt: skip
def test_a_run_goes_on_as_it_began(
    before: tuple[str, ...],
    after: tuple[str, ...],
    precision: str,
    line: str,
    small_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On a machine where `auto` means the other precision; half of it would have been trained in another."""
    use_processor(monkeypatch, *before)
    config = run_in("auto", small_folder, tmp_path / "run")
    train_until(2, config)
    use_processor(monkeypatch, *after)
    capsys.readouterr()
    seen = dtypes_of_products(monkeypatch)
    metrics = train(config)
    assert line in capsys.readouterr().err
    assert metrics["training"]["precision"] == metrics["provenance"]["precision"] == precision
    assert seen == {torch.bfloat16 if precision == "bf16" else torch.float32}


def test_a_run_begun_with_the_older_spelling_goes_on(
    small_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its checkpoint knows no precision, and its settings have a boolean."""
    use_processor(monkeypatch)
    config = run_in("bf16", small_folder, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(Run, "provenance", property(_without_precision))
        train_until(2, config)
    file = config.out / "config.yaml"
    file.write_text(_unsealed(file.read_text()).replace("precision: bf16", "bf16: true"))
    with pytest.raises(RunExistsError, match=r"optim\.precision was 'bf16' and is now 'fp32'"):
        train(run_in("fp32", small_folder, config.out))
    assert train(config)["training"]["precision"] == "bf16"
    assert "computes in" not in capsys.readouterr().err, "the choice was the user's own"


def _without_precision(run: Run) -> Provenance:
    return Provenance.of(run.data, run.tokenizer, run.config)


def _unsealed(text: str) -> str:
    return "".join(line for line in text.splitlines(keepends=True) if not line.startswith("#"))


def test_ranks_that_would_differ_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three machines in one job, one of them older: its ranks would have trained with other products."""
    use_processor(monkeypatch, "avx512_bf16")
    monkeypatch.setattr(devices, "gather_from_ranks", lambda mine: [mine, "fp32", mine, "fp32"])
    with pytest.raises(
        ValueError,
        match=r"^--optim\.precision auto is bfloat16 on ranks 0, 2 and float32 on ranks 1, 3, whose hardware does not multiply "
        r"bfloat16: say --optim\.precision fp32, or bf16, which is slow there$",
    ):
        precision_of_ranks("auto", "cpu", "--optim.precision")
    monkeypatch.setattr(devices, "gather_from_ranks", lambda mine: [mine] * 4)
    assert precision_of_ranks("auto", "cpu", "--optim.precision") == "bf16"


@pytest.mark.parametrize(("rank", "lines"), [(0, 1), (1, 0)])
def test_one_rank_says_it_once(
    rank: int, lines: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use_processor(monkeypatch, "avx512_bf16")
    monkeypatch.setattr(devices, "rank", lambda: rank)
    for _ in range(3):
        say_precision("auto", "cpu", "--optim.precision")
    assert capsys.readouterr().err.count("\n") == lines


def test_cells_in_the_older_spelling(small_folder: Path, tmp_path: Path) -> None:
    base = small_run(small_folder, tmp_path)
    for value, precision in ((True, "bf16"), (False, "fp32"), ("true", "bf16")):
        assert cell_config(base, {"optim.bf16": value}, 0).optim.precision == precision
    with pytest.raises(ValueError, match="and both are given"):
        cell_config(base, {"optim.bf16": True, "optim.precision": "auto"}, 0)
