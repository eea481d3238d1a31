"""The precisions that CPUs are measured in (`dti_model.precision`), and the one that a row was measured in."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Mapping
from typing import Any

import torch

from dti_model.precision import Resolved, has_bfloat16

# In the order in which tables show them: what is compared with comes first.
PRECISIONS: tuple[Resolved, ...] = ("fp32", "bf16")
DTYPES: dict[Resolved, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


def precisions_here() -> tuple[Resolved, ...]:
    """Those of `PRECISIONS` that this processor has instructions for; emulated, bfloat16 is slow and says nothing."""
    return PRECISIONS if has_bfloat16("cpu") else PRECISIONS[:1]


def add_precision(parser: ArgumentParser) -> None:
    """The option that says which of them take turns on a CPU."""
    parser.add_argument(
        "--precision",
        nargs="+",
        choices=PRECISIONS,
        default=precisions_here(),
        help="on a CPU; default: fp32, and bf16 where the processor has instructions for it",
    )


def precision_of(row: Mapping[str, Any]) -> str:
    """Of a row; those without one are older, and of float32."""
    return str(row.get("precision", PRECISIONS[0]))
