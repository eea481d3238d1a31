"""`dti evaluate`: its options, and the file of metrics that `--json` names."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from dti_model.cli.command_line import Parser
from dti_model.config import RULES, as_yaml, must_be, why_owned
from dti_model.files import DamagedFileError, locked_beside, read_sealed, temporary_folder, write_sealed

WRITTEN_BY = "dti evaluate"


def add_evaluate(commands: Any, add_base: Any) -> None:
    """Add the command; `add_base` adds the option `--base`, which other commands have too."""
    evaluate = Parser(
        description="Score the targets of a split with a trained run, one sliding-window prompt each unless --k says otherwise."
    )
    evaluate.add_argument("--run", type=Path, required=True, help="run folder made by `dti train`")
    evaluate.add_argument(
        "--data", type=Path, help="prepared folder; default: the one that the run was trained on"
    )
    evaluate.add_argument(
        "--other-data",
        action="store_true",
        help="score prepared data that the run was not trained on; its targets may be among those trained on",
    )
    add_base(evaluate)
    evaluate.add_argument("--split", type=str, choices=["val", "test"], default="test", help="which targets")
    evaluate.add_argument(
        "--k",
        type=int,
        default=1,
        help="targets per prompt; 0: whole histories. Streaming prompts are many times faster, and a model of several layers "
        "that was trained with them may score better with them",
    )
    evaluate.add_argument(
        "--device",
        type=str,
        help="torch device; default: cuda where there is one. Of several processes (torchrun) each has a device of its own, and "
        "this is its type: cpu or cuda",
    )
    evaluate.add_argument("--json", type=Path, help="also write the metrics to this file")
    evaluate.add_argument("--progress", type=bool, default=True, help="show a progress bar")
    commands.add_subcommand("evaluate", evaluate, help="metrics of a trained run beside lines without text")


def run_evaluate(options: Namespace) -> None:
    """Score, write the file, then print: a closed stdout loses nothing that was asked for, nor does a file that cannot be written."""
    from dti_model.devices import device_of_rank
    from dti_model.evaluation import evaluate_run, metrics_table, sentence_about_baselines
    from dti_model.ranks import first_rank_does, rank

    if not RULES["k"].accepts(options.k):
        raise ValueError(must_be("k", as_yaml(options.k)))
    device_of_rank(options.device)  # joins the other processes, so that one of them holds the file
    with ExitStack() as stack:
        if options.json is not None:
            first_rank_does(lambda: _take(options.json, stack))
        result = evaluate_run(
            options.run,
            options.data,
            options.split,
            options.device,
            options.progress,
            options.k or None,
            options.other_data,
            options.base,
        )
        if rank():
            return
        try:
            if options.json is not None:
                written = {"written_by": WRITTEN_BY, **result}
                write_sealed(options.json, written, check=lambda: check_destination(options.json))
        finally:
            print(metrics_table(result))
            print(sentence_about_baselines(result[options.split], result["baselines"][options.split]))


def _take(path: Path, stack: ExitStack) -> None:
    """Hold the file of metrics against other processes until `stack` ends."""
    check_destination(path)
    stack.enter_context(locked_beside(path, WRITTEN_BY))


def check_destination(path: Path) -> None:
    """Before hours of scoring: a file of metrics can be written here, and what is there is one of an earlier call, or nothing.

    Raises:
        ValueError: something else is there, or belongs there, or nothing can be written there.
    """
    if path.is_symlink() and not path.exists():
        raise ValueError(
            f"--json {path} is a symbolic link to nothing, or to itself: name another, or delete it"
        )
    if not path.parent.is_dir():
        raise ValueError(f"--json {path}: there is no folder {path.parent}")
    real = Path(os.path.realpath(path))
    if path.exists() and not _is_of_evaluate(
        path
    ):  # by its own name: that of a pipe's descriptor leads to none
        kind = "" if path.is_file() else " (it is no regular file)"
        raise ValueError(
            f"--json {path} exists and is not a file that `dti evaluate` wrote{kind}: name another, or delete it"
        )
    owned = why_owned(path)
    if owned is not None:
        raise ValueError(f"--json {path} {owned}")
    try:
        with temporary_folder(real):  # its name is as long as the temporary file's
            pass
    except OSError as error:
        raise ValueError(
            f"--json {path} cannot be written ({error.strerror or error}): name another"
        ) from None


def _is_of_evaluate(path: Path) -> bool:
    try:
        return path.is_file() and read_sealed(path, "").get("written_by") == WRITTEN_BY
    except (DamagedFileError, OSError):
        return False
