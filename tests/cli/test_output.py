"""Ctrl-C and a standard output that breaks: one line, and a run that ends as it would have."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tqdm.auto import tqdm

from dti_model import __main__ as command
from dti_model import training as train_module
from dti_model.cli import evaluate as evaluate_cli
from dti_model.cli import main
from dti_model.config import ModelConfig, OptimConfig, TrainConfig
from dti_model.output import Output, unbreakable_output
from dti_model.training import train
from tests.conftest import ROOT


class Broken(io.StringIO):
    """A pipe that nobody reads, after some writes; or a full disk, which buffers show when they are flushed."""

    def __init__(self, number: int, at_flush: bool = False) -> None:
        super().__init__()
        self.number, self.at_flush = number, at_flush

    def write(self, text: str) -> int:
        if not self.at_flush:
            raise OSError(self.number, "broken")
        return len(text)

    def flush(self) -> None:
        raise OSError(self.number, "broken")


def streams() -> list[Any]:
    return [Broken(errno.EPIPE), Broken(errno.ENOSPC, at_flush=True), None]


def test_a_run_goes_on_without_its_lines(
    small_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`dti train ... | true` ended at its first line and left a config.yaml."""
    config = TrainConfig(
        data=small_folder,
        out=tmp_path / "run",
        k=3,
        window=3,
        report_to=(),
        logging_steps=1,
        model=ModelConfig(layers=1, width=16, heads=2, kv_heads=1, mlp_width=24),
        optim=OptimConfig(epochs=1, token_budget=600),
    )
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Broken(errno.EPIPE))
        patch.setattr(sys, "stderr", Broken(errno.EPIPE))  # progress bars
        result = train(config)
    assert json.loads((config.out / "metrics.json").read_text()) == result
    assert (config.out / "model" / "model.safetensors").is_file()


def test_streams_that_break_stay_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream in streams():
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stream)
            with unbreakable_output() as output:
                print("a", flush=True)
                tqdm.write("b")
                with unbreakable_output() as inner:
                    assert inner is output
                assert (output.error is None) == (stream is None)
            assert sys.stdout is stream
    text = io.StringIO()
    print("a", file=Output(text))
    assert text.getvalue() == "a\n"


def test_what_an_encoding_lacks_is_printed_as_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """UnicodeEncodeError is a ValueError: a finished command ended with status 2, and SIGTERM with that in the place of 75."""
    bytes_of = io.BytesIO()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", io.TextIOWrapper(bytes_of, encoding="ascii"))
        with unbreakable_output() as output:
            print("0.75 ± 0.01", "r\udcfcn", flush=True)
            print("next", flush=True)
            assert output.error is None
    assert bytes_of.getvalue() == b"0.75 \\xb1 0.01 r\\udcfcn\nnext\n"
    closed = io.StringIO()
    closed.close()
    print("a", file=Output(closed), flush=True)


@pytest.mark.parametrize("named", ["PYTHONIOENCODING", "LC_ALL"])
def test_commands_where_the_output_knows_ascii_only(small_folder: Path, tmp_path: Path, named: str) -> None:
    """Status 2 after all the work."""
    ascii_only = {
        "PYTHONIOENCODING": {"PYTHONIOENCODING": "ascii"},
        "LC_ALL": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    }[named]
    # YAML refuses names of files that such a locale cannot read.
    letter = "ö" if named == "PYTHONIOENCODING" else "o"
    run, settings = tmp_path / f"r{letter}", tmp_path / "settings.yaml"
    settings.write_text(
        f"data: {small_folder}\nk: 3\nwindow: 3\nprogress: false\nreport_to: []\noptim: {{epochs: 1, token_budget: 600}}\n"
        "model: {layers: 1, width: 16, heads: 2, kv_heads: 1, mlp_width: 24}\n",
    )
    (tmp_path / "in.jsonl").write_text('{"user": "1", "candidates": ["1"]}\n')
    commands = [
        ["train", f"--config={settings}", f"--out={run}"],
        ["search", f"--config={settings}", f"--out={tmp_path / 's'}", "--grid={k: [3]}", "--seeds=[0, 1]"],
        ["score", f"--run={run}", f"--input={tmp_path / 'in.jsonl'}", f"--output={run}.jsonl"],
        ["export", f"--run={run}", f"--out={run}-export", "--library-only"],
    ]
    code = f"import sys\nfrom dti_model.cli import main\nsys.exit(max(map(main, {commands!a})))"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | ascii_only
    ended = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert " \\xb1 0." in ended.stdout
    assert ascii(f"{run}-export")[1:-1] in ended.stdout


def test_metrics_that_are_neither_printed_nor_written(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    """Exit status 0 would say that somebody has them."""
    monkeypatch.chdir(tmp_path)
    metrics = {
        "test": {"auc": 0.5},
        "baselines": {"test": {}},
        "precision": "fp32",
        "provenance": {"precision": None},
    }
    monkeypatch.setattr("dti_model.evaluation.evaluate_run", lambda *_: metrics)
    for name in ("metrics_table", "sentence_about_baselines"):
        monkeypatch.setattr(f"dti_model.evaluation.{name}", lambda *_: "metrics")
    assert main(["evaluate", "--run=x"]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Broken(errno.ENOSPC, at_flush=True))
        assert main(["evaluate", "--run=x"]) == 2
        assert main(["evaluate", "--run=x", "--json=y"]) == 0
    assert capsys.readouterr().err == "dti evaluate: error: the metrics cannot be printed (broken)\n"


@pytest.mark.parametrize("checkpoints", [[], ["checkpoint-5", "checkpoint-12", "checkpoint-best"]])
def test_ctrl_c_is_one_line(
    checkpoints: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """A hundred lines of traceback."""

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train_module, "train", interrupted)
    for name in checkpoints:
        (tmp_path / "run" / "checkpoints" / name).mkdir(parents=True)
    command = ["train", "--data=x", f"--out={tmp_path / 'run'}"]
    assert main(command) == 130
    way = "go on from checkpoint 12" if checkpoints else "start again"
    expected = f"\ndti train: interrupted: give the same command again to {way}\n"
    assert capsys.readouterr().err == expected
    assert main(["--debug", *command]) == 130
    error = capsys.readouterr().err
    assert error.startswith("Traceback")
    assert error.endswith(expected)
    monkeypatch.setattr(evaluate_cli, "check_destination", interrupted)
    assert main(["evaluate", "--run=x", "--json=y"]) == 130
    assert capsys.readouterr().err.endswith(
        "evaluate: interrupted: give the same command again to start again\n"
    )
    monkeypatch.setattr("dti_model.training.search", interrupted)
    assert main(["search", "--grid={k: [1]}", "--data=x", "--out=y"]) == 130
    assert capsys.readouterr().err.endswith("give the same command again to go on where it was\n")


def test_ctrl_c_while_modules_are_imported(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """A traceback, in the first moments of a command."""

    class Interrupted:
        @staticmethod
        def find_spec(*_: Any) -> None:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["dti", "--version"])
        with pytest.raises(SystemExit) as ended:
            command.run()
        assert ended.value.code == 0
        assert capsys.readouterr().out
        for module in [name for name in sys.modules if name.startswith("dti_model.cli")]:
            patch.delitem(sys.modules, module)
        patch.setattr(sys, "meta_path", [Interrupted])
        with pytest.raises(SystemExit) as ended:
            command.run()
        assert ended.value.code == 130
    assert capsys.readouterr().err == "\ndti: interrupted: give the same command again to start again\n"
