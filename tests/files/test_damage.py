"""One flipped bit, anywhere: one line that names the file and the way out, or a result that is the same bit for bit."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from dti_model.cli import main
from dti_model.config import ConfigFileError, OptimConfig, TrainConfig
from dti_model.evaluation import score_split, split_metrics
from dti_model.files import DamagedFileError, write_checksums, write_sealed
from dti_model.model.export import export_run
from dti_model.model.run import Run
from dti_model.model.run_folder import RunExistsError
from dti_model.training import train
from dti_model.training.checkpoint import CheckpointError, check_checkpoint, last_checkpoint
from dti_model.training.start import find_checkpoint
from tests.training.small_runs import small_run, train_until

FLIPS_PER_FILE = 25


@pytest.fixture(scope="module")
def config(small_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    optim = OptimConfig(epochs=3, token_budget=600, save_steps=1, patience=0, learning_rate=0.01)
    return small_run(small_folder, tmp_path_factory.mktemp("damage") / "whole", optim=optim)


@pytest.fixture(scope="module")
def whole(config: TrainConfig) -> dict[str, Any]:
    return train(config)


@pytest.fixture(scope="module")
def broken(config: TrainConfig, whole: dict[str, Any]) -> TrainConfig:
    """A run that was killed after a best checkpoint and a last one."""
    broken = dataclasses.replace(config, out=config.out.with_name("broken"))
    train_until(whole["training"]["optimizer_steps"] - 1, broken)
    assert len(list((broken.out / "checkpoints").glob("checkpoint-*"))) == 2
    return broken


def flips(file: Path, number: int = FLIPS_PER_FILE, seed: int = 0) -> Iterator[None]:
    """The file with one bit flipped, at places that follow the seed; at the end as it was."""
    content, rng = file.read_bytes(), random.Random(f"{file.name} {seed}")
    try:
        for _ in range(number):
            place, bit = rng.randrange(len(content)), rng.randrange(8)
            changed = bytearray(content)
            changed[place] ^= 1 << bit
            file.write_bytes(changed)
            yield
    finally:
        file.write_bytes(content)


def assert_names(error: BaseException, file: Path, way_out: str = "") -> None:
    message = str(error)
    assert way_out in message
    assert str(file) in message
    assert "\n" not in message
    assert len(message) < 1000


def test_flipped_bits_in_checkpoints(broken: TrainConfig, whole: dict[str, Any]) -> None:
    """Weights, moments, random numbers, counters: another result, tracebacks, and messages without a file."""
    good = last_checkpoint(broken.out / "checkpoints")
    assert good is not None
    found = unnoticed = 0
    for folder in (broken.out / "checkpoints").glob("checkpoint-*"):
        assert {path.name for path in folder.iterdir()} == {
            "weights.safetensors", "optimizer.safetensors", "run.json", "trainer_state.json", "checksums.json"
        }  # fmt: skip
        for file in sorted(folder.iterdir()):
            for _ in flips(file):
                try:
                    assert find_checkpoint(broken) == good
                except CheckpointError as error:
                    assert_names(
                        error, file, f"elete {folder if folder == good else folder.parent} and give the same"
                    )
                    found += 1
                else:
                    unnoticed += 1
                    assert file.name == "checksums.json", "only space between words may differ"
    assert found >= 200
    assert unnoticed <= 2
    copy = dataclasses.replace(broken, out=broken.out.with_name("copy"))
    shutil.copytree(broken.out, copy.out)
    assert train(copy) == whole


def test_a_damaged_checkpoint_is_deleted_and_the_run_goes_on_from_the_one_before(
    broken: TrainConfig, whole: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """The message's advice, followed; the command prints it in one line."""
    copy = dataclasses.replace(broken, out=broken.out.with_name("repaired"))
    shutil.copytree(broken.out, copy.out)
    last = last_checkpoint(copy.out / "checkpoints")
    assert last is not None
    (last / "run.json").write_bytes(b"\x00" + (last / "run.json").read_bytes()[1:])
    command = ["train", f"--data={copy.data}", f"--out={copy.out}", "--k=3", "--window=3", "--progress=false"]
    command += [
        "--report-to=[]",
        "--model.layers=1",
        "--model.width=16",
        "--model.heads=2",
        "--optim.save-steps=1",
    ]
    command += ["--model.kv-heads=1", "--model.mlp-width=24", "--optim.epochs=3", "--optim.token-budget=600"]
    command += ["--optim.patience=0", "--optim.learning-rate=0.01"]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert str(last / "run.json") in error
    shutil.rmtree(last)
    assert train(copy) == whole


def test_without_its_best_weights_a_run_begins_anew(broken: TrainConfig, whole: dict[str, Any]) -> None:
    copy = dataclasses.replace(broken, out=broken.out.with_name("without-best"))
    shutil.copytree(broken.out, copy.out)
    (best,) = set((copy.out / "checkpoints").iterdir()) - {last_checkpoint(copy.out / "checkpoints")}
    shutil.rmtree(best)
    with pytest.raises(
        CheckpointError, match=rf"{best.name} is missing\. .* delete \S*checkpoints and give the same"
    ):
        train(copy)
    shutil.rmtree(copy.out / "checkpoints")
    assert train(copy) == whole


@pytest.mark.parametrize("name", ["weights.safetensors", "run.json", "trainer_state.json", "checksums.json"])
def test_a_missing_file_of_a_checkpoint(broken: TrainConfig, name: str) -> None:
    last = last_checkpoint(broken.out / "checkpoints")
    assert last is not None
    kept = (last / name).read_bytes()
    (last / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} is (missing|damaged)"):
        find_checkpoint(broken)
    (last / name).write_bytes(kept)
    find_checkpoint(broken)


@pytest.mark.parametrize(
    "files", [None, 3, [], {"a": 1}, {"a": {"bytes": None, "sha256": ""}}, {"a": {"bytes": 1}}]
)
def test_checksums_of_other_types(broken: TrainConfig, files: Any) -> None:
    """Their seal fits, so that nothing but their types is wrong: a traceback."""
    last = last_checkpoint(broken.out / "checkpoints")
    assert last is not None
    file = last / "checksums.json"
    kept = file.read_bytes()
    write_sealed(file, {"files": files})
    with pytest.raises(CheckpointError, match="it holds no checksums") as raised:
        find_checkpoint(broken)
    assert_names(raised.value, file, f"Delete {last} and give the same")
    file.write_bytes(kept)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("random", [{}]),
        ("random", {}),
        ("random", [{"python": [3, [{}], None], "numpy": [], "torch": [], "cuda": None}]),
        ("unlogged_loss", 3),
        ("groups", None),
        ("groups", [{}, {}, {}]),
        ("scheduler", [1]),
    ],
)
def test_a_checkpoint_whose_document_has_other_types(
    broken: TrainConfig, tmp_path: Path, name: str, value: Any
) -> None:
    """Tracebacks, of what is no more than a file to delete."""
    copy = dataclasses.replace(broken, out=tmp_path / "run")
    shutil.copytree(broken.out, copy.out)
    last = last_checkpoint(copy.out / "checkpoints")
    assert last is not None
    file = last / "run.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), name: value}))
    (last / "checksums.json").unlink()
    write_checksums(last)
    with pytest.raises(CheckpointError) as raised:
        train(copy)
    assert_names(raised.value, file, f"Delete {last} and give the same")


def test_a_renamed_checkpoint(broken: TrainConfig) -> None:
    """The state after step 2 is not that after step 99."""
    last = last_checkpoint(broken.out / "checkpoints")
    assert last is not None
    renamed = last.with_name("checkpoint-99")
    shutil.copytree(last, renamed)
    with pytest.raises(CheckpointError, match="checkpoint-99 holds the state after step"):
        check_checkpoint(renamed)
    shutil.rmtree(renamed)


def test_flipped_bits_in_the_model(config: TrainConfig, whole: dict[str, Any]) -> None:
    """Another AUC, without a word."""
    folder = config.out / "model"
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "provenance.json",
        "checksums.json",
    }
    found = 0
    for file in sorted(folder.iterdir()):
        for _ in flips(file, 10):
            try:
                run = Run.load(config.out)
            except DamagedFileError as error:
                assert_names(error, file)
                found += 1
            else:
                assert split_metrics(run, "test", score_split(run, "test")) == whole["test"]
    assert found >= 10 * (len(names) - 1) - 3, "the card, README.md, is for people"


def test_flipped_bits_in_config_yaml(config: TrainConfig) -> None:
    """Another window, or a traceback of PyYAML's."""
    file = config.out / "config.yaml"
    found = 0
    for _ in flips(file, 400):
        try:
            assert TrainConfig.load(config.out) == config
        except ConfigFileError as error:
            assert_names(error, file, "Put the file back as it was, or train into another --out")
            found += 1
    assert found >= 350


def test_config_yaml_that_was_edited_or_cut(config: TrainConfig, broken: TrainConfig) -> None:
    file = broken.out / "config.yaml"
    content = file.read_text()
    for changed in (
        content.replace("window: 3", "window: 4"),
        content.replace("sha256 ", "sha256 0"),
        "".join(content.splitlines(keepends=True)[:-1]),
        content[: len(content) // 2],
    ):
        assert changed != content
        file.write_text(changed)
        with pytest.raises(ConfigFileError, match=r"config\.yaml (was changed|is cut short)"):
            find_checkpoint(broken)
    file.write_text("")
    with pytest.raises(RunExistsError, match="another program's"):
        find_checkpoint(broken)
    file.write_text(content)
    find_checkpoint(broken)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"windw": 3}, "windw is no setting"),
        ({"window": None}, "window must be >= 0"),
        ({"seed": True}, "seed must be >= 0"),
        ({"optim": 3}, "optim must be a mapping"),
        ({"optim": {"epochs": 0}}, "optim.epochs must be >= 1"),
        ({"dti": {"reset_layers": 1}}, "dti.reset_layers must be a list"),
        ({"report_to": "tensorboard"}, "report_to must be some of"),
        ({"data": None}, "data must be a folder's path"),
    ],
)
def test_settings_of_version_0_1_0_are_checked(
    config: TrainConfig, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    """A config.yaml without a seal; as JSON, which is YAML."""
    plain = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    (tmp_path / "config.yaml").write_text(json.dumps(plain))
    assert TrainConfig.load(tmp_path) == config
    (tmp_path / "config.yaml").write_text(json.dumps({**plain, **change}))
    with pytest.raises(ConfigFileError, match=message) as raised:
        TrainConfig.load(tmp_path)
    assert_names(raised.value, tmp_path / "config.yaml")


def unsealed(run: Path) -> None:
    """Its config.yaml as version 0.1.0 wrote it."""
    path = run / "config.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()), sort_keys=False))


def test_a_model_folder_without_checksums_is_read(
    config: TrainConfig, whole: dict[str, Any], tmp_path: Path
) -> None:
    """Of version 0.1.0: what is cut short is named all the same."""
    shutil.copytree(config.out, tmp_path / "run")
    for name in ("checksums.json", "provenance.json"):
        (tmp_path / "run" / "model" / name).unlink()
    with pytest.raises(DamagedFileError, match=r"checksums\.json is missing"):
        Run.load(tmp_path / "run")  # its config.yaml has a seal: the run is newer
    unsealed(tmp_path / "run")
    run = Run.load(tmp_path / "run")
    assert split_metrics(run, "test", score_split(run, "test")) == whole["test"]
    settings = tmp_path / "run" / "model" / "config.json"
    content = settings.read_text()
    for name, value in (("hidden_act", {}), ("pad_token_id", 1e308), ("vocab_size", None)):
        settings.write_text(json.dumps({**json.loads(content), name: value}))
        with pytest.raises(DamagedFileError, match="model cannot be read") as raised:
            Run.load(tmp_path / "run")
        assert_names(raised.value, tmp_path / "run" / "model", "Put it back, or delete")
        with pytest.raises(DamagedFileError, match="model cannot be read"):
            export_run(tmp_path / "run", tmp_path / "export", library_only=True)
    settings.write_text(content)
    weights = tmp_path / "run" / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(DamagedFileError, match="model cannot be read"):
        Run.load(tmp_path / "run")
