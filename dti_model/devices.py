"""The torch device that a user names, and the precision that it computes in."""

from __future__ import annotations

import sys
from functools import cache

import torch

from dti_model.error_lines import reason_of
from dti_model.launch import num_processes
from dti_model.precision import Precision, Resolved, notice, resolve
from dti_model.ranks import gather_from_ranks, join_ranks, rank


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


def precision_of_ranks(
    precision: Precision, device: torch.device | str, option: str, began: Resolved | None = None
) -> Resolved:
    """What this process and all others compute in. Every rank has to get here.

    Args:
        precision: as the user gave it.
        device: of this process.
        option: that sets it, such as "--optim.precision".
        began: what a run began in, which `auto` then keeps.

    Raises:
        ValueError: `auto` means one thing on some of the machines and another on others; on every rank.
    """
    resolved = resolve(precision, device) if began is None or precision != "auto" else began
    answers = gather_from_ranks(resolved)
    if len(set(answers)) > 1:
        having, lacking = ([i for i, x in enumerate(answers) if x == each] for each in ("bf16", "fp32"))
        raise ValueError(
            f"{option} auto is bfloat16 on {_ranks(having)} and float32 on {_ranks(lacking)}, whose hardware does not multiply bfloat16: "
            f"say {option} fp32, or bf16, which is slow there"
        )
    return resolved


def say_precision(
    precision: Precision, device: torch.device | str, option: str, began: Resolved | None = None
) -> None:
    """Rank 0 says on stderr what `auto` means; arguments as of `precision_of_ranks`. Not before what a user may get wrong has been checked."""
    line = notice(precision, device, option, began)
    if line is not None and rank() == 0:
        say_once(line)


def _ranks(numbers: list[int]) -> str:
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


@cache
def say_once(line: str) -> None:
    """Print a line on stderr, once in a process: a search trains many models."""
    print(line, file=sys.stderr, flush=True)
