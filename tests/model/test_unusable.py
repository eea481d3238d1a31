"""Devices that are not there, and base models whose configuration is none: one line that names them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dti_model.cli import main
from dti_model.fingerprints import base_model_fingerprint
from dti_model.references import PretrainedModelError, locate
from tests.model.pretrained_files import pretrained_folder


@pytest.mark.skipif(torch.cuda.device_count() > 7, reason="cuda:7 is there")
@pytest.mark.parametrize("device", ["cuda:7", "gpu", "meta", ""])
def test_a_device_that_is_not_there(run_folder: Path, device: str, tmp_path: Path, capsys: Any) -> None:
    """A traceback of an assertion."""
    evaluate = ["evaluate", f"--run={run_folder}", f"--device={device}"]
    files = [f"--input={tmp_path / 'in.jsonl'}", f"--output={tmp_path / 'out.jsonl'}"]
    for command in (evaluate, ["score", f"--run={run_folder}", f"--device={device}", *files]):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert f"device {device!r} cannot be used" in error
        assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    "change",
    [
        [],
        "llama",
        {"num_attention_heads": 0},
        {"num_attention_heads": None},
        {"hidden_size": "x"},
        {"num_hidden_layers": -1.5},
        {"vocab_size": [1]},
        {"rope_parameters": 5},
    ],
)
def test_a_base_model_with_an_impossible_configuration(
    change: Any, small_folder: Path, tmp_path: Path, capsys: Any
) -> None:
    """A TypeError, a ZeroDivisionError, or an error of a class of its own, each with its traceback."""
    base = pretrained_folder(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config = {**config, **change} if isinstance(change, dict) else change
    (base / "config.json").write_text(json.dumps(config))
    command = ["train", f"--data={small_folder}", f"--out={tmp_path / 'run'}", f"--model.pretrained={base}"]
    assert main([*command, "--optim.epochs=1", "--progress=false"]) == 2
    error = capsys.readouterr().err
    assert str(base) in error
    assert len(error.splitlines()) == 1, error


@pytest.mark.parametrize("text", ["[]", "3", "{", "[" * 100_000])
def test_a_fingerprint_of_no_configuration(text: str, tmp_path: Path) -> None:
    base = pretrained_folder(tmp_path / "base")
    (base / "config.json").write_text(text)
    with pytest.raises(PretrainedModelError, match=r"config\.json"):
        base_model_fingerprint(locate(str(base)))
