"""`dti export`: a trained run as a plain model folder."""

from __future__ import annotations

from jsonargparse import Namespace

from dti_model.cli.options import add_shared
from dti_model.cli.parser import Parser
from dti_model.shown import one_line


def make_parser() -> Parser:
    """The run and the folder."""
    parser = Parser(
        description="Write a trained run as a plain model folder, its adapter merged. Scorer.from_export reads it without prepared data; "
        "AutoModelForCausalLM loads it, and computes the same probabilities in mode dti-minus only (dti.json and README.md say which)."
    )
    add_shared(parser, "--run", "--out", "--base")
    parser.add_argument(
        "--library-only",
        action="store_true",
        help="make it although plain transformers would compute other probabilities: only Scorer.from_export reads it right",
    )
    return parser


def run(options: Namespace) -> None:
    """Export the run and print what reads it."""
    from dti_model.model import export_run

    made = export_run(options.run, options.out, options.library_only, options.base)
    if made.plain_transformers:
        reader = "Plain transformers (AutoModelForCausalLM) and Scorer.from_export compute its probabilities"
    else:
        reader = (
            "Scorer.from_export computes its probabilities. Plain transformers load it and give wrong ones"
        )
    print(f"{one_line(options.out)}: {reader}; its README.md says how")
