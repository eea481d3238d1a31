"""Devices that are not there, base models whose configuration is none, and named pipes: one line that names them."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dti_model.cli import main
from dti_model.config.references import PretrainedModelError, locate
from dti_model.files import read_sealed
from dti_model.model.fingerprints import base_model_fingerprint
from dti_model.model.pretrained import load_plain
from dti_model.model.run import _check_memory
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


@pytest.mark.parametrize(
    "command",
    [
        ["prepare", "ml-1m", "--raw-dir=r\udcff", "--out=o"],
        ["evaluate", "--run", "\udcff"],
        ["score", "--run=r", "--input=\udcff.jsonl", "--output=o.jsonl"],
        ["export", "--run=r", "--out=\udcff"],
        ["train", "--data=d", "--out=o\udcff"],
        ["fetch-model", "smollm2-135m", "--out=\udcff"],
        ["\udcff"],
    ],
)
def test_a_name_of_other_bytes_than_utf_8(command: list[str], capsys: Any) -> None:
    """A page of usage, or an error of a codec."""
    error = refused(command, capsys)
    assert "\\udcff" in error
    assert "holds bytes that are no utf-8: give it, or a link to it, another name" in error


def test_a_model_that_no_machine_holds(small_folder: Path, tmp_path: Path, capsys: Any) -> None:
    """It was allocated piece by piece until the system ended the process; a million layers were built for hours."""
    command = ["train", f"--data={small_folder}", f"--out={tmp_path / 'run'}", "--progress=false"]
    assert main([*command, "--model.width=1048576", "--model.mlp-width=16777216", "--model.layers=9999"]) == 2
    error = capsys.readouterr().err
    assert "parameters, " in error
    assert "GiB of memory: choose a smaller --model.width, --model.mlp-width or --model.layers" in error
    assert len(error.splitlines()) == 1
    base = pretrained_folder(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 10**6}))
    with pytest.raises(
        PretrainedModelError, match="has 1,000,000 layers in its configuration.*at most 10,000"
    ):
        load_plain(str(base))


def test_the_weights_of_a_model_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = LlamaConfig(
        vocab_size=50,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    number = sum(weight.numel() for weight in LlamaForCausalLM(sizes).parameters())
    monkeypatch.setattr(os, "sysconf", lambda name: 4 * number if name == "SC_PAGE_SIZE" else 1)
    _check_memory(sizes)
    monkeypatch.setattr(os, "sysconf", lambda name: 4 * number - 1 if name == "SC_PAGE_SIZE" else 1)
    with pytest.raises(ValueError, match=f"has {number:,} parameters"):
        _check_memory(sizes)


@pytest.mark.parametrize("text", ["[]", "3", "{", "[" * 100_000])
def test_a_fingerprint_of_no_configuration(text: str, tmp_path: Path) -> None:
    base = pretrained_folder(tmp_path / "base")
    (base / "config.json").write_text(text)
    with pytest.raises(PretrainedModelError, match=r"config\.json"):
        base_model_fingerprint(locate(str(base)))


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """A call that waits for ever fails."""

    def fail(*_: Any) -> None:
        pytest.fail("waits for somebody to write to a pipe")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(60)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def refused(command: list[str], capsys: Any) -> str:
    """The one line of an error."""
    capsys.readouterr()
    assert main(command) == 2, command
    error: str = capsys.readouterr().err
    assert len(error.splitlines()) == 1, error
    return error


@pytest.mark.usefixtures("no_waiting")
def test_a_pipe_in_the_place_of_a_file_of_a_run(
    run_folder: Path, small_folder: Path, tmp_path: Path, capsys: Any
) -> None:
    """Commands waited for ever."""
    run = shutil.copytree(run_folder, tmp_path / "run")
    command = ["evaluate", f"--run={run}", "--progress=false", "--device=cpu"]
    settings = ["train", f"--config={run / 'config.yaml'}", f"--out={run}"]
    for file in sorted(path for path in run.rglob("*") if path.is_file() and path.name != "README.md"):
        content = file.read_bytes()
        file.unlink()
        os.mkfifo(file)
        assert str(file.parent) in refused(command, capsys)
        if file.parent == run:
            assert "config.yaml is no regular file" in refused(settings, capsys)
            train = ["train", f"--data={small_folder}", f"--out={run}"]
            assert "its config.yaml is another program's" in refused(train, capsys)
        file.unlink()
        file.write_bytes(content)
    assert main(command) == 0


@pytest.mark.usefixtures("no_waiting")
def test_a_pipe_in_the_place_of_a_file_of_prepared_data(
    run_folder: Path, small_folder: Path, tmp_path: Path, capsys: Any
) -> None:
    data = shutil.copytree(small_folder, tmp_path / "data")
    command = ["evaluate", f"--run={run_folder}", f"--data={data}", "--progress=false", "--device=cpu"]
    again = ["prepare", "ml-1m", f"--raw-dir={tmp_path}", f"--out={data}"]
    for file in sorted(
        data / name for name in (*read_sealed(data / "stats.json", "")["files"], "stats.json")
    ):
        content = file.read_bytes()
        file.unlink()
        os.mkfifo(file)
        assert str(file.parent) in refused(command, capsys)
        refused(again, capsys)
        file.unlink()
        file.write_bytes(content)


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize("name", ["search.json", "search-folder.json", "k=3/seed-0/config.yaml"])
def test_a_pipe_in_the_folder_of_a_search(small_folder: Path, tmp_path: Path, name: str, capsys: Any) -> None:
    (tmp_path / "out" / name).parent.mkdir(parents=True)
    os.mkfifo(tmp_path / "out" / name)
    command = [
        "search",
        f"--data={small_folder}",
        f"--out={tmp_path / 'out'}",
        "--grid={k: [3]}",
        "--seeds=[0]",
    ]
    own = name in ("search.json", "search-folder.json")
    assert ("is no regular file" if own else "is not the folder of a search") in refused(command, capsys)
