"""`dti train`: a model into a run folder."""

from __future__ import annotations

from jsonargparse import Namespace

from dti_model.cli.options import SettingsParser, add_settings, settings_of
from dti_model.cli.parser import Parser


def make_parser() -> Parser:
    """An option for each setting of a run."""
    parser = SettingsParser(
        description="Train a click model with streaming prompts. The same command resumes a run that was interrupted. With --init it goes "
        "on from another run's weights, on targets that are new, and the defaults of the model, dti, k, window and max-item-tokens are that run's."
    )
    add_settings(parser)
    return parser


def run(options: Namespace) -> None:
    """Train, score and report."""
    from dti_model.training import train

    train(settings_of(options))
