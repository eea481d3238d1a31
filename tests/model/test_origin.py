"""Origins of a run: exchanged data, tokenizers and base models are noticed, and moved ones are found."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dti_model.cli import main
from dti_model.config import LoraSettings, ModelConfig, OptimConfig, TrainConfig
from dti_model.config.references import PretrainedModelError, locate, located
from dti_model.data import prepare
from dti_model.evaluation import evaluate_run, score_split, split_metrics
from dti_model.model import RunExistsError
from dti_model.model.fingerprints import OtherOriginError, base_model_fingerprint, tokenizer_fingerprint
from dti_model.model.pretrained import load_tokenizer
from dti_model.model.run import Run
from dti_model.training import search, train
from tests.conftest import ROOT
from tests.data.movielens_files import some_ratings, write_1m
from tests.model.pretrained_files import FAMILIES, pretrained_folder
from tests.training.small_runs import small_run, train_until


@pytest.fixture(scope="module")
def other_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same users and items in the same counts, split otherwise."""
    raw, out = tmp_path_factory.mktemp("raw"), tmp_path_factory.mktemp("other") / "data"
    prepare("ml-1m", out, write_1m(raw, some_ratings(num_users=60)), subset=True, vocab_size=400, threshold=4)
    return out


@pytest.fixture
def config(small_folder: Path, tmp_path: Path) -> TrainConfig:
    """Over data of its own."""
    shutil.copytree(small_folder, tmp_path / "data")
    optim = OptimConfig(epochs=2, token_budget=300, save_steps=2, patience=0)
    return small_run(tmp_path / "data", tmp_path / "runs" / "run", optim=optim)


@pytest.fixture
def lora(config: TrainConfig, tmp_path: Path) -> TrainConfig:
    base = pretrained_folder(tmp_path / "models" / "base")
    model = ModelConfig(pretrained=str(base), lora=LoraSettings(rank=2, alpha=4))
    return dataclasses.replace(config, model=model, optim=dataclasses.replace(config.optim, epochs=1))


def replace_folder(folder: Path, by: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(by, folder)


def test_other_data_between_kill_and_resume(config: TrainConfig, other_data: Path, tmp_path: Path) -> None:
    """Nobody noticed: the run went on with targets that it had trained on in its test set."""
    train_until(3, config)
    shutil.copytree(config.data, tmp_path / "kept")
    replace_folder(config.data, other_data)
    with pytest.raises(
        OtherOriginError, match="the prepared data changed after .*checkpoint-2 had been written"
    ):
        train(config)
    replace_folder(config.data, tmp_path / "kept")
    train(config)


def test_other_data_between_training_and_evaluation(
    config: TrainConfig, other_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = train(config)
    assert evaluate_run(config.out, None, "test", progress=False)["test"] == result["test"]
    command = ["evaluate", f"--run={config.out}", "--progress=false"]
    assert main([*command, f"--data={other_data}"]) == 2
    error = capsys.readouterr().err
    assert "is not the prepared data that" in error
    assert "--other-data" in error
    assert main([*command, f"--data={other_data}", "--other-data"]) == 0
    replace_folder(config.data, other_data)
    with pytest.raises(OtherOriginError, match="targets to score may be among those trained on"):
        Run.load(config.out)
    run = Run.load(config.out, other_data=True)
    assert run.provenance.data != result["provenance"]["data"]


def test_a_search_does_not_mix_data(config: TrainConfig, other_data: Path) -> None:
    search(config, {"k": [3]}, [0])
    replace_folder(config.data, other_data)
    with pytest.raises(
        OtherOriginError, match="the prepared data of this search is not what .* was trained with"
    ):
        search(config, {"k": [3]}, [0])


def test_fingerprints_stand_in_the_run_folder(config: TrainConfig) -> None:
    provenance = train(config)["provenance"]
    run = Run.load(config.out)
    assert provenance == dataclasses.asdict(run.provenance)
    assert provenance == json.loads((config.out / "metrics.json").read_text())["provenance"]
    for folder in (config.out / "checkpoints").iterdir():
        assert json.loads((folder / "run.json").read_text())["provenance"] == provenance
    kept = json.loads((config.out / "model" / "provenance.json").read_text())
    assert {name: kept[name] for name in provenance} == provenance
    assert provenance["tokenizer"] == tokenizer_fingerprint(run.tokenizer)
    assert all(len(provenance[name]) == 64 for name in ("data", "tokenizer"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tokenizer_has_one_fingerprint(family: str, tmp_path: Path) -> None:
    """Saved and read back, and not that of another one."""
    tokenizer = load_tokenizer(str(pretrained_folder(tmp_path / "base", family)))
    tokenizer.save_pretrained(tmp_path / "saved")
    found = tokenizer_fingerprint(tokenizer)
    assert tokenizer_fingerprint(PreTrainedTokenizerFast.from_pretrained(tmp_path / "saved")) == found
    assert tokenizer_fingerprint(AutoTokenizer.from_pretrained(tmp_path / "base")) != found, "without [SUM]"
    tokenizer.add_tokens(["new"])
    assert tokenizer_fingerprint(tokenizer) != found


def change_weights(base: Path) -> None:
    """Another model of the same shape."""
    file = base / "model.safetensors"
    save_file({name: 1.01 * x for name, x in load_file(file).items()}, file, {"format": "pt"})


def change_tokenizer(base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(base)


def change_configuration(base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (change_weights, "the pretrained model"),
        (change_configuration, "the pretrained model"),
        (change_tokenizer, "the tokenizer"),
    ],
)
def test_another_base_model_between_kill_and_resume(lora: TrainConfig, change: Any, what: str) -> None:
    train_until(3, lora)
    base = Path(str(lora.model.pretrained))
    shutil.copytree(base, base.with_name("kept"))
    change(base)
    with pytest.raises(OtherOriginError, match=f"{what} changed after"):
        train(lora)
    # The same model somewhere else is the same model.
    shutil.rmtree(base)
    moved = dataclasses.replace(lora.model, pretrained=str(base.with_name("kept")))
    train(dataclasses.replace(lora, model=moved))


def test_the_base_model_of_a_lora_run(lora: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    """Missing, elsewhere, and another one."""
    result = train(lora)
    base = Path(str(lora.model.pretrained))
    elsewhere = base.parents[1] / "elsewhere"
    base.rename(elsewhere)
    command = ["evaluate", f"--run={lora.out}", "--progress=false"]
    assert main(command) == 2
    assert f"is not at {base}: say with --base where it is" in capsys.readouterr().err
    assert main([*command, f"--base={elsewhere}", f"--json={base.parents[1] / 'out.json'}"]) == 0
    assert json.loads((base.parents[1] / "out.json").read_text())["test"] == result["test"]
    change_weights(elsewhere)
    with pytest.raises(OtherOriginError, match="is not the pretrained model that .* was trained from"):
        evaluate_run(lora.out, None, "test", progress=False, base=str(elsewhere))


def test_base_is_for_lora_runs(config: TrainConfig) -> None:
    train(config)
    with pytest.raises(ValueError, match="holds a whole model and needs no base model"):
        Run.load(config.out, base="models/x")


def relative(config: TrainConfig, folder: Path) -> TrainConfig:
    """As given on a command line in `folder`."""
    model = config.model
    if model.pretrained is not None:
        model = dataclasses.replace(model, pretrained=os.path.relpath(model.pretrained, folder))
    return dataclasses.replace(
        config,
        data=Path(os.path.relpath(config.data, folder)),
        out=Path(os.path.relpath(config.out, folder)),
        model=model,
    )


def test_a_run_works_from_every_directory_and_where_it_was_moved(
    lora: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run folder worked only in the directory that it was made in."""
    monkeypatch.chdir(tmp_path)
    result = train(relative(lora, tmp_path))
    (tmp_path / "deep" / "er").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "deep" / "er")
    assert evaluate_run(lora.out, None, "test", progress=False)["test"] == result["test"]
    assert evaluate_run(Path("../../runs/run"), None, "test", progress=False)["test"] == result["test"]
    # Moved together with its data and its base model.
    (tmp_path / "new").mkdir()
    for name in ("runs", "data", "models"):
        (tmp_path / name).rename(tmp_path / "new" / name)
    assert (
        evaluate_run(tmp_path / "new" / "runs" / "run", None, "test", progress=False)["test"]
        == result["test"]
    )
    # Alone.
    (tmp_path / "new" / "runs" / "run").rename(tmp_path / "alone")
    with pytest.raises(FileNotFoundError, match="say with --data where it is"):
        Run.load(tmp_path / "alone")
    run = Run.load(
        tmp_path / "alone", tmp_path / "new" / "data", base=str(tmp_path / "new" / "models" / "base")
    )
    assert split_metrics(run, "test", score_split(run, "test")) == result["test"]


def test_a_moved_run_goes_on(config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same relative command, where everything has been moved together."""
    (tmp_path / "old").mkdir()
    config = dataclasses.replace(config, out=tmp_path / "old" / "runs" / "run")
    config.data.rename(tmp_path / "old" / "data")
    config = relative(dataclasses.replace(config, data=tmp_path / "old" / "data"), tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    whole = train(dataclasses.replace(config, out=Path("runs/whole")))
    train_until(3, config)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old").rename(tmp_path / "new")
    monkeypatch.chdir(tmp_path / "new")
    assert train(config) == whole


def test_a_folder_of_version_0_1_0(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Paths relative to the working directory, no seal, no checksums, no fingerprints: read, and gone on with."""
    monkeypatch.chdir(tmp_path)
    result = train(config)
    age(config, tmp_path)
    assert TrainConfig.load(config.out).located() == config
    assert evaluate_run(config.out, None, "test", progress=False)["test"] == result["test"]
    other = dataclasses.replace(config, out=tmp_path / "runs" / "other")
    train_until(3, other)
    age(other, tmp_path)
    with pytest.raises(RunExistsError, match="with other settings"):
        train(dataclasses.replace(other, data=shutil.copytree(config.data, tmp_path / "data2")))
    assert train(relative(other, tmp_path)) == result


def age(config: TrainConfig, folder: Path) -> None:
    """Turn a run folder into what version 0.1.0 left."""
    plain = yaml.safe_load((config.out / "config.yaml").read_text())
    plain["data"], plain["out"] = (os.path.relpath(plain[name], folder) for name in ("data", "out"))
    (config.out / "config.yaml").write_text(yaml.safe_dump(plain, sort_keys=False))
    for name in ("checksums.json", "provenance.json"):
        for file in config.out.rglob(name):
            file.unlink()
    for file in (config.out / "checkpoints").glob("*/run.json"):
        run = json.loads(file.read_text())
        del run["version"], run["provenance"]
        file.write_text(json.dumps(run))


@pytest.mark.parametrize(
    "reference",
    ["models/nowhere", "nowhere/model", "a/b/c", "./x", "../x", "~/nowhere", "/nowhere/x", "x.gguf", "models/x/", "word"],
)  # fmt: skip
def test_what_is_no_folder_is_not_looked_for_on_the_hub(
    reference: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A missing `models/x` went to the hub as the model of somebody called `models`, for a minute."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("asked the network"))
    start = time.monotonic()
    for call in (load_tokenizer, locate):
        with pytest.raises(PretrainedModelError, match="there is no (folder or GGUF file|file) "):
            call(reference)
    assert time.monotonic() - start < 5
    assert located(reference) == reference


def test_a_reference_is_kept_so_that_it_means_the_same_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = pretrained_folder(tmp_path / "models" / "base")
    monkeypatch.chdir(tmp_path)
    assert located("models/base") == located("./models/base/") == str(base)
    assert located("hub:owner/name") == "hub:owner/name"
    assert locate("hub:owner/name").may_download
    assert ModelConfig(pretrained="hub:owner/name").uses_lora
    for wrong in ("hub:", "hub:a/b/c", "hub:../x", "hub:/x"):
        with pytest.raises(PretrainedModelError, match="an id of the hub is hub:owner/name"):
            locate(wrong)


CACHED = """
import sys
from pathlib import Path
import huggingface_hub.constants as constants
from dti_model.model.pretrained import PretrainedModelError, load_plain, load_tokenizer
from dti_model.config.references import locate, located
from tests.model.pretrained_files import pretrained_folder
repository = Path(constants.HF_HUB_CACHE) / "models--owner--name"
pretrained_folder(repository / "snapshots" / "abc")
(repository / "refs").mkdir()
(repository / "refs" / "main").write_text("abc")
for reference in ("owner/name", "hub:owner/name"):
    assert located(reference) == "hub:owner/name"
    load_plain(reference)
    load_tokenizer(reference)
    assert locate(reference).folder == repository / "snapshots" / "abc"
try:
    load_plain("hub:owner/other")
except PretrainedModelError as error:
    print(error)
"""


def test_a_model_in_the_hubs_cache_is_read_without_a_network(tmp_path: Path) -> None:
    environment = {**os.environ, "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment |= {"HF_ENDPOINT": "http://127.0.0.1:9", "NO_PROXY": "127.0.0.1"}
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", CACHED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (
        "hub:owner/other is not in the hub's cache on this machine, and the hub does not give it"
        in done.stdout
    )
    assert len(done.stdout.splitlines()) == 1
    assert time.monotonic() - start < 40


def test_a_base_models_fingerprint_is_that_of_its_content(tmp_path: Path) -> None:
    base = pretrained_folder(tmp_path / "base")
    found = base_model_fingerprint(locate(str(base)))
    shutil.copytree(base, tmp_path / "copy")
    assert base_model_fingerprint(locate(str(tmp_path / "copy"))) == found
    change_weights(tmp_path / "copy")
    assert base_model_fingerprint(locate(str(tmp_path / "copy"))) != found
    (tmp_path / "one.gguf").write_bytes(b"x" * 10_000)
    (tmp_path / "two.gguf").write_bytes(b"x" * 9_999 + b"y")
    prints = {base_model_fingerprint(locate(str(tmp_path / f"{name}.gguf"))) for name in ("one", "two")}
    assert len(prints) == 2
