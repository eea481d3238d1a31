"""Settings, model and checkpoints of a run belong together, and what is not a run's own stays where it is."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from dti_model.config import ConfigFileError, ModelConfig, OptimConfig, TrainConfig
from dti_model.files import DamagedFileError, checksums, write_checksums, write_sealed
from dti_model.model.export import export_run
from dti_model.model.fingerprints import OtherOriginError, settings_fingerprint
from dti_model.model.run import Run
from dti_model.model.run_folder import RunExistsError
from dti_model.training import train
from dti_model.training.start import find_checkpoint
from tests.training.small_runs import small_run


@pytest.fixture(scope="module")
def trained(small_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    config = small_run(small_folder, tmp_path_factory.mktemp("runs") / "run")
    train(config)
    return config


@pytest.fixture
def config(trained: TrainConfig, tmp_path: Path) -> TrainConfig:
    """Of a copy of a finished run."""
    shutil.copytree(trained.out, tmp_path / "run")
    return dataclasses.replace(trained, out=tmp_path / "run")


def unfinished(config: TrainConfig) -> None:
    (config.out / "metrics.json").unlink()


def of_another(config: TrainConfig) -> TrainConfig:
    """The settings of a run with another window, sealed in this run's folder."""
    other = dataclasses.replace(config, window=2)
    other.save(config.out)
    return other


def test_another_runs_settings_beside_a_model(config: TrainConfig, tmp_path: Path) -> None:
    """A sealed config.yaml that was copied from another run gave another AUC without a word."""
    of_another(config)
    for call in (lambda: Run.load(config.out), lambda: export_run(config.out, tmp_path / "export", True)):
        with pytest.raises(
            OtherOriginError, match=r"config\.yaml does not hold the settings that .*model was"
        ):
            call()
    config.save(config.out)
    Run.load(config.out)


def test_a_config_that_lost_its_seal(config: TrainConfig) -> None:
    """A way through YAML took the seal off, and the file was taken as one of version 0.1.0."""
    file = config.out / "config.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text())))
    with pytest.raises(ConfigFileError, match="was written anew: its last line is not its seal"):
        Run.load(config.out)
    for name in ("provenance.json", "checksums.json"):
        (config.out / "model" / name).unlink()
    Run.load(config.out)


def test_settings_that_decide_nothing(config: TrainConfig) -> None:
    """Places and bars are no part of it; 1 and 1.0 are one number; everything else is."""
    before = settings_fingerprint(config)
    moved = dataclasses.replace(config, data=Path("a"), out=Path("b"), progress=True)
    assert settings_fingerprint(moved) == before
    told = dataclasses.replace(config, logging_steps=1, report_to=("wandb",), compare_steps=3)
    saved = dataclasses.replace(config, optim=dataclasses.replace(config.optim, save_steps=7))
    assert settings_fingerprint(told) == settings_fingerprint(saved) == before
    rate = dataclasses.replace(config, optim=dataclasses.replace(config.optim, clip=1))
    assert settings_fingerprint(rate) == before
    for change in ({"seed": 1}, {"k": 4}, {"optim": OptimConfig(token_budget=600, precision="bf16")}):
        assert settings_fingerprint(dataclasses.replace(config, **change)) != before
    pretrained = [
        dataclasses.replace(config, model=ModelConfig(pretrained=name)) for name in ("hub:a/b", "hub:c/d")
    ]
    assert len({settings_fingerprint(each) for each in (config, *pretrained)}) == 2


def test_a_start_anew_over_an_older_model(config: TrainConfig) -> None:
    """Killed before its first checkpoint, it left its settings beside the model of another run."""
    unfinished(config)
    shutil.rmtree(config.out / "checkpoints")
    before = (config.out / "config.yaml").read_bytes()
    with pytest.raises(RunExistsError, match="model was trained with other settings"):
        train(dataclasses.replace(config, window=2))
    assert (config.out / "config.yaml").read_bytes() == before
    assert find_checkpoint(config) is None


def test_checkpoints_of_another_run(config: TrainConfig) -> None:
    """config.yaml of one run beside the checkpoints of another: they were gone on with."""
    unfinished(config)
    assert find_checkpoint(config) is not None
    with pytest.raises(RunExistsError, match="is of a run with other settings than config.yaml beside it"):
        find_checkpoint(of_another(config))


def test_other_settings_are_named(config: TrainConfig) -> None:
    unfinished(config)
    with pytest.raises(RunExistsError, match=r"with other settings \(window was 3 and is now 2; see config"):
        find_checkpoint(dataclasses.replace(config, window=2, seed=3))
    other = dataclasses.replace(config, optim=dataclasses.replace(config.optim, precision="bf16"))
    with pytest.raises(RunExistsError, match=r"\(optim\.precision was '\w+' and is now 'bf16'; see"):
        find_checkpoint(other)


def test_checksums_that_were_deleted(config: TrainConfig, tmp_path: Path) -> None:
    """With them went every check, and a damaged weight was read."""
    (config.out / "model" / "checksums.json").unlink()
    for call in (lambda: Run.load(config.out), lambda: export_run(config.out, tmp_path / "export", True)):
        with pytest.raises(DamagedFileError, match=r"checksums\.json is missing"):
            call()


def precious(folder: Path) -> Path:
    folder.mkdir()
    (folder / "thesis.txt").write_text("x")
    return folder


def link_model(run: Path, elsewhere: Path) -> None:
    shutil.rmtree(run / "model")
    (run / "model").symlink_to(precious(elsewhere))


def link_report(run: Path, elsewhere: Path) -> None:
    (run / "report.png").unlink()
    (run / "report.png").symlink_to(precious(elsewhere) / "thesis.txt")


def foreign_file(run: Path, elsewhere: Path) -> None:
    precious(run / "model" / "mine")


def hidden_file(run: Path, elsewhere: Path) -> None:
    (run / "model" / ".notes").write_text("x")


def foreign_file_in_an_old_model(run: Path, elsewhere: Path) -> None:
    for name in ("checksums.json", "provenance.json"):
        (run / "model" / name).unlink()
    (run / "model" / "thesis.txt").write_text("x")


def foreign_model(run: Path, elsewhere: Path) -> None:
    shutil.rmtree(run / "model")
    (run / "model").write_text("x")


@pytest.mark.parametrize(
    "change",
    [link_model, link_report, foreign_file, hidden_file, foreign_file_in_an_old_model, foreign_model],
)
def test_what_would_go_with_the_model_is_refused_before_training(
    config: TrainConfig, change: Any, tmp_path: Path
) -> None:
    """model/ was swapped away with everything in it, also where a link led."""
    unfinished(config)
    change(config.out, tmp_path / "precious")
    before = checksums(tmp_path)
    with pytest.raises(RunExistsError, match=r"(move it elsewhere|remove the link)"):
        train(config)
    assert checksums(tmp_path) == before


def test_what_appears_in_the_model_while_it_is_trained(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run.load(config.out)
    original = write_checksums

    def meanwhile(folder: Path) -> None:
        original(folder)
        (config.out / "model" / "thesis.txt").write_text("x")

    monkeypatch.setattr("dti_model.model.run.write_checksums", meanwhile)
    with pytest.raises(RunExistsError, match=r"thesis\.txt is no file of a run's model"):
        run.save_model(config.out / "model")
    assert (config.out / "model" / "thesis.txt").read_text() == "x"


def test_an_older_models_files_may_go(config: TrainConfig) -> None:
    """Of this version, of 0.1.0, and a card that was edited."""
    unfinished(config)
    (config.out / "model" / "README.md").write_text("my notes on the card")
    assert find_checkpoint(config) is not None
    for name in ("checksums.json", "provenance.json"):
        (config.out / "model" / name).unlink()
    assert find_checkpoint(config) is not None


@pytest.mark.parametrize("target", ["nowhere", "link"])
def test_a_link_to_nothing_in_the_place_of_the_folder(
    trained: TrainConfig, target: str, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(tmp_path / target)
    with pytest.raises(RunExistsError, match="link is a symbolic link to .*, where no folder is"):
        train(dataclasses.replace(trained, out=tmp_path / "link"))


def test_provenance_without_settings_is_read(config: TrainConfig) -> None:
    """Fingerprints came before the one of settings."""
    file = config.out / "model" / "provenance.json"
    kept = json.loads(file.read_text())
    write_sealed(file, {name: kept[name] for name in ("data", "tokenizer", "base_model")})
    (config.out / "model" / "checksums.json").unlink()
    write_checksums(config.out / "model")
    Run.load(config.out)
