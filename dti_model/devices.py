"""Devices that a user names."""

from __future__ import annotations

import torch


def check_device(device: str | None) -> None:
    """Try a torch device before anything is loaded; None, the default one, passes.

    Raises:
        ValueError: there is no such device here.
    """
    if device is None:
        return
    try:
        torch.empty(0, device=device)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"device {device!r} cannot be used here ({reason:.200}): name another, such as cpu"
        ) from None
