"""The `dti` command as a user runs it: help, the whole way on small files, and errors in one line."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dti_model.cli import main
from tests.cli.commands import EVERY_COMMAND, parser_of
from tests.conftest import ROOT
from tests.data.log_files import CUSTOM_COLUMNS, ITEM_COLUMNS, custom_rows, item_rows, write_csv
from tests.data.movielens_files import some_ratings, write_1m

SMALL = [
    "--k=3",
    "--window=3",
    "--progress=false",
    "--model.layers=2",
    "--model.width=16",
    "--model.heads=2",
    "--model.kv-heads=1",
    "--model.mlp-width=24",
    "--optim.epochs=1",
    "--optim.token-budget=300",
]


CUSTOM = ["prepare", "custom", "--out=data", "--interactions=nowhere.csv", "--items=nowhere.csv"]


def dti(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """One command in its own process, single-threaded like the rest of the suite."""
    return subprocess.run(
        [sys.executable, "-m", "dti_model.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("user")
    write_1m(folder / "raw", some_ratings(num_users=60))
    return folder


def test_prepare_train_evaluate(folder: Path) -> None:
    prepared = dti(
        "prepare", "ml-1m", "--raw-dir=raw", "--subset", "--out=data", "--vocab-size=400", cwd=folder
    )
    assert prepared.returncode == 0, prepared.stderr
    assert "60 users, 8 items, 480 interactions" in prepared.stdout
    (folder / "small.yaml").write_text("optim:\n  learning_rate: 0.001\n  epochs: 3\n")
    trained = dti("train", "--config=small.yaml", "--data=data", "--out=run", *SMALL, cwd=folder)
    assert trained.returncode == 0, trained.stderr
    assert re.search(r"epoch 1: loss \d\.\d{4}, validation AUC 0\.\d{4}", trained.stdout)
    config = (folder / "run" / "config.yaml").read_text()
    assert "learning_rate: 0.001" in config
    assert "epochs: 1" in config, "flags after the file win"
    evaluated = dti("evaluate", "--run=run", "--progress=false", "--json=out.json", cwd=folder)
    assert evaluated.returncode == 0, evaluated.stderr
    metrics = json.loads((folder / "run" / "metrics.json").read_text())
    assert json.loads((folder / "out.json").read_text())["test"] == metrics["test"]
    assert f"{metrics['test']['auc']:.4f}" in evaluated.stdout


def test_prepare_custom(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every source's report says what became of each row."""
    clicks = write_csv(tmp_path / "clicks.tsv", CUSTOM_COLUMNS, custom_rows())
    clicks.write_text(clicks.read_text() + "1\t2\tsoon\t1\t5\n")
    items = write_csv(tmp_path / "items.csv", ITEM_COLUMNS, item_rows())
    command = [
        "prepare",
        "custom",
        f"--interactions={clicks}",
        f"--items={items}",
        "--text={title}; {genres}",
    ]
    command += ["--rating=stars", "--threshold=4", "--max-rejected=0.02", f"--out={tmp_path / 'out'}"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "a click is stars > 4" in printed
    assert "of 97 rows 1 was rejected and 0 pruned" in printed
    assert "clicks.tsv:98: timestamp must be an integer, but is soon" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--data=nowhere", "--out=run"], "nowhere"),
        (["train", "--data=nowhere", "--out=run", "--kk=3"], "kk"),
        (["train", "--data=nowhere", "--out=run", "--k=three"], "three"),
        (["train", "--data=nowhere", "--out=run", "--dti.mode=best"], "mode must be one of dti, dti-minus"),
        (["train", "--out=run"], "data"),
        (
            ["train", "--data=nowhere", "--out=run", "--model.pretrained=x", "--model.width=8"],
            "model.width is a size",
        ),
        (["evaluate", "--run=nowhere"], "is not a run folder"),
        (["score", "--run=nowhere", "--input=in.jsonl", "--output=out.jsonl"], "is not a run folder"),
        (["export", "--run=nowhere", "--out=out"], "is not a run folder"),
        (["fetch-model", "gpt-5", "--out=out"], "model must be one of smollm2-135m"),
        (["prepare", "ml-5m", "--out=data"], "ml-5m"),
        (["prepare", "ml-1m", "--raw-dir=nowhere", "--out=data"], "nowhere"),
        (["prepare", "ml-1m", "--meta=x", "--out=data"], "meta"),
        (["prepare", "amazon", "--subset", "--out=data"], "subset"),
        (["prepare", "amazon-cds", "--raw-dir=nowhere", "--out=data"], "nowhere: no such folder"),
        ([*CUSTOM, "--text={title", "--label=liked"], "Write column names in braces"),
        ([*CUSTOM, "--text={title}", "--label=liked", "--threshold=3"], "threshold goes with rating"),
        ([*CUSTOM, "--text={title}", "--label=liked"], "nowhere.csv: no such file"),
        (["rank"], "rank"),
    ],
)
def test_errors_are_short_and_exit_with_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        status = main(arguments)
    except SystemExit as exit_:
        status = exit_.code
    assert status == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir()), "a failed command left something behind"


# Options of text that name no file; where a pretrained model is, `references.locate` expands itself.
NO_PATHS = {
    *("--text", "--label", "--rating", "--user", "--item", "--timestamp", "--items-key"),
    *("--split-column", "--val-from", "--test-from", "--context-text", "--timezone", "--user-text"),
    *("--users-key", "--model.template"),
    *("--split", "--device", "--dti.mode", "--model.instruction", "--base", "--model.pretrained", "name"),
}


@pytest.mark.parametrize("words", EVERY_COMMAND, ids=" ".join)
def test_every_path_may_begin_with_a_tilde(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All commands but train made or read a folder called `~`: shells leave it as it is in --out=~/x."""
    monkeypatch.setenv("HOME", str(tmp_path))
    arguments, paths, texts = [], set(), set()
    for action in parser_of(words)._actions:
        kind, name = str(getattr(action, "_typehint", None)), (action.option_strings or [action.dest])[0]
        if "Path" in kind:
            paths.add(action.dest)
            arguments.append(f"{name}=~/{action.dest}")
        elif "str'" in kind or "str |" in kind:
            texts.add(name)
        if name in ("--text", "--grid"):
            arguments.append(f"{name}={{k: [3]}}")
        elif name == "name":
            arguments.append("x")
    assert paths
    assert texts <= NO_PATHS, "give what names a file or a folder the type Path, and list what does not"
    parsed = parser_of(words).parse_args(arguments)
    assert {name: parsed[name] for name in paths} == {name: tmp_path / name for name in paths}


def test_yaml_files_and_paths_in_them_may_begin_with_a_tilde(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """--config=~/run.yaml was looked for in a folder called `~`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("data: ~/nowhere\n")
    (tmp_path / "optim.yaml").write_text("epochs: 1\n")
    (tmp_path / "grid.yaml").write_text("k: [3]\n")
    common = ["--config=~/run.yaml", "--optim=~/optim.yaml", "--out=~/out"]
    for command in (["train"], ["search", "--grid=~/grid.yaml"]):
        assert main([*command, *common]) == 2
        assert f"{tmp_path / 'nowhere'}: no such folder" in capsys.readouterr().err
    options = parser_of(("search",)).parse_args(["--grid=~/grid.yaml", *common])
    assert (options.grid["k"], options.optim.epochs, options.data) == ([3], 1, tmp_path / "nowhere")
