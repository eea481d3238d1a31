"""Settings in YAML files: one spelling or the other, and errors that name the file."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from dti_model.config import StrictYAMLError, check_yaml, read_settings
from tests.conftest import ROOT


def test_dashes_are_underscores(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text("max-item-tokens: 4\noptim: {save-steps: 3, learning_rate: 1e-3}\nmodel.kv-heads: 1\n")
    assert read_settings(path, "") == {
        "max_item_tokens": 4,
        "optim": {"save_steps": 3, "learning_rate": "1e-3"},
        "model.kv_heads": 1,
    }
    for text in ("a-b: 1\na_b: 2", "o: {a-b: 1}\no.a_b: 2", "o: {a-b: 1, a_b: 1}"):
        with pytest.raises(StrictYAMLError, match="line [12]: 'o?.?a_b' stands there twice"):
            check_yaml(text)


@pytest.mark.parametrize(
    ("text", "group", "message"),
    [
        ("k: text", "", "k must be >= 0 and <= 1,000,000,000 (an integer), got 'text'"),
        ("optim.clip: abc", "", "optim.clip must be > 0"),
        ("model: {lora: {rank: 1.5}}", "", "model.lora.rank must be >= 1"),
        ("save-steps: [1]", "optim.", "optim.save_steps must be >= 0"),
        (
            "report_to: tensorboard",
            "",
            "report_to must be some of tensorboard, wandb, in a list, got 'tensorboard'",
        ),
    ],
)
def test_a_value_of_another_type_names_the_file(tmp_path: Path, text: str, group: str, message: str) -> None:
    """The parser's own errors name the setting alone, of several files that may hold it."""
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"^{re.escape(f'{path}: {message}')}"):
        read_settings(path, group)
    assert read_settings(path)  # of a grid: no values of settings


def test_values_that_the_parser_reads_again(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text("k: '3'\noptim: {learning_rate: 1e-3}\nmodel: {dropout: null}\nprogress: 'no'\n")
    read_settings(path, "")


def test_settings_load_no_library() -> None:
    """`dti --help` took seven seconds: the settings imported four families of models."""
    code = "import sys, dti_model.config; print(sys.modules.keys() & {'torch', 'transformers', 'numpy', 'huggingface_hub'})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "set()\n"
