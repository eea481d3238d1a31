"""The torch device that a user names."""

from __future__ import annotations

import torch


def device_named(name: str | None) -> str:
    """A device that can be computed on.

    Args:
        name: as PyTorch writes it; None: cuda where there is one.

    Raises:
        ValueError: there is no such device.
    """
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name).cpu()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"device {name!r} cannot be used ({reason:.200}): name another, such as cpu, or leave it out"
        ) from error
    return name
