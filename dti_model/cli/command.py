"""The `dti` command: the first word picks a file of this folder, which has the command's parser and its `run`."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NoReturn

from jsonargparse import Namespace

from dti_model.cli.parser import Parser, check_characters, choose, name_options, with_dashes
from dti_model.error_lines import line_of, line_of_bug
from dti_model.launch import check_alone
from dti_model.output import unbreakable_output
from dti_model.process import set_up_process

COMMANDS = {
    "prepare": "make a prepared folder from raw files",
    "train": "train a model into a run folder",
    "evaluate": "metrics of a trained run beside baselines",
    "score": "click probabilities of a file of candidates",
    "search": "compare settings over seeds, on validation only",
    "fetch-model": "get a small pretrained model",
    "export": "a trained run as a plain model folder",
}
# Several processes of a launcher would all write the same output.
_OF_ONE_PROCESS = ("prepare", "fetch-model", "score", "export")
# BUG_STATUS is EX_SOFTWARE of sysexits.h, as the status of a training that SIGTERM ended is its EX_TEMPFAIL.
ERROR_STATUS, BUG_STATUS, INTERRUPTED_STATUS = 2, 70, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Whatever ends it is one line on stderr, below its traceback with `--debug`, and an exit status: 2 for an
    error of the user's or the machine's, 70 for a bug of ours, 130 for Ctrl-C.
    """
    set_up_process()
    words = with_dashes(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words  # also behind the command, where a message asks for it
    words = [word for word in words if word != "--debug"]
    name = words[0] if words and words[0] in COMMANDS else ""
    options = Namespace()
    with unbreakable_output():
        try:
            check_characters(words)
            parser, run_command, rest = command_of(words)
            options = parser.parse_args(rest)
            if name in _OF_ONE_PROCESS:
                check_alone(f"dti {name}")
            if name != "prepare":
                _quiet_transformers()
            run_command(parser.instantiate(options))
        except (Exception, KeyboardInterrupt) as error:
            if debug:
                traceback.print_exc()
            return _ended(f"dti {name}".strip(), error, options, words)
    return 0


def run() -> NoReturn:
    """The program `dti`: `main`, and the end of the process."""
    try:
        status = main()
    except SystemExit as end:  # a parser's, or SIGTERM in a training
        if not isinstance(end.code, int):
            raise
        status = end.code
    ranks = sys.modules.get("dti_model.ranks")  # what never needed it has joined nobody
    if ranks is not None:
        ranks.exit_with(status)
    sys.exit(status)


def command_of(words: Sequence[str]) -> tuple[Parser, Callable[[Namespace], None], Sequence[str]]:
    """The parser of the command that the first words name, the function that runs it, and the other words."""
    top = argparse.ArgumentParser(
        "dti",
        description="Train and evaluate click models on streaming prompts (DTI).\n"
        "`dti COMMAND --help` lists the options of a command.",
    )
    top.add_argument("--version", action="version", version=f"dti {_version()}\n", help="print the version")
    top.add_argument("--debug", action="store_true", help="show the traceback of an error")
    name, rest = choose(top, COMMANDS, "COMMAND", words)
    module = import_module(f"dti_model.cli.{name.replace('-', '_')}")
    if name == "prepare":
        sources = argparse.ArgumentParser("dti prepare", description=module.DESCRIPTION)
        titles = {source: entry.title for source, entry in module.SOURCES.items()}
        source, rest = choose(sources, titles, "SOURCE", rest)
        parser, run_command = module.make_parser(source), partial(module.run, source)
        name = f"{name} {source}"
    else:
        parser, run_command = module.make_parser(), module.run
    parser.finish(f"dti {name}")
    return parser, run_command, rest


def _ended(command: str, error: BaseException, options: Namespace, words: Sequence[str]) -> int:
    """Say in one line what ended a command; gives its exit status."""
    if isinstance(error, KeyboardInterrupt):
        way = _where_it_goes_on(command, options)
        print(f"\n{command}: interrupted: give the same command again {way}", file=sys.stderr)
        return INTERRUPTED_STATUS
    if isinstance(error, (ValueError, OSError, RuntimeError, MemoryError, ModuleNotFoundError)):
        print(f"{command}: error: {name_options(line_of(error), words)}", file=sys.stderr)
        return ERROR_STATUS
    print(f"{command}: {line_of_bug(error)}", file=sys.stderr)
    return BUG_STATUS


def _where_it_goes_on(command: str, options: Namespace) -> str:
    """Of a command that Ctrl-C ended. Imports nothing: that may be what was interrupted."""
    if command in ("dti score", "dti search"):
        return "to go on where it was"
    if command == "dti train" and options.get("out") is not None:
        folders = Path(options.out).glob("checkpoints/checkpoint-*")
        steps = [path.name.removeprefix("checkpoint-") for path in folders]
        last = max((int(step) for step in steps if step.isascii() and step.isdigit()), default=None)
        if last is not None:
            return f"to go on from checkpoint {last}"
    return "to start again"


def _version() -> str:
    try:
        return version("dti-click")
    except PackageNotFoundError:  # a checkout that is not installed
        return "unknown (not installed)"


def _quiet_transformers() -> None:
    """Our own lines and bars are enough."""
    import warnings

    from transformers.utils import logging

    # Of transformers' own and peft's use of names that will be removed: nothing that a user of `dti` could change.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
