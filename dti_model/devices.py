"""The torch device that a user names."""

from __future__ import annotations

import torch

from dti_model.error_lines import reason_of
from dti_model.launch import num_processes
from dti_model.ranks import join_ranks


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
        raise ValueError(
            f"device {name!r} cannot be used ({reason_of(error):.200}): name another, such as cpu, or leave it out"
        ) from error
    return name


def device_of_rank(name: str | None) -> str:
    """The device of this process, which joins the other ones that a launcher started, where there are any.

    Args:
        name: as `device_named` has it; where there are several processes its type alone, since each has a device of its own.

    Raises:
        ValueError: there is no such device, or there are several processes and it is no type of theirs; the environment does not say
            well which processes there are.
    """
    processes = num_processes()
    if processes < 2:
        return device_named(name)
    kind, _, index = (name or device_named(None)).partition(":")
    if index:
        raise ValueError(
            f"device {name!r} is one device, and each of {processes} processes has its own: say {kind}, or leave it out"
        )
    joined = join_ranks(cpu=kind == "cpu")
    if joined.type != kind:
        raise ValueError(
            f"device {name!r} cannot be used: the {processes} processes have {joined.type}. Say that, or leave it out"
        )
    return str(joined)
