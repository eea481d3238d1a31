"""The operators on GPUs: Triton kernels, their launches and their tiles. Triton is imported when a name needs it, not before."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dti_kernels.gpu.tiles import (
    KERNELS,
    TABLE,
    Tile,
    architecture,
    choose_tile,
    forced,
    forced_tile,
    table_tile,
)

if TYPE_CHECKING:
    from dti_kernels.gpu.backward import Buffers, backward_launches, run_backward
    from dti_kernels.gpu.forward import forward_launches, run_forward
    from dti_kernels.gpu.launch import Batch, Launch, interpreting
    from dti_kernels.gpu.replay import forget_plans

_WITH_TRITON = {
    **dict.fromkeys(("Batch", "Launch", "interpreting"), "launch"),
    **dict.fromkeys(("Buffers", "backward_launches", "run_backward"), "backward"),
    **dict.fromkeys(("forward_launches", "run_forward"), "forward"),
    "forget_plans": "replay",
}


def __getattr__(name: str) -> Any:
    if name not in _WITH_TRITON:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WITH_TRITON[name]}"), name)
