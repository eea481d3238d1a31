"""`dti export`: what plain transformers compute of it, what the library does, and what its files say."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from dti_model.cli import main
from dti_model.config import MODES, DTIConfig, LoraSettings, ModelConfig, TrainConfig
from dti_model.data import DataError, PreparedData
from dti_model.data.build import prepare
from dti_model.data.sources.custom import CustomFiles
from dti_model.model import MODEL_FOLDER, Calibration, Run
from dti_model.model.export import LibraryOnlyError, export_run
from dti_model.model.model_card import plain_differences
from dti_model.scorer import Scorer
from dti_model.scorer.items import ItemError
from tests.files.test_damage import unsealed
from tests.model.pretrained_files import pretrained_folder

# Strong resets in two of three layers, so that every mode that differs does so by more than rounding.
RESET = DTIConfig(alpha_min=0.3, alpha_max=0.9, reset_layers=(1, 2))
HISTORY = [
    ({"text": text}, label)
    for text, label in (
        ("Casino (1995); Crime", 1),
        ("Land (1995)", 0),
        ("Fish & Chips (1990); Comedy", 1),
        ("Babe", 0),
    )
]
CANDIDATES = [
    {"text": text}
    for text in ("Toy Story (1995); Animation", "Heat", "Good Morning (1971); Drama, War", "[SUM] yes no")
]
FLOAT32 = 1e-5  # of a probability: another order of float32 sums, through three layers


def run_folder(
    folder: Path,
    data: Path,
    dti: DTIConfig,
    model: ModelConfig | None = None,
    calibration: Calibration | None = None,
    **more: Any,
) -> Path:
    """A run as `dti train` leaves it, with random weights that are large enough for scores to differ."""
    model = model or ModelConfig(layers=3, width=32, heads=4, kv_heads=2, mlp_width=48)
    config = TrainConfig(**{"data": data, "out": folder, "window": 3, "dti": dti, "model": model, **more})
    folder.mkdir(parents=True)
    run = Run.start(config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in run.model.named_parameters():
            if "lora_" in name or "token" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            elif name.endswith("alibi_slopes"):
                parameter.mul_(1.7)
            elif model.pretrained is None and parameter.ndim == 2:
                parameter.mul_(5)
    config.save(folder)
    run.calibration = calibration
    run.save_model(folder / MODEL_FOLDER)
    return folder


def plain_scores(folder: Path, told: dict[str, Any], model: Any = None) -> np.ndarray:
    """One prompt per candidate through plain transformers, by what dti.json says."""
    prompt = told["prompt"]
    parts = json.loads((folder / "tokenizer.json").read_text())
    tokenizer = Tokenizer.from_str(json.dumps({**parts, "added_tokens": []}))
    model = model or AutoModelForCausalLM.from_pretrained(folder)

    def ids(item: dict[str, str]) -> list[int]:
        found = tokenizer.encode(item["text"], add_special_tokens=False).ids
        spelled = [part for token in found for part in told["spelled_tokens"].get(str(token), [token])]
        return [*prompt["before"], *spelled[: prompt["max_item_tokens"]], *prompt["cue"]]

    shared = list(prompt["prefix"])
    for item, label in HISTORY[len(HISTORY) - prompt["window"] :]:
        shared += [*ids(item), prompt["labels"][label], *prompt["separator"]]
    scores = []
    for candidate in CANDIDATES:
        with torch.no_grad():
            logits = model.eval()(torch.tensor([[*shared, *ids(candidate), prompt["sum_token"]]])).logits[
                0, -1
            ]
        scores.append(float(logits[prompt["labels"]].double().softmax(-1)[1]))
    return np.asarray(scores)


def export(run: Path, **options: Any) -> tuple[Path, dict[str, Any]]:
    out = run.with_name(run.name + "-export")
    export_run(run, out, **options)
    return out, json.loads((out / "dti.json").read_text())


@pytest.mark.parametrize("mode", MODES)
def test_what_computes_right_in_every_mode(small_folder: Path, tmp_path: Path, mode: str) -> None:
    """`dti export` in the default mode gave other probabilities in plain transformers, and said nothing of it."""
    run = run_folder(tmp_path / "run", small_folder, dataclasses.replace(RESET, mode=mode))
    expected = Scorer.from_run(run, device="cpu").score(HISTORY, CANDIDATES)
    assert np.ptp(expected) > 0.05
    out, told = export(run, library_only=True)
    assert np.array_equal(Scorer.from_export(out, device="cpu").score(HISTORY, CANDIDATES), expected)
    assert told["plain_transformers"] == (mode == "dti-minus")
    error = np.abs(plain_scores(out, told) - expected).max()
    if mode == "dti-minus":
        assert error < FLOAT32
    else:
        assert error > 1e-3, "it is said to differ, and does not"
        with pytest.raises(
            LibraryOnlyError, match=r"silently give wrong .* because \[SUM\] .*--library-only .* dti-minus"
        ):
            export_run(run, tmp_path / "refused")
        assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize(
    ("dti", "window", "is_plain"),
    [
        (DTIConfig(mode="dti-reset", alpha_max=0.0), 3, True),  # ratios of 0
        (
            DTIConfig(mode="dti-reset", alpha_min=0.5, alpha_max=0.9, reset_layers=(0, -3)),
            3,
            True,
        ),  # initial already
        (DTIConfig(mode="dti-reset", alpha_min=0.5, alpha_max=0.9, reset_layers=()), 3, True),
        (DTIConfig(mode="dti-reset", alpha_min=0.5, alpha_max=0.9), 0, True),  # nothing but own text
        (DTIConfig(mode="dti-reset", alpha_max=0.0, alpha_own=0.9), 0, False),
        (DTIConfig(mode="dti-reset", alpha_max=0.0, alpha_own=0.9, reset_layers=(1,)), 3, False),
        (DTIConfig(mode="dti", alpha_max=0.0), 3, False),
        (DTIConfig(mode="dti-position", slope_scale=0.0), 3, False),
        (DTIConfig(mode="dti-minus", train_slopes=True), 3, True),
    ],
)
def test_plain_transformers_follows_from_the_settings(
    small_folder: Path, tmp_path: Path, dti: DTIConfig, window: int, is_plain: bool
) -> None:
    """Not from the name of the mode: a reset that changes nothing is none."""
    run = run_folder(tmp_path / "run", small_folder, dti, window=window)
    out, told = export(run, library_only=True)
    assert told["plain_transformers"] is is_plain
    expected = Scorer.from_export(out, device="cpu").score(HISTORY, CANDIDATES)
    error = np.abs(plain_scores(out, told) - expected).max()
    assert (error < FLOAT32) == is_plain, error


def test_ropes_that_follow_the_longest_prompt_are_named() -> None:
    config = SimpleNamespace(num_hidden_layers=2, rope_parameters={"rope_type": "dynamic"})
    (reason,) = plain_differences(DTIConfig(mode="dti-minus"), 3, config)
    assert "follow the longest prompt" in reason


SLIDING = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
BASES = {
    "smollm2": {},
    "mistral": {"sliding_window": 6},
    "qwen2": SLIDING,
    "qwen3": SLIDING,
    "llama3": {},
}


@pytest.mark.parametrize("finetune", ["lora", "full"])
@pytest.mark.parametrize("family", BASES)
def test_fine_tuned_models_without_their_window_of_tokens(
    small_folder: Path, tmp_path: Path, family: str, finetune: str
) -> None:
    """An exported Mistral kept a sliding window in tokens, which the library ignores: off by .05 in plain transformers."""
    base = pretrained_folder(tmp_path / "base", family, **BASES[family])
    settings = ModelConfig(
        pretrained=str(base),
        finetune=finetune,
        lora=LoraSettings(rank=4, alpha=8) if finetune == "lora" else LoraSettings(),
        instruction="Does the user like it?",
    )
    run = run_folder(tmp_path / "run", small_folder, DTIConfig(mode="dti-minus"), settings)
    expected = Scorer.from_run(run, device="cpu").score(HISTORY, CANDIDATES)
    out, told = export(run)
    again = Scorer.from_export(out, device="cpu").score(HISTORY, CANDIDATES)
    assert np.abs(again - expected).max() < FLOAT32
    assert np.array_equal(again, expected) or finetune == "lora"
    model = AutoModelForCausalLM.from_pretrained(out)
    assert np.abs(plain_scores(out, told, model) - expected).max() < FLOAT32
    if BASES[family]:
        for name, value in BASES[family].items():
            setattr(model.config, name, value)
        model.config.layer_types = ["sliding_attention"] * 3
        windowed = type(model)(model.config)
        windowed.load_state_dict(model.state_dict())
        assert np.abs(plain_scores(out, told, windowed) - expected).max() > 1e-3, (
            "the window is wider than the prompt"
        )


def test_an_export_keeps_what_else_a_model_has(small_folder: Path, tmp_path: Path) -> None:
    """Tied weights, dtype, generation settings and trained slopes."""
    base = pretrained_folder(tmp_path / "base", "smollm2")
    (base / "generation_config.json").write_text(json.dumps({"max_new_tokens": 7, "bos_token_id": 0}))
    lora = ModelConfig(pretrained=str(base), lora=LoraSettings(rank=2), dtype="bfloat16")
    run = run_folder(tmp_path / "lora", small_folder, DTIConfig(mode="dti-minus"), lora)
    model = AutoModelForCausalLM.from_pretrained(export(run)[0])
    assert model.dtype == torch.bfloat16
    assert model.generation_config.max_new_tokens == 7
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    slopes = run_folder(tmp_path / "slopes", small_folder, dataclasses.replace(RESET, train_slopes=True))
    scorer = Scorer.from_export(export(slopes, library_only=True)[0], device="cpu")
    assert np.array_equal(
        scorer.score(HISTORY, CANDIDATES), Scorer.from_run(slopes, device="cpu").score(HISTORY, CANDIDATES)
    )
    model = scorer.click_model.model
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def python_of(card: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card.read_text(), re.DOTALL)


@pytest.mark.parametrize(
    ("family", "finetune"),
    [
        (None, ""),
        ("smollm2", "lora"),
        ("mistral", "lora"),
        ("qwen2", "lora"),
        ("mistral", "full"),
        ("qwen2", "full"),
    ],
)
def test_the_python_of_the_model_cards_gives_the_scores(
    small_folder: Path, tmp_path: Path, family: str | None, finetune: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the export, and of the run's own model/ with an adapter in it; calibrated where the run is."""
    settings = None
    if family is not None:
        base = pretrained_folder(tmp_path / "base", family, **BASES[family])
        lora = LoraSettings(rank=4, alpha=8) if finetune == "lora" else LoraSettings()
        settings = ModelConfig(pretrained=str(base), finetune=finetune, lora=lora)
    calibration = None if finetune == "full" else Calibration(1.5, -0.25)
    run = run_folder(tmp_path / "run", small_folder, DTIConfig(mode="dti-minus"), settings, calibration)
    expected = Scorer.from_run(run, device="cpu").score(HISTORY, CANDIDATES)
    out, told = export(run)
    assert told["calibration"] == (None if calibration is None else dataclasses.asdict(calibration))
    assert told["plain_transformers_without_token_window"] is None
    of_run = json.loads((run / MODEL_FOLDER / "dti.json").read_text())
    assert of_run["plain_transformers_without_token_window"] == (
        6 if family in ("mistral", "qwen2") else None
    )
    history = [(item["text"], label) for item, label in HISTORY]
    for folder in (out, run / MODEL_FOLDER):
        monkeypatch.chdir(folder)
        blocks = python_of(folder / "README.md")
        assert len(blocks) == (2 if folder == out else 1)
        names: dict[str, Any] = {}
        for block in blocks:
            exec(block, names)
        scores = [names["click_probability"](history, item["text"]) for item in CANDIDATES]
        assert np.abs(scores - expected).max() < FLOAT32


def test_the_cards_of_other_modes_warn(
    small_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_folder(tmp_path / "run", small_folder, DTIConfig())
    arguments = ["export", f"--run={run}", f"--out={tmp_path / 'out'}"]
    capsys.readouterr()
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "Give --library-only" in error
    assert main([*arguments, "--library-only"]) == 0
    assert "Plain transformers load it and give wrong ones" in capsys.readouterr().out
    for folder in (tmp_path / "out", run / MODEL_FOLDER):
        text = (folder / "README.md").read_text()
        assert text.startswith("---\nlibrary_name: transformers\ntags:\n")
        assert "**Plain transformers do not compute this model.**" in text
        assert "AutoModelForCausalLM" not in text
    (run / MODEL_FOLDER / "README.md").write_text("mine")  # people may edit it
    Scorer.from_run(run, device="cpu")
    monkeypatch.chdir(tmp_path / "out")
    names: dict[str, Any] = {}
    (block,) = python_of(Path("README.md"))
    exec(block, names)
    assert names["probabilities"].shape == (2,)
    minus = run_folder(tmp_path / "minus", small_folder, DTIConfig(mode="dti-minus"))
    assert main(["export", f"--run={minus}", f"--out={tmp_path / 'plain'}"]) == 0
    assert "Plain transformers (AutoModelForCausalLM) and Scorer" in capsys.readouterr().out


def test_items_of_an_export(small_folder: Path, tmp_path: Path) -> None:
    """By fields and text without data; by id too with the data that the model was trained on."""
    run = run_folder(tmp_path / "run", small_folder, RESET)
    of_run = Scorer.from_run(run, device="cpu")
    out, _ = export(run, library_only=True)
    alone = Scorer.from_export(out, device="cpu")
    movie = {"title": "Two  Stories (1995)", "genres": ["War"]}
    assert alone.text_of(movie) == of_run.text_of(movie)
    assert np.array_equal(alone.score(HISTORY, [movie]), of_run.score(HISTORY, [movie]))
    for call, message in (
        (
            lambda: alone.score([], ["1"]),
            r"candidates\[0\]: no item with id '1': there is no prepared data here",
        ),
        (lambda: alone.history_of("1"), "no user with id '1': there is no prepared data here"),
    ):
        with pytest.raises(ItemError, match=message):
            call()
    with pytest.raises(ValueError, match="made from an export"):
        _ = alone.run
    with_data = Scorer.from_export(out, data=small_folder, device="cpu")
    history = of_run.history_of("5")
    assert with_data.history_of("5") == history
    assert np.array_equal(with_data.score(history, ["1", "2"]), of_run.score(history, ["1", "2"]))


def test_items_by_a_template_and_other_data(small_folder: Path, tmp_path: Path) -> None:
    lines = [f"u{i % 7},i{i % 5},{i},{i % 2}" for i in range(200)]
    (tmp_path / "clicks.csv").write_text("\n".join(["user,item,timestamp,liked", *lines]) + "\n")
    items = [f"i{i},Thing {i},shelf {i % 2}" for i in range(5)]
    (tmp_path / "items.csv").write_text("\n".join(["item,name,place", *items]) + "\n")
    files = CustomFiles(tmp_path / "clicks.csv", tmp_path / "items.csv", "{name}; at {place}", label="liked")
    prepare(files, tmp_path / "data", min_context=1, vocab_size=300)
    run = run_folder(tmp_path / "run", tmp_path / "data", RESET)
    out, told = export(run, library_only=True)
    assert told["item_text"]["text"] == "{name}; at {place}"
    assert Scorer.from_export(out, device="cpu").text_of({"name": "A", "place": "B"}) == "A; at B"
    with pytest.raises(DataError, match="is not the prepared data that .* was trained on"):
        Scorer.from_export(out, data=small_folder, device="cpu")
    Scorer.from_export(out, data=small_folder, device="cpu", other_data=True)


def test_exports_of_runs_of_older_versions(small_folder: Path, tmp_path: Path) -> None:
    """Their model/ has no dti.json: the template then comes from the data, or is not known."""
    run = run_folder(tmp_path / "run", small_folder, RESET)
    for name in ("dti.json", "README.md", "checksums.json", "provenance.json"):
        (run / MODEL_FOLDER / name).unlink()
    unsealed(run)
    out, told = export(run, library_only=True)
    assert told["item_text"] == {}
    assert told["data"] == PreparedData.open(small_folder).fingerprint
    (out / "checksums.json").unlink()
    old = {name: told[name] for name in ("dti", "prompt")}
    (out / "dti.json").write_text(json.dumps(old))
    scorer = Scorer.from_export(out, device="cpu")
    expected = Scorer.from_run(run, device="cpu").score(HISTORY, CANDIDATES)
    assert np.array_equal(scorer.score(HISTORY, CANDIDATES), expected)
    with pytest.raises(ItemError, match="how fields become a text is not known here"):
        scorer.score([], [{"title": "A", "genres": []}])
