"""`--optim.precision`, and `--optim.bf16`, which it was called before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dti_model.cli.options import settings_of
from dti_model.config import OptimConfig
from dti_model.precision import DEFAULT
from tests.cli.commands import parser_of, refused

TRAIN = ("--data=x", "--out=y")


def precision_of(*words: str) -> str:
    parser = parser_of(("train",))
    return settings_of(parser.instantiate(parser.parse_args([*TRAIN, *words]))).optim.precision


@pytest.mark.parametrize(
    ("words", "precision"),
    [
        ([], DEFAULT),
        (["--optim.precision", "auto"], "auto"),
        (["--optim.bf16", "true"], "bf16"),
        (["--optim.bf16=false"], "fp32"),
        (["--optim", "{bf16: true, clip: 2}"], "bf16"),
    ],
)
def test_words(words: list[str], precision: str) -> None:
    assert precision_of(*words) == precision


@pytest.mark.parametrize("text", ["optim:\n  bf16: true\n", "optim.bf16: true\n"])
def test_files(text: str, tmp_path: Path) -> None:
    """Options after a file win, in either spelling."""
    (tmp_path / "settings.yaml").write_text(text)
    file = ["--config", str(tmp_path / "settings.yaml")]
    assert precision_of(*file) == "bf16"
    assert precision_of(*file, "--optim.precision=fp32") == precision_of(*file, "--optim.bf16=no") == "fp32"
    (tmp_path / "group.yaml").write_text("bf16: true\n")
    assert precision_of("--optim", str(tmp_path / "group.yaml")) == "bf16"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--optim.bf16=true", "--optim.precision=bf16"], "--optim.bf16 is an older spelling of --optim.precision, and both are given: keep --optim.precision"),
        (["--optim.bf16=true", "--optim.bf16=false"], "--optim.bf16 is given twice: keep one of them"),
        (["--optim.bf16=maybe"], "--optim.bf16 must be true or false, got 'maybe'"),
        (["--optim.bf16"], "--optim.bf16 must be true or false, got ''"),
        (["--optim={bf16: 5}"], "optim.bf16 must be true or false, got 5"),
        (["--optim.precision=fp16"], "--optim.precision must be one of auto, bf16, fp32, got fp16: did you mean bf16?"),
    ],
)  # fmt: skip
def test_what_is_refused(words: list[str], message: str, capsys: Any) -> None:
    assert message in refused(["train", *TRAIN, *words], capsys)


def test_the_default_is_said_once() -> None:
    assert OptimConfig().precision == DEFAULT
