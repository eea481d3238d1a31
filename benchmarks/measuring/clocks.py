"""Clocks and power of the card while a benchmark runs: a row without them cannot be compared with another card's.

NVIDIA's come from pynvml where it is installed and from nvidia-smi elsewhere, AMD's from amd-smi or rocm-smi. Without any of
them, every figure is None: no benchmark needs them.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from functools import cache
from typing import Any

import torch

FIELDS = ("sm_mhz", "memory_mhz", "watts")
_SECONDS = 5.0  # a query that hangs must not hold a benchmark up
_NVIDIA = ("nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,power.draw", "--format=csv,noheader,nounits")
_AMD = ("amd-smi", "metric", "--gpu", "0", "--clock", "--power", "--json")
_ROCM = ("rocm-smi", "--device", "0", "--showclocks", "--showpower", "--json")
_NUMBER = re.compile(r"\d+(?:\.\d+)?")


def card_state() -> dict[str, float | None]:
    """`sm_mhz`, `memory_mhz` and `watts` of the first card now; None where nobody tells."""
    for source in (_pynvml, _nvidia_smi, _amd_smi, _rocm_smi):
        try:
            values = source()
        except Exception:  # libraries without a driver and tools of another version fail in their own ways
            continue
        if values is not None:
            return dict(zip(FIELDS, values))
    return dict.fromkeys(FIELDS)


Values = tuple[float | None, float | None, float | None]


@cache
def _nvml() -> tuple[Any, Any]:
    import pynvml

    pynvml.nvmlInit()
    uuid = getattr(torch.cuda.get_device_properties(0), "uuid", None)
    if uuid is not None:
        return pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    return pynvml, pynvml.nvmlDeviceGetHandleByIndex(0)


def _pynvml() -> Values | None:
    if torch.version.hip:
        return None
    pynvml, handle = _nvml()
    return (
        float(pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)),
        float(pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM)),
        pynvml.nvmlDeviceGetPowerUsage(handle) / 1000,
    )


def _nvidia_smi() -> Values | None:
    uuid = getattr(torch.cuda.get_device_properties(0), "uuid", None)
    output = _output((*_NVIDIA, *(() if uuid is None else (f"--id=GPU-{uuid}",))))
    if not output:
        return None
    sm, memory, watts = (_number(cell) for cell in output.splitlines()[0].split(","))
    return sm, memory, watts


def _amd_smi() -> Values | None:
    return _of_json(_AMD, r"gfx_0\.clk\.value$", r"mem_0\.clk\.value$", r"socket_power\.value$")


def _rocm_smi() -> Values | None:
    return _of_json(_ROCM, r"sclk clock speed", r"mclk clock speed", r"power \(w\)")


def _of_json(command: tuple[str, ...], sm: str, memory: str, watts: str) -> Values | None:
    """The first value at a path that matches each pattern, of a tool that prints JSON."""
    output = _output(command)
    if not output:
        return None
    found = dict(_leaves(json.loads(output)))
    return _first(found, sm), _first(found, memory), _first(found, watts)


def _output(command: tuple[str, ...]) -> str | None:
    """The output of a tool; None where it is not installed or fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
    return done.stdout.strip() if done.returncode == 0 else None


def _leaves(tree: Any, path: str = "") -> list[tuple[str, Any]]:
    """Dotted paths, in lower case, and values of nested lists and dictionaries: versions of a tool nest differently."""
    if isinstance(tree, dict):
        return [leaf for key, value in tree.items() for leaf in _leaves(value, f"{path}.{key}".lower())]
    if isinstance(tree, list):
        return [leaf for value in tree for leaf in _leaves(value, path)]
    return [(path, tree)]


def _first(leaves: dict[str, Any], pattern: str) -> float | None:
    return next((_number(str(value)) for path, value in leaves.items() if re.search(pattern, path)), None)


def _number(text: str) -> float | None:
    match = _NUMBER.search(text)
    return None if match is None else float(match[0])
