"""What a decoder layer computes around its attention, as PyTorch's operators or compiled.

Norms, rotary positions and SwiGLU are passes over memory, each of which reads and writes tensors as large as the hidden states. torch.compile
makes one pass of several, forward and backward. That takes half a minute where a model's sizes are new to a machine, and some seconds where
PyTorch's cache knows them, so it is for runs of more than a few minutes: see `optim.compile`. Attention stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dti_model.model.norms import added_and_normed, has_hooks, normed
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

# Variants of a part in one process: a width or a precision that is new makes one, and so do few other things. Beyond PyTorch's limit of 8 a part
# would be computed as it is, and results would depend on what the process has computed before.
_MOST_VARIANTS = 256


@cache
def compiled_parts(device: torch.device) -> Parts:
    """The parts by torch.compile, for batches of any size; compiled when they are first called, and kept by PyTorch in its own cache.

    Results differ from those of `EAGER` by rounding, and are the same from run to run. Modules with hooks are computed as `EAGER` does. The
    process's limit of variants per compiled function (`torch._dynamo.config`) is raised.

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
    dynamo: Any = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, _MOST_VARIANTS)
    dynamo.accumulated_recompile_limit = max(dynamo.accumulated_recompile_limit, 4 * _MOST_VARIANTS)
    return Parts._make(_compiled(part) for part in EAGER)


def _compiled(part: Callable[..., Any]) -> Callable[..., Any]:
    # LoRA's dropout draws what it draws without compiling.
    fast = torch.compile(part, dynamic=True, options={"fallback_random": True})

    def compute(*arguments: Any) -> Any:
        # PyTorch does not look whether a module has got hooks since it was compiled.
        heard = any(isinstance(x, nn.Module) and has_hooks(x) for x in arguments)
        return (part if heard else fast)(*arguments)

    return compute


def _probe(x: Tensor) -> Tensor:
    return x + 1
