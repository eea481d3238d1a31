"""Every command of the README works as it is written: it runs in a copy of the checkout, or the real parser takes it."""

from __future__ import annotations

import importlib
import re
import shlex
import shutil
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from torch.distributed.run import parse_args as torchrun_arguments

from dti_model.cli.command import command_of
from dti_model.data import prepare
from tests.checkout import copy_checkout, file_hashes, paste
from tests.conftest import ROOT
from tests.data.log_files import (
    CUSTOM_COLUMNS,
    ITEM_COLUMNS,
    custom_rows,
    item_rows,
    write_amazon,
    write_csv,
    write_parquet,
)
from tests.data.movielens_files import some_ratings, write_1m
from tests.model.pretrained_files import pretrained_folder

TEXT = (ROOT / "README.md").read_text()
PROGRAMS = ("make", "dti", "python", "torchrun", "pip", "uv", "source")


def commands(text: str) -> list[str]:
    """Lines of bash blocks, and code in the prose that is a command: a program's name and options or a target."""
    lines = [
        line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines()
    ]
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    spans = re.findall(r"(?<!`)`([^`]+)`(?!`)", prose)
    spans = [" ".join(span.split()) for span in spans if span.split()[0] in PROGRAMS]
    lines += [span for span in spans if " -" in span or span.startswith("make ")]
    return list(dict.fromkeys(lines))


COMMANDS = commands(TEXT)
SMALL = (
    " --model.layers 1 --model.width 16 --model.heads 2 --model.kv-heads 1 --optim.epochs 1 --progress false"
)
FEW_STEPS = " --optim.max-steps 2 --optim.validate-every 2 --progress false"
# Beginnings of the commands that run, in their order, with what is appended to make them small; the last of equal flags wins.
# Those of one list need what the ones before made; the lists run side by side.
RUN: tuple[dict[str, str], ...] = (
    {
        "make quickstart": "",
        "dti score": " --progress false",
        "python -m benchmarks.bench_train": " --layers 1 --width 16 --heads 2 --k 1 50 --steps 1 --token-budget 1024",
        "python -m benchmarks.leak_meter": " --layers 1 2 --prompts 1",
        "python -m benchmarks.simulate": "",
    },
    {
        "source .venv/bin/activate": "",
        "dti train --data data/ml-100k --out runs/mine": SMALL,
        "dti evaluate --run": " --progress false",
        "dti prepare amazon": "",
        "dti prepare custom": "",
        "dti train --data data/mine --out runs/day-1": SMALL,
        "dti train --init": " --progress false",
        "dti search": SMALL,
        "dti train --config configs/smollm2-lora.yaml": FEW_STEPS,
        "dti export": "",
        "python -m benchmarks.bench_quality": " --size smoke --plan table1",
    },
)
# These need a network, many GPUs, or the whole suite, or change what is tracked; the real parser takes them.
PARSED = (
    "make test",
    "make install",
    "pip install",
    "uv pip install",
    "dti prepare ml-100k",
    "dti prepare ml-1m",
    "dti fetch-model",
    "torchrun",
    "python -m benchmarks.bench_days",
    "python -m benchmarks.gpu_suite",
    "python -m benchmarks.report",
)


def named(beginning: str) -> list[str]:
    return [command for command in COMMANDS if command == beginning or command.startswith(f"{beginning} ")]


def test_every_command_is_run_or_parsed() -> None:
    beginnings = [*PARSED, *(beginning for chain in RUN for beginning in chain)]
    for beginning in beginnings:
        assert named(beginning), f"the README has no command {beginning!r} any more"
    for command in COMMANDS:
        assert any(command in named(beginning) for beginning in beginnings), f"nothing tests {command!r}"


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_can_be_pasted_into_zsh(command: str) -> None:
    """zsh takes an unquoted [wandb] for a pattern that matches no file, and a comment on a line that is typed for arguments."""
    unquoted = re.sub(r"'[^']*'|\"[^\"]*\"", "", command)
    assert not set("[]{}*?#~^") & set(unquoted)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy with the inputs that the README's commands name, all tiny."""
    folder = copy_checkout(tmp_path_factory.mktemp("pasted") / "dti")
    raw = tmp_path_factory.mktemp("raw")
    for name, context in (("ml-100k", None), ("quickstart", "{item_ctr}; {affinity}")):
        write_1m(raw, some_ratings(60))
        prepare(*("ml-1m", folder / "data" / name, raw), subset=True, vocab_size=400, context_text=context)
    for path, name in zip(
        write_amazon(raw, some_ratings(60)), ("Gift_Cards_5.json.gz", "meta_Gift_Cards.json.gz")
    ):
        shutil.move(path, folder / name)
    clicks = [
        {**row, "timestamp": row["timestamp"] + 1_600_000_000, "device": "phone"}
        for row in custom_rows(some_ratings(60))
    ]
    write_csv(folder / "clicks.csv", (*CUSTOM_COLUMNS, "device"), clicks)
    write_csv(folder / "users.csv", ("user", "gender", "age"), [{"user": 1, "gender": "F", "age": 30}])
    later = [
        (user, item, rating, time + 1_600_001_000) for user, item, rating, time in some_ratings(60, seed=1)
    ]
    write_csv(folder / "today.csv", CUSTOM_COLUMNS, custom_rows(later))
    write_parquet(folder / "items.parquet", ITEM_COLUMNS, item_rows())
    (folder / "requests.jsonl").write_text(
        '{"user": "5", "candidates": ["1", "9"]}\n{"history": [["1", 1], ["9", 0]], "candidates": ["11"]}\n'
    )
    pretrained_folder(folder / "models" / "smollm2-135m")
    return folder


@pytest.mark.slow
def test_commands_run_as_they_are_pasted(checkout: Path) -> None:
    """And change no tracked file: benchmarks once appended to results/, after which the README differed from them."""
    before = file_hashes(checkout)

    def run(chain: dict[str, str]) -> list[str]:
        failures = []
        for beginning, appended in chain.items():
            for command in named(beginning):
                if beginning == "make quickstart" and shutil.which("make") is None:
                    command = "dti train --data data/quickstart --out runs/quickstart --config configs/quickstart.yaml"
                done = paste(command + appended, checkout)
                if done.returncode:
                    failures.append(
                        f"{command}{appended}: exit status {done.returncode}\n{done.stdout}{done.stderr}"
                    )
        return failures

    with ThreadPoolExecutor(len(RUN)) as pool:
        failures = [failure for chain in pool.map(run, RUN) for failure in chain]
    assert not failures, "\n\n".join(failures)
    after = file_hashes(checkout)
    assert {name: after.get(name) for name in before} == before
    assert set(after) - set(before) == {"scores.jsonl"}, "what the README's command names in this folder"
    for made in (
        "quickstart/report.png",
        "mine/metrics.json",
        "search/search.json",
        "benchmarks/train-cpu.jsonl",
    ):
        assert (checkout / "runs" / made).is_file(), made


def flags_of(words: list[str]) -> list[str]:
    return [word.split("=")[0] for word in words if word.startswith("--")]


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith(("dti ", "torchrun "))])
def test_dti_commands_parse(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that they need is left out, every option is known, every configuration file is there."""
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)
    if words[0] == "torchrun":
        started = torchrun_arguments(words[1:])
        assert (started.nproc_per_node, started.module) == ("8", True)
        assert started.training_script == "dti_model.cli"
        words = [started.training_script, *started.training_script_args]
    parser, _, rest = command_of(words[1:])
    assert parser.parse_args(rest)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make ")])
def test_make_targets_exist(command: str) -> None:
    targets = shlex.split(command)[1:]
    rules = (ROOT / "Makefile").read_text()
    for target in targets:
        assert re.search(rf"^{re.escape(target)}:", rules, re.MULTILINE), target


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("python -m ")])
def test_modules_take_the_flags(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = shlex.split(command)
    module = importlib.import_module(words[2])
    monkeypatch.setattr(sys, "argv", [words[2], "--help"])
    with pytest.raises(SystemExit) as exit_:
        module.main()
    assert exit_.value.code == 0
    listed = capsys.readouterr().out
    for flag in flags_of(words[3:]):
        assert flag in listed, flag


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith(("pip ", "uv "))])
def test_install_commands_name_what_is_here(command: str) -> None:
    """Their constraints, folder and extras: installing itself needs a network. One named an extra of a package that no index has."""
    words = shlex.split(command)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    if "-c" in words:
        assert (ROOT / words[words.index("-c") + 1]).is_file()
    wanted = re.fullmatch(r"\.(\[(.*)\])?", words[words.index("-e") + 1])
    assert wanted, "not a folder: the package is on no index"
    assert set((wanted[2] or "test").split(",")) <= set(project["optional-dependencies"])
