"""Scoring in bfloat16: weights are cast once, layers compute what autocast computes, and probabilities stay near those in float32."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dti_model.cli import main
from dti_model.config import DTIConfig, LoraSettings, ModelConfig, OptimConfig, TrainConfig
from dti_model.evaluation import score_targets
from dti_model.model import LayerKeys, Run, token_logits
from dti_model.precision import Resolved, computing
from dti_model.scorer import BFLOAT16_BOUND, Scorer
from dti_model.training import train
from tests.config.test_precision import use_processor
from tests.model.pretrained_files import pretrained_folder
from tests.scorer.scoring_jobs import broken_off, requests, score, write_jsonl
from tests.threads import in_threads
from tests.training.small_runs import small_run

CANDIDATES: list[Any] = ["1", "2", "9", "10", "100", {"text": "Two Stories (1995); War"}]
BOTH: tuple[Resolved, Resolved] = ("fp32", "bf16")


@pytest.fixture(scope="module")
def trained(small_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose probabilities spread: two layers of 32, learnt by heart."""
    config = small_run(
        small_folder,
        tmp_path_factory.mktemp("runs") / "run",
        dti=DTIConfig(reset_layers=(1,)),
        model=ModelConfig(layers=2, width=32, heads=2, kv_heads=1, mlp_width=64, dropout=0.0),
        optim=OptimConfig(
            epochs=50,
            validate_every=10**6,
            learning_rate=5e-3,
            weight_decay=0.0,
            token_budget=600,
            precision="fp32",
        ),
    )
    train(config)
    return config.out


@pytest.fixture(scope="module")
def run(trained: Path) -> Run:
    return Run.load(trained)


def difference(run: Run, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores in float32, and how far those in bfloat16 are away."""
    single, half = (
        score_targets(run.model, run.config.dti, run.builder, rows, k=1, precision=precision)
        for precision in BOTH
    )
    return single, np.abs(half - single)


def test_probabilities_stay_near(run: Run) -> None:
    rows = np.concatenate([run.data.targets("train"), run.data.targets("test")])
    single, away = difference(run, rows)
    assert np.ptp(single) > 0.2, "no model that decides anything"
    assert 0 < away.max() < BFLOAT16_BOUND
    with torch.autocast("cpu", torch.bfloat16):  # of a caller who does not choose
        scores = score_targets(run.model, run.config.dti, run.builder, rows, k=1, precision="fp32")
    assert np.array_equal(scores, single)


def test_one_pass_a_state_and_evaluation_agree(run: Run, trained: Path) -> None:
    scorer = Scorer.from_run(trained, precision="bf16")
    history = scorer.history_of("5")
    expected = Scorer(run, precision="fp32").score(history, CANDIDATES)
    state = scorer.encode(history)
    for scores in (scorer.score(history, CANDIDATES), scorer.score(state, CANDIDATES)):
        assert 0 < np.abs(scores - expected).max() < BFLOAT16_BOUND
    assert {keys.k.dtype for keys in state.layers} == {torch.bfloat16}
    assert state.num_bytes == Scorer(run, precision="fp32").encode(history).num_bytes / 2


def test_weights_are_cast_once_and_the_run_keeps_its_own(run: Run) -> None:
    before = {name: (tensor.data_ptr(), tensor.dtype) for name, tensor in run.model.state_dict().items()}
    scorer = Scorer(run, precision="bf16")
    model = scorer.click_model.model
    scorer.score([], CANDIDATES)
    assert scorer.precision == "bf16"
    assert {name: (x.data_ptr(), x.dtype) for name, x in run.model.state_dict().items()} == before
    for name, tensor in model.state_dict().items():
        is_projection = name.endswith("_proj.weight")
        assert tensor.dtype == (torch.bfloat16 if is_projection else torch.float32), name
        assert (tensor.data_ptr() == before[name][0]) != is_projection, "the rest is shared"
    assert scorer.run.model is model is Scorer(scorer.run, precision="bf16").click_model.model
    with pytest.raises(ValueError, match="weights were cast to bfloat16: load it again"):
        Scorer(scorer.run, precision="fp32")


def keys_of(model: nn.Module, run: Run) -> list[LayerKeys]:
    """Of every layer, under autocast."""
    batch = run.builder.batch(_prompts(run))
    recorded: list[LayerKeys] = []
    with torch.no_grad(), computing("bf16", "cpu"):
        token_logits(model, batch.input_ids, batch.layout, run.config.dti, recorded=recorded)
    return recorded


def _prompts(run: Run) -> Any:
    from dti_model.prompts import Prompts

    return Prompts.sliding_windows(run.data, run.data.targets("test")[:4], run.config.window)


def pretrained_run(data: Path, folder: Path, family: str, **settings: Any) -> Run:
    """An untrained run of a tiny pretrained model, whose updates are no zeros."""
    base = pretrained_folder(folder, family)
    model = ModelConfig(pretrained=str(base), **settings)
    run = Run.start(TrainConfig(data=data, out=Path("unused"), window=3, model=model))
    with torch.no_grad():
        for name, parameter in run.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    run.model.eval()
    return run


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("smollm2", {"lora": LoraSettings(rank=2)}),  # its head is its embedding, and has the trained row too
        ("qwen3", {"lora": LoraSettings(rank=2)}),  # norms of queries and keys
        ("qwen2", {"finetune": "full"}),  # biases
        ("llama2", {"lora": LoraSettings(rank=2), "dtype": "bfloat16"}),
        ("llama2", {"finetune": "full", "dtype": "bfloat16"}),
    ],
)
def test_layers_of_every_kind_compute_what_autocast_computes(
    family: str, settings: dict[str, Any], small_folder: Path, tmp_path: Path
) -> None:
    run = pretrained_run(small_folder, tmp_path, family, **settings)
    scorer = Scorer(run, precision="bf16")
    expected, found = keys_of(run.model, run), keys_of(scorer.click_model.model, run)
    for layer, other in zip(expected, found, strict=True):
        assert torch.equal(layer.k, other.k)
        assert torch.equal(layer.v, other.v)
    assert torch.bfloat16 in {layer.v.dtype for layer in found}
    assert np.ptp(scorer.score([("1", 1)], CANDIDATES)) > 0
    single, away = difference(run, run.data.targets("test"))
    assert np.isfinite(single).all()
    assert np.isfinite(away).all()


def test_threads_compute_in_bfloat16_each(trained: Path) -> None:
    """Autocast is switched on in one thread only."""
    scorer = Scorer.from_run(trained, precision="bf16")
    expected, results = scorer.score([], CANDIDATES), []

    def work(_: int) -> None:
        results.append(scorer.score([], CANDIDATES))

    in_threads(work, 3)
    assert len(results) == 3
    assert all(np.array_equal(scores, expected) for scores in results)


def test_a_job_goes_on_in_its_precision(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of its lines would have been in another."""
    requests_file = tmp_path / "in.jsonl"
    write_jsonl(requests_file, requests(200))
    of = {precision: Scorer.from_run(run_folder, precision=precision) for precision in BOTH}
    broken_off(of["bf16"], requests_file, tmp_path / "out.jsonl", monkeypatch)
    with pytest.raises(FileExistsError, match=r"device \(cpu in bfloat16, not cpu\)"):
        score(of["fp32"], requests_file, tmp_path / "out.jsonl")
    score(of["bf16"], requests_file, tmp_path / "out.jsonl")
    score(of["bf16"], requests_file, tmp_path / "unbroken.jsonl")
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "unbroken.jsonl").read_bytes()


NOTICE = "computes in bfloat16 (AVX512-BF16); --precision fp32 for float32\n"
TRAINED_IN = "scored in bfloat16; the run was trained, and scored at its end, in float32 (--precision fp32)\n"


@pytest.mark.parametrize(
    ("asked", "precision", "said"),
    [("auto", "bf16", NOTICE + TRAINED_IN), ("bf16", "bf16", TRAINED_IN), ("fp32", "fp32", "")],
)
def test_evaluate_names_the_precision(
    asked: str,
    precision: str,
    said: str,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    use_processor(monkeypatch, "avx512_bf16")
    file = tmp_path / "metrics.json"
    words = [f"--run={trained}", f"--precision={asked}", "--progress=false", f"--json={file}", "--device=cpu"]
    capsys.readouterr()
    assert main(["evaluate", *words]) == 0
    assert capsys.readouterr().err == said
    result = json.loads(file.read_text())
    assert (result["precision"], result["provenance"]["precision"]) == (precision, "fp32")
    own = json.loads((trained / "metrics.json").read_text())["test"]
    assert (result["test"] == own) == (precision == "fp32")


def test_score_says_what_auto_means(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use_processor(monkeypatch, "avx512_bf16")
    write_jsonl(tmp_path / "in.jsonl", requests(3))
    files = [f"--input={tmp_path / 'in.jsonl'}", f"--output={tmp_path / 'out.jsonl'}", "--progress=false"]
    capsys.readouterr()
    assert main(["score", f"--run={trained}", *files, "--device=cpu", "--precision=auto"]) == 0
    assert capsys.readouterr().err == NOTICE


def test_an_older_run_is_known_by_its_settings(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its fingerprints say nothing about precision."""
    from dti_model.model import run as module

    original = module.open_trained

    def older(folder: Path) -> Any:
        config, made_of = original(folder)
        return config, dataclasses.replace(made_of, precision=None)

    monkeypatch.setattr(module, "open_trained", older)
    assert Run.load(trained).trained_in == "fp32"
