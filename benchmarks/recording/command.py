"""Options and exit statuses of a benchmark's command.

Rows go, for every benchmark, to a scratch folder that git ignores, and with `--record` to results/ as well.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.recording.rows import RESULTS, SCRATCH, RowFiles

# Exit statuses besides 0 and 1: `benchmarks.gpu_suite` reads from them how a step ended.
# The machine cannot do it; automake's tests return this where they cannot run.
SKIPPED = 77
# Something was left out for want of time; the rows of the rest are there. "Try again", in sysexits.h.
INCOMPLETE = 75
# A result is not as it should be, and what comes after it still makes sense: a person must look.
DOUBTFUL = 76
STATUSES = {0: "ok", SKIPPED: "skipped", INCOMPLETE: "incomplete", DOUBTFUL: "doubtful"}


def make_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser whose help begins with a module's docstring, line by line."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def parse_measuring(
    parser: argparse.ArgumentParser, name: str, smoke: Mapping[str, Any] | None = None
) -> argparse.Namespace:
    """Arguments of a benchmark that writes rows: the parser's own, `--out`, `--record`, and `--size` where there is a smoke size.

    Args:
        parser: of everything else.
        name: of the file of rows; `{device}` stands for that option's value.
        smoke: defaults of the smoke size: seconds instead of minutes. It shows that everything runs, and no speed, so it is never
            recorded.

    Returns:
        The options; `rows` is the `RowFiles` to append to.
    """
    parser.add_argument("--out", type=Path, help=f"file of rows; default: {SCRATCH / name}.jsonl")
    add_record(parser)
    folder = SCRATCH
    if smoke is not None:
        parser.add_argument(
            "--size", choices=("full", "smoke"), default="full", help="smoke: does it run? No timing claim"
        )
        if parser.parse_known_args()[0].size == "smoke":
            parser.set_defaults(**smoke)
            folder = SCRATCH / "smoke"
    options = parser.parse_args()
    if folder != SCRATCH:
        refuse_record(parser, options)
    file = name.format_map(vars(options)) + ".jsonl"
    options.rows = RowFiles((options.out or folder / file, *([RESULTS / file] if options.record else [])))
    return options


def add_record(parser: argparse.ArgumentParser) -> None:
    """The option without which no benchmark changes benchmarks/results/."""
    parser.add_argument(
        "--record",
        action="store_true",
        help="also put the rows into benchmarks/results/, which is tracked and which README.md is made from",
    )


def refuse_record(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End with an error where a smoke run shall be recorded."""
    if options.record:
        parser.error("--record keeps measurements, and --size smoke makes none: leave one of them out")
