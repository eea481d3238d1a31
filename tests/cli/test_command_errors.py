"""Every command over a table of broken inputs: one short line that names the option or the file, and the nearest name."""

from __future__ import annotations

import os
import re
from argparse import SUPPRESS
from pathlib import Path
from typing import Any

import pytest

from dti_model.config import RULES
from dti_model.error_lines import joined
from dti_model.shown import one_line
from tests.cli.commands import EVERY_COMMAND, parser_of, refused, words_of

pytestmark = pytest.mark.usefixtures("quick")


def make_broken(folder: Path) -> dict[str, str]:
    """Paths that can be neither read nor written, by what they are."""
    folder.mkdir()
    (folder / "loop").symlink_to("loop")
    (folder / "file").write_bytes(b"\xff\x00garbage")
    (folder / "empty").touch()
    (folder / "full").mkdir()
    (folder / "full" / "thesis.tex").write_text("years of work")
    os.mkfifo(folder / "pipe")
    return {
        "empty": "",
        "NUL": "a\0b",
        "bytes": "r\udcffn",
        "long name": "x" * 300,
        "long path": "y/" * 3000,
        "control characters": "\x1b[31m\n\u202e/x",
        "loop": str(folder / "loop"),
        "in a loop": str(folder / "loop" / "x"),
        "in a file": str(folder / "file" / "x"),
        "garbage": str(folder / "file"),
        "empty file": str(folder / "empty"),
        "folder of another": str(folder / "full"),
        "pipe": str(folder / "pipe"),
        "device": "/dev/full",
    }


# Outputs may be made under these names.
MAY_BE_MADE = {"control characters", "empty file"}


@pytest.mark.parametrize("command", EVERY_COMMAND, ids=" ".join)
def test_every_path_of_every_command(
    command: tuple[str, ...], bases: dict[tuple[str, ...], dict[str, str]], tmp_path: Path, capsys: Any
) -> None:
    """`dti prepare` printed its usage, a path of 6,000 characters all of itself, and a NUL or a byte that is no UTF-8 no option."""
    paths = [
        action.option_strings[0]
        for action in parser_of(command)._actions
        if "Path" in str(getattr(action, "_typehint", None)) and action.option_strings
    ]
    assert paths
    broken = make_broken(tmp_path / "broken")
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    for option in paths:
        is_output = option in ("--out", "--output", "--json")
        for kind, value in broken.items():
            if is_output and kind in MAY_BE_MADE:
                continue
            line = refused(words_of(command, {**bases[command], option: value}), capsys)
            value = value.removesuffix("/")
            # A message may have escaped the name before its lines were joined.
            shown = [option, joined(value)[:60], one_line(value)[:60]]
            assert any(text in line for text in shown if text), (kind, line)
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before


# -- other values ---------------------------------------------------------------------------------------------------------


def hostile_values(action: Any) -> list[str]:
    """That no option of this type takes."""
    kind = str(getattr(action, "_typehint", None) or action.type)
    if action.nargs == 0:
        return ["x"]
    if "bool" in kind:
        return ["maybe", "", "9" * 5000]
    if "Literal" in kind or action.choices:
        return ["nonsense", "", "y" * 9000]
    if "list[int]" in kind:
        return ["x", "", "1", "[x]", "{a: 1}"]
    if action.dest in RULES:  # more of theirs in test_settings.py
        return ["x", "9" * 5000] if "'int'" in kind or "float" in kind else []
    if "'int'" in kind:
        return ["x", "", "1.5", "nan", "1e999", "9" * 5000, "1:30", "[1]", "&a [*a]"]
    if "float" in kind:
        return ["x", "", "nan", "1e999", "9" * 5000, "1:30", "[1]"]
    return []


@pytest.mark.parametrize("command", EVERY_COMMAND, ids=" ".join)
def test_every_option_of_every_command(
    command: tuple[str, ...], bases: dict[tuple[str, ...], dict[str, str]], capsys: Any
) -> None:
    """Values of another type were told in the parser's own words, with `typing.Literal` and its name for the setting."""
    tried = 0
    for action in parser_of(command)._actions:
        option = next((name for name in action.option_strings if name.startswith("--")), None)
        if (
            option is None
            or action.help == SUPPRESS
            or option in ("--help", "--print-config", "--print-shtab")
        ):
            continue
        setting = option.removeprefix("--")
        if command == ("search",) and setting in RULES:
            continue  # as those of `dti train`
        base = words_of(
            command,
            {
                **bases[command],
                **({"--rating": "stars"} if (command[-1], setting) == ("custom", "threshold") else {}),
            },
        )
        for value in hostile_values(action):
            line = refused(
                [*(word for word in base if not word.startswith(f"{option}=")), f"{option}={value}"], capsys
            )
            assert setting in line or setting.replace("-", "_") in line, (value, line)
            assert "typing" not in line
            assert "class" not in line
            tried += 1
        if option != "--config" and action.nargs != 0:
            others = [word for word in base if not word.startswith(f"{option}=")]
            assert f"{option} is given twice" in refused([*others, f"{option}=1", option, "2"], capsys)
        line = refused([*base, f"{option}q=1"], capsys)
        assert re.search(rf"unrecognized arguments: {option}q=1: did you mean --[\w.-]+\?", line), line
    assert tried or command == ("fetch-model",)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "dti: error: COMMAND must be one of prepare, train, "),
        (["trian"], "export, got trian: did you mean train? (dti --help lists what there is)"),
        (["--verison"], "dti: error: unrecognized arguments: --verison: did you mean --version?"),
        (["prepare", "ml100k"], "did you mean ml-100k? (dti prepare --help"),
        (["prepare", "--hlep"], "dti prepare: error: unrecognized arguments: --hlep: did you mean --help?"),
        (["prepare"], "dti prepare: error: one of ml-100k, ml-1m, "),
        ([], "dti: error: one of prepare, train, "),
        (["prepare", "custom", "--out=x"], "dti prepare custom: error: --interactions, --items must be given"),
        (["fetch-model"], "dti fetch-model: error: name, --out must be given"),
        (["train", "--out=x", "--data=y", "--optim.epoch=3"], "did you mean --optim.epochs?"),
        (["train", "--out=x", "--data=y", "--epochs=3"], "did you mean --optim.epochs?"),
        (["train", "--out=x", "--data=y", "--optim={epoch: 3}"], "did you mean optim.epochs?"),
        (["train", "--out=x", "--data=y", "--optim={epochs: x}"], "optim.epochs must be >= 1 and"),
        (["train", "--out=x", "--data=y", "--optim.epochs=x"], "error: --optim.epochs must be >= 1 and"),
        (["train", "--out=x", "--data=y", "--optim.learning-rate=-1"], "error: --optim.learning-rate must be > 0"),
        (["train", "--out=x", "--data=y", "--optim.learning_rate=-1"], "error: --optim.learning-rate must be > 0"),
        (["train", "--out=x", "--data=y", "--optim={learning_rate: -1}"], "error: optim.learning_rate must be > 0"),
        (["train", "--out=x", "--data=y", "--learning-rate=1"], "did you mean --optim.learning-rate?"),
        (["train", "--out=x", "--data=y", "--optim={learning-rate: -1}"], "error: optim.learning_rate must be > 0"),
        (["train", "--out=x", "--data=y", "--report-to=[]", "--report_to=[]"], "--report-to is given twice"),
        (["train", "--out=x", "--data=y", "--\\1", "3"], "error: unrecognized arguments: --\\1 3"),
        (["train", "--out=x", "--data=y", "--report-to", "wandb"], "in a list, got wandb (dti train --help"),
        (["fetch-model", "--out=x", "--", "a_b"], "a_b"),
        (["train", "--out=x", "--data=y", "--model.dtype=bflot16"], "--model.dtype must be float32 or bfloat16, got bflot16: did you mean bfloat16?"),
        (["train", "--out=x", "--data=y", "--dti.mode=dti_minus"], "got 'dti_minus': did you mean dti-minus?"),
        (["search", "--out=x", "--data=y", "--grid={k: [3]}", "--seed=1"], "did you mean --seeds?"),
        (["search", "--out=x", "--data=y", "--grid={k: 3}"], "--grid must be a mapping from settings to lists"),
        (["search", "--out=x", "--data=y", "--grid={k: [3]}", "--seeds=1"], "--seeds must be a list of integers"),
        (["score", "--bad-lines=skp"], "--bad-lines must be stop or skip, got skp: did you mean skip?"),
        (["prepare", "ml-1m", "--out=x", "--vocab-size=many"], "--vocab-size must be an integer, got many"),
        (["evaluate", "--run=x", "--k=-1"], "error: --k must be >= 0 and <= 1,000,000,000 (an integer), got -1"),
        (["evaluate", "--run=x", f"--k={10**23}"], "k must be >= 0 and"),
        (["evaluate", "--run=a\nb/c"], "a b/c/config.yaml does not exist"),
    ],
)  # fmt: skip
def test_the_words_of_errors(arguments: list[str], message: str, capsys: Any) -> None:
    """An abbreviated option was taken, past the checks that know it by its name; and required ones were called `train.out`."""
    assert message in refused(arguments, capsys)


def test_keys_of_files_are_suggested(tmp_path: Path, small_folder: Path, capsys: Any) -> None:
    (tmp_path / "a.yaml").write_text("optim:\n  learning_rat: 0.1\n")
    train = ["train", f"--data={small_folder}", "--out=x", "--config=a.yaml"]
    assert "did you mean optim.learning_rate?" in refused(train, capsys)
    search = ["search", f"--data={small_folder}", "--out=x", "--grid={optim.learning_rat: [0.1]}"]
    assert "did you mean optim.learning_rate?" in refused(search, capsys)


def test_files_of_settings_are_laid_over_each_other(tmp_path: Path) -> None:
    """The one option that may stand twice."""
    for name, k in (("a", 3), ("b", 4)):
        (tmp_path / f"{name}.yaml").write_text(f"k: {k}\n")
    arguments = ["--data=x", "--out=y", "--config=a.yaml", "--config=b.yaml"]
    assert parser_of(("train",)).parse_args(arguments).k == 4
