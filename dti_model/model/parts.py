"""What a decoder layer computes around its attention, as PyTorch's operators or compiled.

Norms, rotary positions and SwiGLU are passes over memory, each of which reads and writes tensors as large as the hidden states. torch.compile
makes one pass of several, forward and backward. That takes half a minute where a model's sizes are new to a machine, and some seconds where
PyTorch's cache knows them, so it is for runs of more than a few minutes: see `optim.compile`. Attention stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dti_model.model.norms import added_and_normed, normed
from dti_model.model.rotation import rotate


class Parts(NamedTuple):
    """Functions of a layer.

    Attributes:
        normed: see `norms.py`; so is added_and_normed.
        rotate: see `rotation.py`.
        mixed: what an MLP makes of normed rows.
    """

    normed: Callable[[nn.Module, Tensor], Tensor]
    added_and_normed: Callable[[Tensor, Tensor, nn.Module], tuple[Tensor, Tensor]]
    rotate: Callable[[Tensor, Tensor, Tensor], Tensor]
    mixed: Callable[[nn.Module, Tensor], Tensor]


def _mixed(mlp: nn.Module, rows: Tensor) -> Tensor:
    result: Tensor = mlp(rows)
    return result


EAGER = Parts(normed, added_and_normed, rotate, _mixed)


@cache
def compiled_parts(device: torch.device) -> Parts:
    """The parts by torch.compile, for any number of rows; compiled when they are first called, and kept by PyTorch in its own cache.

    Results differ from those of `EAGER` by rounding, and are the same from run to run.

    Raises:
        ValueError: PyTorch cannot compile on this machine, as without a C++ compiler.
    """
    try:
        torch.compile(_probe)(torch.zeros(16, device=device))
    except Exception as error:  # of Dynamo, Inductor or the compiler
        reason = " ".join(str(error).partition("\n\n")[0].split()) or type(error).__name__
        raise ValueError(
            f"optim.compile: torch.compile does not work on this machine ({reason[:200]}). For CPUs it needs a C++ compiler: install "
            "g++, or name one in CXX; or leave optim.compile out"
        ) from error
    return Parts._make(torch.compile(part, dynamic=True) for part in EAGER)


def _probe(x: Tensor) -> Tensor:
    return x + 1
