"""`dti evaluate`: its options, and the file of metrics that `--json` names."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

from jsonargparse import Namespace

from dti_model.cli.options import add_shared
from dti_model.cli.parser import Parser
from dti_model.config import RULES, as_yaml, must_be, why_owned
from dti_model.files import DamagedFileError, locked_beside, read_sealed, temporary_folder, write_sealed
from dti_model.precision import WORDS

WRITTEN_BY = "dti evaluate"


def make_parser() -> Parser:
    """The options: which targets are scored, with which prompts."""
    parser = Parser(
        description="Score the targets of a split with a trained run, one sliding-window prompt each unless --k says otherwise."
    )
    add_shared(parser, "--run", "--data", "--other-data", "--base")
    parser.add_argument("--split", type=Literal["val", "test"], default="test", help="which targets")
    parser.add_argument(
        "--k",
        type=int,
        default=1,
        help="targets per prompt; 0: whole histories. Streaming prompts are many times faster, and a model of several layers "
        "that was trained with them may score better with them",
    )
    parser.add_argument(
        "--strict-time",
        action="store_true",
        help="leave out of every target's context what shares its time stamp: labels that were not known yet",
    )
    add_shared(parser, "--calibration", "--device", "--precision")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the metrics to this file")
    add_shared(parser, "--progress")
    return parser


def run(options: Namespace) -> None:
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
            options.precision,
            options.calibration,
            options.strict_time,
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
            _say_precision(result)
            if options.strict_time:
                print(
                    "strict time is the model's alone: baselines count what shares a target's time stamp",
                    file=sys.stderr,
                )
    sys.stdout.flush()
    broken = getattr(sys.stdout, "error", None)  # of dti_model.output
    if broken is not None and options.json is None:
        raise OSError(f"the metrics cannot be printed ({broken.strerror})")


def _say_precision(result: Mapping[str, Any]) -> None:
    """Figures of a run's own metrics.json are in the precision of its training."""
    scored, trained = result["precision"], result["provenance"]["precision"]
    if trained not in (None, scored):
        text = f"scored in {WORDS[scored]}; the run was trained, and scored at its end, in {WORDS[trained]} (--precision {trained})"
        print(text, file=sys.stderr)


def _take(path: Path, stack: ExitStack) -> None:
    """Hold the file of metrics against other processes until `stack` ends."""
    check_destination(path)
    stack.enter_context(locked_beside(path, WRITTEN_BY))


def check_destination(path: Path) -> None:
    """Before hours of scoring: a file of metrics can be written here, and what is there is one of an earlier call, or nothing.

    Raises:
        ValueError: something else is there, or belongs there, or nothing can be written there.
    """
    why: str | None
    if path.is_symlink() and not path.exists():
        why = "is a symbolic link to nothing, or to itself: name another, or delete it"
    elif not path.parent.is_dir():
        why = f"cannot be made: there is no folder {path.parent}"
    elif path.exists() and not _is_of_evaluate(
        path
    ):  # its own name: that of a pipe's descriptor leads to none
        kind = "" if path.is_file() else " (it is no regular file)"
        why = f"exists and is not a file that `dti evaluate` wrote{kind}: name another, or delete it"
    else:
        why = why_owned(path)
    if why is None:
        try:
            with temporary_folder(
                Path(os.path.realpath(path))
            ):  # its name is as long as the temporary file's
                return
        except OSError as error:
            why = f"cannot be written ({error.strerror or error}): name another"
    raise ValueError(f"--json {path} {why}") from None


def _is_of_evaluate(path: Path) -> bool:
    try:
        return path.is_file() and read_sealed(path, "").get("written_by") == WRITTEN_BY
    except (DamagedFileError, OSError):
        return False
