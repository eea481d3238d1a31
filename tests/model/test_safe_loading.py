"""Files that others made are loaded without running any of it: pickles, code of a model's own, names that lead to a network, random damage."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers.integrations import hub_kernels

from dti_model.config import LoraSettings
from dti_model.config.references import Reference, locate
from dti_model.model import pretrained
from dti_model.model.fingerprints import base_model_fingerprint
from dti_model.model.lora import add_lora, save_adapter
from dti_model.model.pretrained import PretrainedModelError, load_plain, load_tokenizer
from dti_model.model.run import Run
from dti_model.model.safe_loading import adapter_from, config_from, model_from, tokenizer_from
from tests.model.pretrained_files import pretrained_folder

EXAMPLES = int(os.environ.get("DTI_FUZZ_EXAMPLES", "60"))
CODE = "open({!r}, 'w')\nclass Own: pass\n"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model in one file, the same in several, and an adapter of it."""
    folder = tmp_path_factory.mktemp("whole")
    base = pretrained_folder(folder / "base")
    model = load_plain(str(base))
    sharded = shutil.copytree(base, folder / "sharded", ignore=shutil.ignore_patterns("*.safetensors"))
    model.save_pretrained(sharded, max_shard_size="20KB")
    save_adapter(add_lora(model, LoraSettings(), 5), folder / "adapter", "owner/name")
    return {"base": base, "sharded": sharded, "adapter": folder / "adapter"}


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file that code of others would write; at the end nothing may have run, and no network may have been asked."""

    def connect(*arguments: Any) -> None:
        asked.append(arguments)
        raise OSError("no network here")

    asked: list[Any] = []
    monkeypatch.setattr(socket.socket, "connect", connect)
    yield tmp_path / "ran"
    assert not (tmp_path / "ran").exists(), "code of the folder was run"
    assert asked == []


class Program:
    """Writes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return open, (str(self.marker), "w")


def pickled(path: Path, marker: Path) -> None:
    """As `torch.save` makes it."""
    torch.save({"lm_head.weight": Program(marker)}, path)


def refused(folder: Path | str) -> str:
    """Why a model is not loaded, one line."""
    with pytest.raises(PretrainedModelError) as raised:
        load_plain(str(folder))
    assert len(str(raised.value).splitlines()) == 1
    return str(raised.value)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "adapter_model.bin"]
)
def test_a_pickle_is_refused(whole: dict[str, Path], tmp_path: Path, marker: Path, name: str) -> None:
    """Weights that are a program were loaded where a folder had no others."""
    folder = shutil.copytree(whole["base"], tmp_path / "base")
    pickled(folder / name, marker)
    load_plain(str(folder))  # beside safetensors it is not looked at
    (folder / "model.safetensors").unlink()
    message = refused(folder)
    assert message.startswith(f"{folder / name} is not loaded: it is a pickle")
    assert "M.from_pretrained('FOLDER', use_safetensors=False).save_pretrained('NEW')" in message


def test_a_pickle_under_the_name_of_safetensors(whole: dict[str, Path], tmp_path: Path, marker: Path) -> None:
    folder = shutil.copytree(whole["base"], tmp_path / "base")
    pickled(folder / "model.safetensors", marker)
    assert "header too large" in refused(folder)
    (folder / "model.safetensors").write_bytes(pickle.dumps(Program(marker)))
    refused(folder)


def test_what_a_training_leaves_is_no_weights(whole: dict[str, Path], tmp_path: Path, marker: Path) -> None:
    """training_args.bin counted as weights: without it a base model was another one, and its runs were refused."""
    folder = shutil.copytree(whole["base"], tmp_path / "base")
    before = base_model_fingerprint(locate(str(folder)))
    for name in ("training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "rng_state_0.pth"):
        pickled(folder / name, marker)
    assert base_model_fingerprint(locate(str(folder))) == before
    load_plain(str(folder))
    (folder / "model.safetensors").unlink()
    assert "holds no weights: neither model.safetensors" in refused(folder)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("known", [True, False])
def test_code_of_a_folder_is_refused(
    whole: dict[str, Path], tmp_path: Path, marker: Path, file: str, known: bool
) -> None:
    """A model with code of its own was loaded as another one, or asked about on the terminal; none of it may run."""
    folder = shutil.copytree(whole["base"], tmp_path / "base")
    for name in ("modeling_own", "tokenization_own", "custom_generate/generate"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / f"{name}.py").write_text(CODE.format(str(marker)))
    content = json.loads((folder / file).read_text())
    content["auto_map"] = {
        "AutoConfig": "modeling_own.Own",
        "AutoModelForCausalLM": "evil/model--modeling_own.Own",
        "AutoTokenizer": ["tokenization_own.Own", "tokenization_own.Own"],
    }
    if not known:
        content |= {"model_type": "own", "tokenizer_class": "Own"}
    (folder / file).write_text(json.dumps(content))
    assert f"{folder / file} names code of the model's own (auto_map), which is never run" in refused(folder)
    for load in (load_tokenizer, model_from, tokenizer_from, config_from):
        with pytest.raises(PretrainedModelError, match="auto_map"):
            load(str(folder))


@pytest.mark.parametrize("prefix", ["", "_"])
@pytest.mark.parametrize("name", ["attn_implementation", "experts_implementation"])
def test_a_kernel_of_the_hub_is_not_asked_for(
    whole: dict[str, Path],
    tmp_path: Path,
    marker: Path,
    prefix: str,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A configuration may name one, which is a program; by its inner name it was asked for."""
    folder = shutil.copytree(whole["base"], tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, f"{prefix}{name}": "evil/kernel"}))
    asked: list[Any] = []
    monkeypatch.setattr(hub_kernels, "is_kernels_available", lambda *_: True)
    monkeypatch.setattr(hub_kernels, "get_kernel", lambda *words, **_: asked.append(words))
    assert load_plain(str(folder)).config._attn_implementation == "sdpa"
    assert asked == []


def test_an_adapter_in_the_folder_of_a_model(whole: dict[str, Path], tmp_path: Path, marker: Path) -> None:
    """It was put on top of the model, and its base asked for on the hub."""
    folder = shutil.copytree(whole["base"], tmp_path / "base")
    shutil.copy(whole["adapter"] / "adapter_config.json", folder)
    assert "the folder holds an adapter" in refused(folder)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            {"lm_head.weight": "../model.safetensors"},
            r'names "../model.safetensors", which is no safetensors',
        ),
        ({"lm_head.weight": "/etc/passwd"}, "which is no safetensors file of this folder"),
        ({"lm_head.weight": "pytorch_model.bin"}, "which is no safetensors file of this folder"),
        ({"lm_head.weight": ["a"]}, "which is no safetensors file of this folder"),
        ({"lm_head.weight": "none.safetensors"}, "none.safetensors is missing"),
        (None, "has no weight_map"),
    ],
)
def test_an_index_that_leads_elsewhere(
    whole: dict[str, Path], tmp_path: Path, marker: Path, change: Any, reason: str
) -> None:
    folder = shutil.copytree(whole["sharded"], tmp_path / "base")
    pickled(folder / "pytorch_model.bin", marker)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] = change and {**index["weight_map"], **change}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert reason in refused(folder)


def test_other_names_of_weights(whole: dict[str, Path], tmp_path: Path, marker: Path) -> None:
    folder = shutil.copytree(whole["base"], tmp_path / "base")
    pickled(folder / "adapter_model.bin", marker)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": "adapter_model.bin"}))
    assert "names another file of weights (transformers_weights)" in refused(folder)


def test_missing_tensors_are_not_random_numbers(whole: dict[str, Path], tmp_path: Path) -> None:
    """A model without some of its weights was filled with random ones, and nothing was said; an adapter was left out."""
    folder = shutil.copytree(whole["base"], tmp_path / "base")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert "no weights of model.layers.1.mlp.up_proj.weight, and lacks 1 tensors" in refused(folder)
    adapter = shutil.copytree(whole["adapter"], tmp_path / "adapter")
    weights = load_file(adapter / "adapter_model.safetensors")
    weights.pop(next(name for name in weights if "lora_B" in name))
    save_file(weights, adapter / "adapter_model.safetensors")
    with pytest.raises(PretrainedModelError, match="cannot be loaded: Found missing adapter keys"):
        adapter_from(load_plain(str(whole["base"])), adapter)


def test_a_pickled_adapter(whole: dict[str, Path], tmp_path: Path, marker: Path) -> None:
    adapter = shutil.copytree(whole["adapter"], tmp_path / "adapter")
    (adapter / "adapter_model.safetensors").unlink()
    base = load_plain(str(whole["base"]))
    with pytest.raises(PretrainedModelError, match=r"adapter_model\.safetensors is missing"):
        adapter_from(base, adapter)
    pickled(adapter / "adapter_model.bin", marker)
    with pytest.raises(PretrainedModelError, match=r"adapter_model\.bin is not loaded: it is a pickle"):
        adapter_from(base, adapter)
    (adapter / "adapter_config.json").write_text('{"peft_type": "XLORA"}')
    with pytest.raises(PretrainedModelError, match="is no LoRA adapter that `dti train` wrote"):
        adapter_from(base, adapter)


def test_a_run_of_an_older_version_with_a_pickle(run_folder: Path, tmp_path: Path, marker: Path) -> None:
    """Without checksums nothing says what belongs into the folder."""
    run = shutil.copytree(run_folder, tmp_path / "run")
    for name in ("checksums.json", "provenance.json", "model.safetensors"):
        (run / "model" / name).unlink()
    lines = (run / "config.yaml").read_text().splitlines()
    (run / "config.yaml").write_text("\n".join(line for line in lines if not line.startswith("#")))
    pickled(run / "model" / "pytorch_model.bin", marker)
    with pytest.raises(PretrainedModelError, match=r"pytorch_model\.bin is not loaded: it is a pickle"):
        Run.load(run, device="cpu")


def test_names_like_those_of_the_hub_ask_no_network(
    tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch, whole: dict[str, Path]
) -> None:
    """A folder that is called like a model of somebody is that folder, also where something is missing in it."""
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(whole["base"], tmp_path / "gpt2" / "model")
    load_plain("gpt2/model")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "model.safetensors"):
        (folder / name).unlink()
        if name.startswith("token"):
            with pytest.raises(PretrainedModelError):
                load_tokenizer("gpt2/model")
    refused("gpt2/model")
    refused("gpt2")
    refused("evil/model")


def test_a_model_of_the_hub_without_safetensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be downloaded, or a conversion of it by somebody."""
    import huggingface_hub

    class Hub:
        def model_info(self, name: str, timeout: float) -> Any:
            files = ("config.json", "pytorch_model.bin")
            return type("Info", (), {"siblings": [type("File", (), {"rfilename": name}) for name in files]})

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(pretrained, "locate", lambda _: Reference("a/b", on_hub=True, may_download=True))
    monkeypatch.setattr(Reference, "is_cached", False)
    assert "hub:a/b has no safetensors on the hub" in refused("hub:a/b")


VALUES = [
    None,
    0,
    -1,
    1.5,
    "",
    "evil/model",
    [],
    {},
    True,
    2**63,
    "..",
    "/etc/passwd",
    [[1]],
    {"a": 1},
    "model.bin",
]
KEYS = ["auto_map", "architectures", "quantization_config", "attn_implementation", "dtype", "model_type"]


def damaged(rng: random.Random, path: Path, marker: Path) -> None:
    """One change of a file."""
    content = path.read_bytes()
    kind = rng.choice(
        ["flip", "cut", "insert", "length", "json", "header", "remove", "pickle", "pipe", "folder"]
    )
    if kind in ("remove", "pipe", "folder"):
        path.unlink()
        {"remove": lambda _: None, "pipe": os.mkfifo, "folder": os.mkdir}[kind](path)
    elif kind == "pickle":
        pickled(path.with_name(rng.choice([path.name, "pytorch_model.bin", "adapter_model.bin"])), marker)
    elif kind == "cut":
        path.write_bytes(content[: rng.randrange(len(content))])
    elif kind == "length":
        path.write_bytes(struct.pack("<Q", rng.choice([0, 1, 2**63, 2**40, len(content)])) + content[8:])
    elif kind == "insert":
        place = rng.randrange(len(content))
        path.write_bytes(content[:place] + rng.randbytes(9) + content[place:])
    elif kind == "json" and path.suffix == ".json":
        path.write_text(json.dumps(changed(rng, json.loads(content))))
    elif kind == "header" and path.suffix == ".safetensors":
        end = 8 + int.from_bytes(content[:8], "little")
        header = json.dumps(changed(rng, json.loads(content[8:end]))).encode()
        path.write_bytes(struct.pack("<Q", len(header)) + header + content[end:])
    else:
        flipped = bytearray(content)
        flipped[rng.randrange(min(len(content), 400))] = rng.randrange(256)
        path.write_bytes(flipped)


def changed(rng: random.Random, value: dict[str, Any]) -> dict[str, Any]:
    below = value
    while (
        deeper := [key for key in below if isinstance(below[key], dict) and below[key]]
    ) and rng.random() < 0.6:
        below = below[rng.choice(deeper)]
    if rng.random() < 0.3:
        del below[rng.choice([*below])]
    else:
        below[rng.choice([*below, *KEYS])] = rng.choice(VALUES)
    return value


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(seed=st.integers(0, 2**32), kind=st.sampled_from(["base", "base", "sharded", "adapter"]))
def test_random_damage(whole: dict[str, Path], tmp_path: Path, marker: Path, seed: int, kind: str) -> None:
    """A model, or one line; never a part of one, nor code."""
    rng, folder = random.Random(seed), tmp_path / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole[kind], folder)
    for name in rng.sample(sorted(os.listdir(folder)), rng.randint(1, 2)):
        damaged(rng, folder / name, marker)
    loads = [lambda: load_tokenizer(str(folder)), lambda: load_plain(str(folder))]
    if kind == "adapter":
        loads = [lambda: adapter_from(load_plain(str(whole["base"])), folder)]
    for load in loads:
        try:
            load()
        except PretrainedModelError as error:
            assert len(str(error).splitlines()) == 1, error  # noqa: PT017
