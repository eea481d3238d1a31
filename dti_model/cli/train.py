"""`dti train`: a model into a run folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from dti_model.cli.options import add_settings, settings_of
from dti_model.cli.parser import Parser
from dti_model.config import TrainConfig

# Settings that a run takes from the one that it goes on from, unless they are given: what the network is, and its prompts.
_INHERITED = ("model", "dti", "k", "window", "max_item_tokens")


class _TrainParser(Parser):
    """With `--init RUN`, the defaults of some settings are that run's."""

    def parse_args(self, args: Sequence[str], **kwargs: Any) -> Namespace:  # type: ignore[override]
        parsed = super().parse_args(args, **kwargs)
        init = parsed.get("init")
        if init is None:
            return parsed
        self.set_defaults(_settings_of_run(Path(init)))
        return super().parse_args(args, **kwargs)


def _settings_of_run(folder: Path) -> dict[str, Any]:
    """By dotted names."""

    def flat(value: Any, name: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            return {name: value}
        return {key: x for part, inner in value.items() for key, x in flat(inner, f"{name}.{part}").items()}

    plain = asdict(TrainConfig.load(folder))
    return {key: x for name in _INHERITED for key, x in flat(plain[name], name).items()}


def make_parser() -> Parser:
    """An option for each setting of a run."""
    parser = _TrainParser(
        description="Train a click model with streaming prompts. The same command resumes a run that was interrupted. With --init it goes "
        "on from another run's weights, on targets that are new, and the defaults of the model, dti, k, window and max-item-tokens are that run's."
    )
    add_settings(parser)
    return parser


def run(options: Namespace) -> None:
    """Train, score and report."""
    from dti_model.training import train

    train(settings_of(options))
