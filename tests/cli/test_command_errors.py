"""Every command over a table of broken inputs: one short line that names the option or the file, and an exit status."""

from __future__ import annotations

import os
import re
import runpy
import signal
import subprocess
import sys
from argparse import SUPPRESS
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dti_model.cli import command as cli
from dti_model.cli.command import BUG_STATUS, ERROR_STATUS, main
from dti_model.config.bounds import RULES, check_settings
from dti_model.error_lines import MOST_CHARACTERS, joined, line_of, line_of_bug
from dti_model.launch import num_processes
from dti_model.shown import one_line
from tests.cli.test_cli import commands_of
from tests.conftest import ROOT
from tests.data.log_files import write_amazon
from tests.data.movielens_files import some_ratings

PARSER = cli._parser()
COMMANDS = dict(commands_of(PARSER))
# What a line has besides the error's own words: the command, and where help is.
MOST_OF_A_LINE = MOST_CHARACTERS + 200


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """One parser for all, nothing of a launcher in the environment, and nobody waits for a pipe."""
    monkeypatch.setattr(cli, "_parser", lambda: PARSER)
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("waits for somebody to write to a pipe"))
    signal.alarm(100)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def status_of(arguments: list[str]) -> int:
    try:
        return main(arguments)
    except SystemExit as end:  # of the parser
        return int(str(end.code))


def refused(arguments: list[str], capsys: Any, status: int = ERROR_STATUS) -> str:
    """The one line of an error."""
    capsys.readouterr()
    assert status_of(arguments) == status, arguments
    error: str = capsys.readouterr().err
    assert error.endswith("\n")
    line = error[:-1]
    assert line.isprintable(), arguments
    assert "Traceback" not in line
    assert len(line) <= MOST_OF_A_LINE, arguments
    return line


# -- paths ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def bases(small_folder: Path, run_folder: Path, tmp_path: Path) -> dict[tuple[str, ...], dict[str, str]]:
    """Of every command, options that it takes: what is broken in the table is the only thing that is. A new command is added here."""
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    (inputs / "in.jsonl").write_text('{"user": "1", "candidates": ["1"]}\n')
    (inputs / "rows.csv").write_text("user,item,timestamp,liked\n1,1,1,1\n")
    (inputs / "items.csv").write_text("item,title\n1,a\n")
    reviews, meta = write_amazon(inputs, some_ratings())
    for file in (reviews, meta):
        (inputs / file.name.replace("CDs_and_Vinyl", "Kindle_Store")).symlink_to(file)
    out = {"--out": str(tmp_path / "out")}
    train = {**out, "--data": str(small_folder)}
    amazon = {**out, "--raw-dir": str(inputs)}
    found = {
        ("prepare", "ml-100k"): {**out, "--raw-dir": str(inputs)},
        ("prepare", "ml-1m"): {**out, "--raw-dir": str(inputs)},
        ("prepare", "amazon-cds"): amazon,
        ("prepare", "amazon-kindles"): amazon,
        ("prepare", "amazon"): {
            **out,
            "--reviews": str(reviews),
            "--meta": str(meta),
        },
        ("prepare", "custom"): {
            **out,
            "--interactions": str(inputs / "rows.csv"),
            "--items": str(inputs / "items.csv"),
            "--text": "{title}",
            "--label": "liked",
        },
        ("train",): train,
        ("search",): {**train, "--grid": "{k: [3]}"},
        ("evaluate",): {"--run": str(run_folder)},
        ("score",): {
            "--run": str(run_folder),
            "--input": str(inputs / "in.jsonl"),
            "--output": str(tmp_path / "out.jsonl"),
        },
        ("fetch-model",): out,
        ("export",): {**out, "--run": str(run_folder)},
    }
    assert found.keys() == COMMANDS.keys()
    return found


def words_of(command: tuple[str, ...], options: dict[str, str]) -> list[str]:
    positional = ["smollm2-135m"] if command == ("fetch-model",) else []
    return [*command, *positional, *(f"{name}={value}" for name, value in options.items())]


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


# What may be made under these names.
MAY_BE_MADE = {"control characters", "empty file"}


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_path_of_every_command(
    command: tuple[str, ...], bases: dict[tuple[str, ...], dict[str, str]], tmp_path: Path, capsys: Any
) -> None:
    """`dti prepare` printed its usage, a path of 6,000 characters all of itself, and a NUL or a byte that is no UTF-8 no option."""
    paths = [
        action.option_strings[0]
        for action in COMMANDS[command]._actions
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


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_option_of_every_command(
    command: tuple[str, ...], bases: dict[tuple[str, ...], dict[str, str]], capsys: Any
) -> None:
    """Values of another type were told in the parser's own words, with `typing.Literal` and its name for the setting."""
    tried = 0
    for action in COMMANDS[command]._actions:
        option = next((name for name in action.option_strings if name.startswith("--")), None)
        if (
            option is None
            or action.help == SUPPRESS
            or option in ("--help", "--print_config", "--print_shtab")
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
        (["trian"], "dti: error: argument subcommand: invalid choice: 'trian' (choose"),
        (["trian"], "did you mean train? (dti --help lists what there is)"),
        (["prepare", "ml100k"], "did you mean ml-100k? (dti prepare --help"),
        (["prepare"], "dti prepare: error: one of ml-100k, ml-1m, "),
        ([], "dti: error: one of prepare, train, "),
        (["prepare", "custom", "--out=x"], "dti prepare custom: error: --interactions, --items, --text must be given"),
        (["fetch-model"], "dti fetch-model: error: name, --out must be given"),
        (["train", "--out=x", "--data=y", "--optim.epoch=3"], "did you mean --optim.epochs?"),
        (["train", "--out=x", "--data=y", "--epochs=3"], "did you mean --optim.epochs?"),
        (["train", "--out=x", "--data=y", "--optim={epoch: 3}"], "did you mean optim.epochs?"),
        (["train", "--out=x", "--data=y", "--optim={epochs: x}"], "optim.epochs must be >= 1 and"),
        (["search", "--out=x", "--data=y", "--grid={k: [3]}", "--seed=1"], "did you mean --seeds?"),
        (["search", "--out=x", "--data=y", "--grid={k: 3}"], "--grid must be a mapping from settings to lists"),
        (["search", "--out=x", "--data=y", "--grid={k: [3]}", "--seeds=1"], "--seeds must be a list of integers"),
        (["score", "--bad-lines=skp"], "--bad-lines must be stop or skip, got skp"),
        (["prepare", "ml-1m", "--out=x", "--vocab-size=many"], "--vocab-size must be an integer, got many"),
        (["evaluate", "--run=x", "--k=-1"], "k must be >= 0 and <= 1,000,000,000 (an integer), got -1"),
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
    arguments = ["train", "--data=x", "--out=y", "--config=a.yaml", "--config=b.yaml"]
    cli.check_arguments(arguments)
    assert PARSER.parse_args(arguments).train.k == 4


# -- what ends a command --------------------------------------------------------------------------------------------------


class Unheard(Exception):
    """Of a library that nobody has thought of."""


def raising(error: BaseException) -> Callable[..., None]:
    def fail(*_: Any) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    "error",
    [
        TypeError("a\nb" * 5000),
        KeyError("x"),
        AssertionError(),
        Unheard("\x1b"),
        ZeroDivisionError(),
        StopIteration(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_bugs_have_a_line_and_a_status_of_their_own(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """A traceback, and the status 1."""
    monkeypatch.setattr("dti_model.cli.command.add_evaluate", raising(error))
    monkeypatch.setattr(cli, "run_evaluate", raising(error))
    line = refused(["evaluate", "--run=x"], capsys, BUG_STATUS)
    start = rf"dti evaluate: a bug in dti, {type(error).__name__} at dti_model/cli\.py:\d+: "
    assert re.match(start, line), line
    assert line.endswith("Run the command again with --debug, which shows all of it, and report that")


@pytest.mark.parametrize("place", [0, 1, 2])
def test_debug_shows_the_traceback_wherever_it_stands(place: int, capsys: Any) -> None:
    """Behind the subcommand it was an unrecognized argument, and the line that names it is printed there."""
    arguments = ["evaluate", "--run=nowhere"]
    plain = refused(arguments, capsys)
    assert status_of([*arguments[:place], "--debug", *arguments[place:]]) == ERROR_STATUS
    error = capsys.readouterr().err
    assert error.startswith("Traceback (most recent call last)")
    assert error.endswith(f"\n{plain}\n")


def test_lines_of_errors() -> None:
    """Of OSErrors the file comes first; a library's own words say whose they are; the way out at the end of long ones stays."""
    assert (
        line_of(FileNotFoundError(2, "No such file or directory", "a\x00b"))
        == "a\\x00b: No such file or directory"
    )
    assert line_of(MemoryError()) == "out of memory: use a smaller model or token budget"
    assert (
        line_of(RuntimeError("CUDA\nerror")) == "CUDA error (RuntimeError of a library; --debug shows where)"
    )
    with pytest.raises(TypeError) as raised:
        check_settings(3)
    assert "TypeError at dti_model/config/bounds.py:" in line_of_bug(raised.value)
    long = joined("x" * 10**6 + " delete it")
    assert len(long) < MOST_CHARACTERS
    assert long.endswith("x delete it")
    assert joined("r\udcff\u202e") == "r\\udcff\\u202e"


# -- launchers ------------------------------------------------------------------------------------------------------------

TWO = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "x", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "abc"}, r"WORLD_SIZE in the environment must be an integer >= 1, got 'abc'"),
        ({"WORLD_SIZE": "0"}, r"WORLD_SIZE .* got '0'"),
        ({"WORLD_SIZE": ""}, r"WORLD_SIZE .* got ''"),
        ({"RANK": "9" * 5000}, r"RANK .* got '9{60}'"),
        ({"LOCAL_RANK": "1.0"}, r"LOCAL_RANK .* got '1\.0'"),
        ({"WORLD_SIZE": "2"}, r"WORLD_SIZE=2 and no RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT: start with torchrun"),
        ({**TWO, "RANK": "2"}, r"RANK=2 in the environment must be below WORLD_SIZE=2"),
    ],
)  # fmt: skip
def test_ranks_of_no_sense(
    environment: dict[str, str],
    message: str,
    bases: dict[tuple[str, ...], dict[str, str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    """`invalid literal for int()`, or half an hour of waiting for a process that nobody had started."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for command in (("train",), ("search",), ("evaluate",), ("score",), ("prepare", "custom")):
        assert re.search(message, refused(words_of(command, bases[command]), capsys)), command


def test_commands_of_one_process(
    bases: dict[tuple[str, ...], dict[str, str]], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Under torchrun all ranks scored into one file, and the slower ones were told that it existed."""
    assert num_processes() == 1
    for name, value in TWO.items():
        monkeypatch.setenv(name, value)
    assert num_processes() == 2
    alone = [command for command in COMMANDS if command[0] not in ("train", "search", "evaluate")]
    for command in alone:
        line = refused(words_of(command, bases[command]), capsys)
        assert f"dti {command[0]} runs in one process, and WORLD_SIZE=2" in line
    monkeypatch.setenv("WORLD_SIZE", "-1")
    assert num_processes() == 1


# -- real processes -------------------------------------------------------------------------------------------------------


def test_closed_and_full_outputs(tmp_path: Path) -> None:
    """Errors that cannot be printed have their status all the same; one process forks for each, so that modules are imported once."""
    code = """
import os, sys
from dti_model.cli.command import _parser, main
_parser()
def status(arguments, *redirected):
    if os.fork() == 0:
        for descriptor, path in redirected:
            os.close(descriptor)
            if path: os.open(path, os.O_WRONLY)
        sys.stdout, sys.stderr = (None if not path else open(descriptor, "w") for descriptor, path in redirected)
        try: status = main(arguments)
        except SystemExit as end: status = end.code
        os._exit(status)
    return os.waitstatus_to_exitcode(os.wait()[1])
for path in (None, "/dev/full"):
    for arguments in (["train", "--k=1:30"], ["trian"], ["--help"]):
        print(status(arguments, (1, path), (2, path)), end=" ", flush=True)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert ended.stdout == "2 2 0 2 2 0 "
    assert ended.stderr == ""


# -- random words ---------------------------------------------------------------------------------------------------------

EXAMPLES = int(os.environ.get("DTI_FUZZ_EXAMPLES", "100"))
NAMES = sorted(
    {name for parser in COMMANDS.values() for action in parser._actions for name in action.option_strings}
)
VALUES = ["", "x", "nan", "-1", "1e999", "9" * 5000, "[" * 60, "{a: {b: [1]}}", "&a [*a]", "\0", "\udcff", "\x1b[0m", "a\nb", "~", "true", "3",
          "!!python/name:os.system", "--", "{k: [3]}", "optim: 3", "'", "%s", "{", "x" * 5000, "1:30", "null", "val"]  # fmt: skip
WORDS = st.one_of(
    st.sampled_from([word for command in COMMANDS for word in command]),
    st.sampled_from(NAMES),
    st.sampled_from(VALUES),
    st.builds("{}={}".format, st.sampled_from(NAMES), st.sampled_from(VALUES) | st.text(max_size=9)),
    st.text(max_size=5).map("--{}".format),
)


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(command=st.sampled_from([(), *COMMANDS]), words=st.lists(WORDS, max_size=5), is_complete=st.booleans())
def test_random_words(
    command: tuple[str, ...],
    words: list[str],
    is_complete: bool,
    bases: dict[tuple[str, ...], dict[str, str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    """Parsed to the end, or one line; what commands do has its own tests."""
    for name in (
        "run_prepare",
        "run_evaluate",
        *(f"_{x}" for x in ("fetch_model", "train", "score", "search", "export")),
    ):
        monkeypatch.setattr(cli, name, lambda _: None)
    base = words_of(command, bases[command]) if command and is_complete else list(command)
    arguments = [word for word in [*base, *words] if word not in ("-h", "--debug")]
    capsys.readouterr()
    status = status_of(arguments)
    assert status in (0, ERROR_STATUS), arguments
    if status == ERROR_STATUS:
        refused(arguments, capsys)


def test_a_library_in_a_folder_of_our_name_is_a_library(tmp_path: Path) -> None:
    """An environment below a checkout called dti_model made every library's error the project's own."""
    path = tmp_path / "dti_model" / "library.py"
    path.parent.mkdir()
    path.write_text("raise RuntimeError('x')")
    with pytest.raises(RuntimeError) as raised:
        runpy.run_path(str(path))
    assert line_of(raised.value) == "x (RuntimeError of a library; --debug shows where)"
    assert "library.py" not in line_of_bug(raised.value)
