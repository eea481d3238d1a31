"""`dti search`: settings compared over seeds."""

from __future__ import annotations

from typing import Any

from jsonargparse import Namespace

from dti_model.cli.options import SettingsParser, add_settings, settings_of
from dti_model.cli.parser import Parser


def make_parser() -> Parser:
    """The grid, the seeds, and the settings that all cells share."""
    parser = SettingsParser(
        description="Train every cell of a grid of settings with several seeds and compare them on validation; the test split is not "
        "scored. The same command resumes a search that was interrupted."
    )
    parser.add_argument(
        "--grid",
        type=dict[str, list[Any]],
        required=True,
        sub_configs=True,
        metavar="FILE",
        help="YAML file, or text such as '{optim.learning-rate: [0.001, 0.002], dti.alpha-max: [0, 0.5]}'",
    )
    parser.add_argument("--seeds", type=list[int], default=[0, 1, 2], help="seeds of every cell")
    add_settings(parser, "seed", "score_test")
    return parser


def run(options: Namespace) -> None:
    """Train what is missing of the grid and print the comparison."""
    from dti_model.training import search

    search(settings_of(options, "grid", "seeds"), options.grid, options.seeds)
