"""`dti score`: click probabilities of a file of candidates."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

from jsonargparse import Namespace

from dti_model.cli.options import add_shared
from dti_model.cli.parser import Parser
from dti_model.precision import notice
from dti_model.shown import one_line

_FORMAT = """Score candidates of users, a request per line (JSON lines, or Parquet with the same columns):

  {"user": "5", "candidates": ["50", "172"]}
  {"history": [["50", 1], ["172", 0]], "candidates": ["181", {"title": "Brazil (1985)", "genres": ["Sci-Fi"]}]}
  {"user": "5", "context": {"timestamp": 893286638}, "candidates": ["50"], "profile": {"gender": "F", "age": "25-34"}}

A user without a history has the one of the prepared data, and one without a profile has the profile there. Context and profile have
the fields that the data was prepared with (--context-text, --user-text). An item is an id of the prepared data, the fields that its
item texts are made of, or its finished text, {"text": "..."}; a label is 1 (or true) for a click and 0 (or false) for none, oldest
interaction first. In Parquet, history is a list of structs (item, label, and context where there is one).

The output has a record per line, in their order: {"line": 1, "user": "5", "probabilities": [0.71, 0.42]}.
The same command resumes a job that was killed."""


def make_parser() -> Parser:
    """Options of the job."""
    parser = Parser(description=_FORMAT)
    add_shared(parser, "--run")
    for name, text in (("--input", "requests"), ("--output", "file to make")):
        parser.add_argument(
            name, type=Path, required=True, metavar="FILE", help=f"{text}, .jsonl or .parquet"
        )
    add_shared(parser, "--data", "--other-data", "--base", "--device", "--precision")
    parser.add_argument(
        "--bad-lines",
        type=Literal["stop", "skip"],
        default="stop",
        help="stop at a line that cannot be scored, or write its error in place of probabilities",
    )
    parser.add_argument("--token-budget", type=int, default=16384, help="tokens of a pass through the model")
    parser.add_argument(
        "--graphs",
        type=bool,
        default=True,
        help="on a GPU, replay passes as CUDA graphs; no effect elsewhere",
    )
    add_shared(parser, "--calibration", "--progress")
    return parser


def run(options: Namespace) -> None:
    """Score the file and print how many lines could be."""
    from dti_model.scorer import Scorer, score_file

    scorer = Scorer.from_run(
        options.run,
        options.data,
        options.device,
        options.token_budget,
        options.other_data,
        options.base,
        options.precision,
        options.graphs,
        options.calibration,
    )
    line = notice(options.precision, scorer.click_model.model.device, "--precision")
    if line is not None:
        print(line, file=sys.stderr)
    skip_bad_lines = options.bad_lines == "skip"
    done = score_file(scorer, options.input, options.output, skip_bad_lines, options.progress)
    resumed = f", {done.resumed:,} of them before this call" if done.resumed else ""
    print(f"{one_line(options.output)}: {done.lines - done.bad:,} of {done.lines:,} lines scored{resumed}")
    if done.bad:
        print(f"{done.bad:,} bad lines:", *map(one_line, done.first_bad), sep="\n  ", file=sys.stderr)
        if done.bad > len(done.first_bad):
            print("  ... (all of them stand in the output)", file=sys.stderr)
