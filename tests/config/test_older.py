"""`optim.bf16`, which `optim.precision` was before: files of older runs and of users say it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import yaml

from dti_model.config import ConfigFileError, OptimConfig, TrainConfig
from dti_model.config.older import newer_spelling
from dti_model.config.strict_yaml import read_settings
from dti_model.model.fingerprints import settings_fingerprint


@pytest.mark.parametrize(
    ("older", "newer"),
    [
        ({"optim": {"bf16": True, "clip": 2}}, {"optim": {"precision": "bf16", "clip": 2}}),
        ({"optim.bf16": False}, {"optim.precision": "fp32"}),
        ({"optim": {"bf16": "true"}}, {"optim": {"precision": "bf16"}}),
        ({"optim.bf16": [True, False]}, {"optim.bf16": [True, False]}),
        ({"optim": {"precision": "auto"}}, {"optim": {"precision": "auto"}}),
        ({"bf16": True, "optim": None}, {"bf16": True, "optim": None}),
    ],
)
def test_names_and_values(older: dict[str, Any], newer: dict[str, Any]) -> None:
    assert newer_spelling(older) == newer


def test_a_group_of_its_own() -> None:
    assert newer_spelling({"bf16": False}, "optim.") == {"precision": "fp32"}
    assert newer_spelling({"bf16": False}, "model.") == {"bf16": False}


@pytest.mark.parametrize("value", [None, 1, "maybe", {}, 0.5])
def test_values_that_it_never_had(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^optim\.bf16 must be true or false, got "):
        newer_spelling({"optim": {"bf16": value}})


@pytest.mark.parametrize(
    "text", ["optim: {bf16: true, precision: bf16}", "optim.bf16: false\noptim: {precision: auto}\n"]
)
def test_both_spellings(text: str, tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"settings\.yaml: optim\.bf16 is an older spelling of optim\.prec"):
        read_settings(tmp_path / "settings.yaml", "")


def older_file(folder: Path, bf16: Any, sealed: bool) -> TrainConfig:
    """A config.yaml as earlier versions wrote it; gives its settings."""
    config = TrainConfig(Path("a"), folder, optim=OptimConfig(precision="bf16" if bf16 else "fp32"))
    config.save(folder)
    file = folder / "config.yaml"
    lines = file.read_text().splitlines(keepends=True)
    settings = yaml.safe_load("".join(lines))
    assert settings["optim"].pop("precision")
    settings["optim"]["bf16"] = bf16
    text = yaml.safe_dump(settings, sort_keys=False)
    if sealed:
        text = lines[0] + text
        text += f"# sha256 {hashlib.sha256(text.encode()).hexdigest()}\n"
    file.write_text(text)
    return config.located()


@pytest.mark.parametrize("sealed", [True, False], ids=["sealed", "0.1.0"])
@pytest.mark.parametrize("bf16", [True, False])
def test_settings_of_an_older_run(bf16: bool, sealed: bool, tmp_path: Path) -> None:
    settings = older_file(tmp_path, bf16, sealed)
    assert TrainConfig.load(tmp_path) == settings


def test_a_damaged_older_file_is_named(tmp_path: Path) -> None:
    older_file(tmp_path, "neither", sealed=True)
    with pytest.raises(ConfigFileError, match=r"config\.yaml: optim\.bf16 must be true or false"):
        TrainConfig.load(tmp_path)


@pytest.mark.parametrize(
    ("precision", "fingerprint"),
    [
        ("fp32", "64db4c3c052353ac0199c905892d05c121fbc3931eb5134580889142ca712989"),
        ("bf16", "0b0576700317f98e7ae67912ab8f333afaee940363b1cbbc737ef775e8c2b156"),
    ],
)
def test_fingerprints_of_older_settings_hold(precision: Any, fingerprint: str) -> None:
    """As written when `bf16` was a boolean; whatever the default precision is."""
    optim = OptimConfig(token_budget=600, precision=precision)
    assert settings_fingerprint(TrainConfig(Path("a"), Path("b"), window=3, optim=optim)) == fingerprint
    auto = TrainConfig(Path("a"), Path("b"), window=3, optim=OptimConfig(token_budget=600, precision="auto"))
    assert settings_fingerprint(auto) != fingerprint
