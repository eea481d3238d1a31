"""Pretrained models: loading, [SUM] and label words, LoRA, saving, merging; tiny random ones, and SmolLM2 where its weights are."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import sys
from pathlib import Path

import polars as pl
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig

from dti_kernels import StreamLayout
from dti_model.config import DTIConfig, LoraSettings, ModelConfig, OptimConfig, TrainConfig
from dti_model.evaluation import eval_targets, evaluate_run, score_split, score_targets
from dti_model.model.attention import Stream, apply_dti, position_ids, token_logits
from dti_model.model.export import export_run
from dti_model.model.lora import add_lora
from dti_model.model.pretrained import (
    SUPPORTED_TYPES,
    PretrainedModelError,
    load_causal_lm,
    load_plain,
    load_tokenizer,
)
from dti_model.model.run import Run
from dti_model.prompts import PromptFormat
from dti_model.training import train
from tests.model.pretrained_files import FAMILIES, pretrained_folder, small_tokenizer

FLOAT32 = torch.finfo(torch.float32).eps


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pretrained_folder(tmp_path_factory.mktemp("pretrained") / "base")


@pytest.fixture
def config(base: Path, small_folder: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        data=small_folder,
        out=tmp_path / "run",
        k=3,
        window=3,
        progress=False,
        model=ModelConfig(
            pretrained=str(base), lora=LoraSettings(rank=4, alpha=8), instruction="Does the user like it?"
        ),
        optim=OptimConfig(epochs=2, token_budget=600, patience=0, learning_rate=5e-3),
    )


def sum_logits(model, layout: StreamLayout, context: torch.Tensor, dti: DTIConfig) -> torch.Tensor:
    input_ids = torch.cat([context, torch.full((layout.num_sum,), 7)])
    return token_logits(model, input_ids, layout, dti)


LAYOUT = StreamLayout.build([[3, 2, 4, 2]], [[1] * 4], [2], window=2)
CONTEXT = torch.randint(8, 200, (LAYOUT.num_context,), generator=torch.Generator().manual_seed(0))


def test_every_supported_type_is_among_the_families() -> None:
    assert {config_class.model_type for config_class, _ in FAMILIES.values()} == set(SUPPORTED_TYPES)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_family_loads_and_without_targets_is_the_untouched_model(family: str, tmp_path: Path) -> None:
    folder = pretrained_folder(tmp_path, family)
    untouched = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = load_tokenizer(str(folder))
    model = load_causal_lm(ModelConfig(pretrained=str(folder)), tokenizer).eval()
    check_no_targets(untouched, apply_dti(model, DTIConfig()), vocabulary=200)
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer) > untouched.config.vocab_size


@torch.no_grad()
def check_no_targets(untouched, model, vocabulary: int, num_rows: int = 40) -> None:
    """Logits at all context rows under one wide window are those of plain causal attention."""
    context = torch.randint(vocabulary, (num_rows,), generator=torch.Generator().manual_seed(1))
    layout = StreamLayout.build([[num_rows]], [[0]], [0], window=0)
    expected = untouched(context[None], use_cache=False).logits
    logits = model(
        context[None],
        position_ids=position_ids(layout, DTIConfig())[None],
        stream=Stream(layout, context_outputs=True),
        use_cache=False,
    ).logits[..., : expected.shape[-1]]
    # The same float32 arithmetic in another order: a few roundings per layer.
    layers = untouched.config.num_hidden_layers
    assert (logits - expected).abs().max() <= 64 * FLOAT32 * max(1, layers / 3) * expected.abs().max()


def test_the_shape_of_smollm2_without_targets_is_the_untouched_model() -> None:
    """Nine query heads, three key heads, width 576: shapes that no tiny model has."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=500,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=3,
        num_attention_heads=9,
        num_key_value_heads=3,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
        initializer_range=0.04,
    )
    models = [AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    check_no_targets(models[0], apply_dti(models[1], DTIConfig()), 500, num_rows=150)


def test_sum_is_a_new_token_whose_row_is_the_mean_and_stays_one_token(base: Path, tmp_path: Path) -> None:
    plain = AutoTokenizer.from_pretrained(base)
    tokenizer = load_tokenizer(str(base))
    assert len(tokenizer) == len(plain) + 1
    assert tokenizer.encode("[SUM]", add_special_tokens=False) == [len(plain)]
    text = "Casino (1995); Crime"
    assert tokenizer.encode(text) == plain.encode(text)
    model = load_causal_lm(ModelConfig(pretrained=str(base)), tokenizer)
    rows = model.get_input_embeddings().weight
    torch.testing.assert_close(rows[-1], rows[:-1].mean(0))
    tokenizer.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    assert len(load_tokenizer(str(tmp_path))) == len(tokenizer)


def test_label_words_of_a_vocabulary() -> None:
    """The first pair of LABEL_TEXTS whose two words are single tokens; an instruction follows BOS."""

    class Words:
        bos_token_id = 1

        def __init__(self, *words: str) -> None:
            self.ids = {"[SUM]": 9, **{word: 20 + i for i, word in enumerate(words)}}

        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            return [self.ids[text]] if text in self.ids else [5] * len(text)

    assert PromptFormat.of(Words("no", "yes", " no", " yes"), 3).labels == (22, 23)
    assert PromptFormat.of(Words("no", "yes", " yes"), 3).labels == (20, 21)
    assert PromptFormat.of(Words("yes", " No", " Yes"), 3, instruction="Hi").prefix == (1, 5, 5)
    with pytest.raises(ValueError, match="has no label words: of the pairs"):
        PromptFormat.of(Words("yes"), 3)
    tokenizer = small_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[SUM]"})
    found = PromptFormat.of(tokenizer, 3)
    assert tokenizer.convert_ids_to_tokens(list(found.labels)) == ["Ġno", "Ġyes"]


@pytest.mark.parametrize("dti_first", [True, False])
def test_dti_and_lora_in_either_order(dti_first: bool, base: Path) -> None:
    """The same function of the same parameters; only updates and the [SUM] row get gradients."""
    model = AutoModelForCausalLM.from_pretrained(base)
    names = list(model.state_dict())
    torch.manual_seed(1)
    if dti_first:
        adapted = add_lora(apply_dti(model, DTIConfig()), LoraSettings(rank=2, dropout=0.0), sum_token=7)
    else:
        adapted = apply_dti(add_lora(model, LoraSettings(rank=2, dropout=0.0), sum_token=7), DTIConfig())
    plain = apply_dti(AutoModelForCausalLM.from_pretrained(base), DTIConfig())
    assert list(plain.state_dict()) == names
    logits = sum_logits(adapted, LAYOUT, CONTEXT, DTIConfig())
    torch.testing.assert_close(logits, sum_logits(plain, LAYOUT, CONTEXT, DTIConfig()))
    logits.square().sum().backward()
    trained = {name for name, p in adapted.named_parameters() if p.grad is not None}
    assert len([name for name in trained if "lora_" in name]) == 2 * 7 * 3
    (row,) = [p for name, p in adapted.named_parameters() if "trainable_tokens_delta" in name]
    assert row.shape == (1, 32)
    assert row.grad is not None
    assert row.grad.abs().sum() > 0
    assert len(trained) == 2 * 7 * 3 + 1
    with torch.no_grad():
        row += 1.0
        expected = torch.nn.functional.embedding(torch.tensor([7]), plain.get_input_embeddings().weight) + 1
        assert torch.equal(adapted.get_input_embeddings()(torch.tensor([7])), expected)
        head = adapted.get_output_embeddings()(torch.eye(32))
        torch.testing.assert_close(head[:, 7], expected[0])  # tied
    assert all(name.endswith("weight") or "trainable_tokens" in name for name in trained)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activation_checkpointing_with_lora_gives_the_same_gradients(dtype: torch.dtype, base: Path) -> None:
    grads = []
    for checkpointing in (False, True):
        model = apply_dti(
            AutoModelForCausalLM.from_pretrained(base, dtype=dtype), DTIConfig(alpha_max=0.9), dropout=0.1
        )
        torch.manual_seed(1)
        adapted = add_lora(model, LoraSettings(rank=2, dropout=0.2), sum_token=7).train()
        if checkpointing:
            adapted.gradient_checkpointing_enable()  # the name that every supported version has
        torch.manual_seed(2)
        sum_logits(adapted, LAYOUT, CONTEXT, DTIConfig()).float().square().sum().backward()
        grads.append({name: p.grad for name, p in adapted.named_parameters() if p.requires_grad})
    for name, plain in grads[0].items():
        assert plain is not None, name
        assert torch.equal(plain, grads[1][name]), name


def test_a_lora_run_reloads_merges_and_loads_into_plain_transformers(config: TrainConfig, base: Path) -> None:
    result = train(config)
    folder = config.out / "model"
    assert {path.suffix for path in folder.iterdir()} <= {".safetensors", ".json", ".md", ".jinja"}
    assert (folder / "adapter_model.safetensors").stat().st_size < 200_000, "the embedding is in the adapter"
    facts = result["training"]
    assert facts["parameters"] == 3 * 4 * (32 + 32 + 2 * (32 + 16) + 2 * 32 + 3 * (32 + 48)) + 32
    assert evaluate_run(config.out, None, "test", progress=False)["test"] == result["test"]

    # The adapter alone, into an untouched model.
    run = Run.load(config.out, device="cpu")
    untouched = AutoModelForCausalLM.from_pretrained(base)
    untouched.resize_token_embeddings(len(AutoTokenizer.from_pretrained(folder)), mean_resizing=False)
    adapter = PeftModel.from_pretrained(untouched, folder).eval()
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    plain_run = Run(config, apply_dti(adapter, config.dti), run.tokenizer, run.data, run.builder)
    scores = score_split(run, "test")
    assert abs(scores - score_split(plain_run, "test")).max() < 1e-6

    # Merged, with nothing of the run but dti.json.
    export_run(config.out, config.out.with_name("merged"), library_only=True)
    exported = AutoModelForCausalLM.from_pretrained(config.out.with_name("merged")).eval()
    assert not [name for name in exported.state_dict() if "lora" in name or "token_adapter" in name]
    told = json.loads((config.out.with_name("merged") / "dti.json").read_text())
    assert told["prompt"]["sum_token"] == run.builder.format.sum_token
    dti = DTIConfig(**{**told["dti"], "reset_layers": tuple(told["dti"]["reset_layers"])})
    merged = score_targets(
        apply_dti(exported, dti), dti, run.builder, eval_targets(run.data, "test", run.config)
    )
    assert abs(scores - merged).max() < 1e-5
    with pytest.raises(FileExistsError, match="is not empty"):
        export_run(config.out, config.out.with_name("merged"))


def test_lora_training_moves_only_the_adapter_and_falls_from_the_zero_shot_level(config: TrainConfig) -> None:
    optim = dataclasses.replace(config.optim, max_steps=12, validate_every=4)
    result = train(dataclasses.replace(config, optim=optim, max_eval_targets=12))
    assert result["training"]["optimizer_steps"] == 12
    assert result["test"]["targets"] == 12 == len(pl.read_parquet(config.out / "predictions-test.parquet"))
    assert result["baselines"]["test"]["item_mean"]["targets"] == 12
    (state,) = (config.out / "checkpoints").glob("checkpoint-12/trainer_state.json")
    log = json.loads(state.read_text())["log_history"]
    assert [entry["step"] for entry in log if "eval_auc" in entry] == [0, 4, 8, 12]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0]
    row = load_file(config.out / "model" / "adapter_model.safetensors")
    (name,) = [name for name in row if "token" in name]
    assert row[name].shape == (1, 32)
    for adapter in config.out.rglob("adapter_model.safetensors"):
        assert set(load_file(adapter)) == set(row), "a checkpoint holds more than the adapter"


@pytest.mark.parametrize(("finetune", "dtype"), [("full", "float32"), ("lora", "bfloat16")])
def test_full_fine_tuning_and_bfloat16(config: TrainConfig, finetune: str, dtype: str) -> None:
    lora = LoraSettings() if finetune == "full" else config.model.lora
    model = dataclasses.replace(config.model, finetune=finetune, lora=lora, dtype=dtype)
    # Few steps and targets: matmuls of small bfloat16 matrices are slow on CPUs.
    optim = dataclasses.replace(config.optim, max_steps=1)
    result = train(dataclasses.replace(config, model=model, optim=optim, max_eval_targets=12))
    assert (result["training"]["frozen_parameters"] == 0) == (finetune == "full")
    assert evaluate_run(config.out, None, "test", progress=False)["test"] == result["test"]
    assert Run.load(config.out, device="cpu").model.get_input_embeddings().weight.dtype == getattr(
        torch, dtype
    )


def test_trained_slopes_are_read_back(config: TrainConfig) -> None:
    """A trained run used to be scored with the slopes that it began with."""
    full = dataclasses.replace(
        config,
        dti=DTIConfig(train_slopes=True),
        model=dataclasses.replace(config.model, finetune="full", lora=LoraSettings()),
    )
    result = train(full)
    assert evaluate_run(full.out, None, "test", progress=False)["test"] == result["test"]


def test_other_architectures_get_the_list_of_what_works(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=10)).save_pretrained(tmp_path)
    with pytest.raises(PretrainedModelError, match=r"type 'gpt2'.*llama \(Llama 2 and 3, SmolLM2.*qwen3"):
        load_plain(str(tmp_path))


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("/nowhere/model", "there is no folder or GGUF file /nowhere/model"),
        ("/nowhere/model.gguf", "there is no file /nowhere/model.gguf"),
        (".", "is not a model folder: it has no config.json"),
    ],
)
def test_a_reference_that_leads_nowhere(reference: str, message: str, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PretrainedModelError, match=message):
        load_tokenizer(reference)
    with pytest.raises(PretrainedModelError, match=message):
        load_plain(reference)


@pytest.mark.parametrize(
    ("more", "library", "message"),
    [
        ({"quantize": 4}, "bitsandbytes", "needs bitsandbytes: pip"),
        ({"liger": True}, "liger_kernel", "liger"),
    ],
)
def test_optional_libraries_that_are_missing_are_named(
    base: Path, monkeypatch, more, library, message
) -> None:
    monkeypatch.setattr(
        "dti_model.model.pretrained.find_spec", lambda name: None if name == library else sys.modules
    )
    settings = ModelConfig(pretrained=str(base), **more)
    with pytest.raises(PretrainedModelError, match=message):
        load_causal_lm(settings, load_tokenizer(str(base)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pretrained": "a", "width": 64}, "model.width is a size of a model from scratch"),
        ({"lora": LoraSettings(rank=2)}, "model.lora is a setting of a pretrained model"),
        ({"finetune": "full"}, "model.finetune is a setting of a pretrained model"),
        ({"pretrained": "a", "finetune": "full", "quantize": 4}, "need model.finetune lora"),
        ({"pretrained": "a", "quantize": 3}, "0, 4 or 8 bits"),
        ({"pretrained": "a", "dtype": "float16"}, "float32 or bfloat16"),
    ],
)
def test_impossible_model_settings(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig(**settings)


def test_impossible_lora_settings(config: TrainConfig) -> None:
    with pytest.raises(ValueError, match="lora.projections must be some of q_proj"):
        LoraSettings(projections=("lm_head",))
    with pytest.raises(ValueError, match="lora.rank must be >= 1"):
        LoraSettings(rank=0)
    with pytest.raises(ValueError, match="train_slopes needs model.finetune full"):
        dataclasses.replace(config, dti=DTIConfig(train_slopes=True))
    config.out.mkdir()
    config.save(config.out)
    assert TrainConfig.load(config.out) == config
    assert config.model.dropout_rate == 0


@pytest.fixture(scope="module")
def smollm2() -> str:
    folder = os.environ.get("DTI_SMOLLM2_DIR")
    if not folder:
        pytest.skip(
            "no real weights: set DTI_SMOLLM2_DIR to a folder made by `dti fetch-model smollm2-135m --out DIR`"
        )
    return folder


@torch.no_grad()
def test_smollm2_goes_on_as_the_untouched_model(smollm2: str) -> None:
    """Greedy, without targets, under a window over everything; the answer is Paris."""
    tokenizer = load_tokenizer(smollm2)
    untouched = AutoModelForCausalLM.from_pretrained(smollm2).eval()
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    expected = untouched.generate(**prompt, max_new_tokens=10, do_sample=False)[0]
    model = apply_dti(load_causal_lm(ModelConfig(pretrained=smollm2), tokenizer).eval(), DTIConfig())
    ids = prompt["input_ids"][0]
    for _ in range(10):
        layout = StreamLayout.build([[len(ids)]], [[0]], [0], window=20)
        logits = model(
            ids[None],
            position_ids=position_ids(layout, DTIConfig())[None],
            stream=Stream(layout, context_outputs=True),
            use_cache=False,
        ).logits[0, -1]
        ids = torch.cat([ids, logits.argmax()[None]])
    assert ids.tolist() == expected.tolist()
    assert "Paris" in tokenizer.decode(ids)
