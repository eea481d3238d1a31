"""The ready-made settings are settings of `dti train` as it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from dti_model.cli import _parser
from dti_model.config import TrainConfig
from tests.conftest import ROOT

FILES = sorted((ROOT / "configs").glob("*.yaml"))


def parsed(path: Path) -> TrainConfig:
    parser = _parser()
    options = parser.parse_args(["train", "--config", str(path), "--data=data", "--out=run"])
    settings = dict(vars(parser.instantiate(options)["train"]))
    settings.pop("config")
    return TrainConfig(**settings)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_settings_parse_to_what_the_file_says(path: Path, tmp_path: Path) -> None:
    config = parsed(path)
    for name, value in yaml.safe_load(path.read_text()).items():
        pairs = value.items() if isinstance(value, dict) else [(None, value)]
        for inner, wanted in pairs:
            section = getattr(config, name)
            assert (section if inner is None else getattr(section, inner)) == wanted, (name, inner)
    config.save(tmp_path)
    assert TrainConfig.load(tmp_path) == config


def test_the_devices_are_those_of_the_names() -> None:
    by_name = {path.stem: parsed(path) for path in FILES}
    ddp, one = by_name["8-gpus-ddp"], by_name["one-gpu"]
    assert ddp == one, "DDP needs no setting"
    llama = by_name["8-gpus-fsdp2-llama-3.1-8b"]
    assert llama.optim.fsdp
    assert not one.optim.fsdp
    # The paper's.
    assert (llama.k, llama.window, llama.optim.epochs, llama.optim.patience) == (50, 20, 10, 2)
