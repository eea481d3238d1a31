"""The ready-made settings are settings of `dti train` as it is."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from dti_model.cli.options import settings_of
from dti_model.cli.train import make_parser
from dti_model.config import TrainConfig
from tests.conftest import ROOT

FILES = sorted((ROOT / "configs").glob("*.yaml"))


def parsed(path: Path) -> TrainConfig:
    parser = make_parser()
    options = parser.parse_args(["--config", str(path), "--data=data", "--out=run"])
    return settings_of(parser.instantiate(options))


def assert_holds(settings: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name, value in wanted.items():
        if isinstance(value, dict):
            assert_holds(settings[name], value)
        else:
            assert settings[name] == value, name


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_settings_parse_to_what_the_file_says(path: Path, tmp_path: Path) -> None:
    config = parsed(path)
    assert_holds(asdict(config), yaml.safe_load(path.read_text()))
    config.save(tmp_path)
    assert TrainConfig.load(tmp_path) == config.located()


def test_the_devices_are_those_of_the_names() -> None:
    by_name = {path.stem: parsed(path) for path in FILES}
    ddp, one = by_name["8-gpus-ddp"], by_name["one-gpu"]
    assert ddp == one, "DDP needs no setting"
    llama = by_name["8-gpus-fsdp2-llama-3.1-8b"]
    assert llama.optim.fsdp
    assert not one.optim.fsdp
    assert llama.model.pretrained == "hub:meta-llama/Llama-3.1-8B-Instruct"
    # The paper's.
    assert (llama.k, llama.window, llama.optim.epochs, llama.optim.patience) == (50, 20, 10, 2)
