"""The device of a GPU benchmark: versions, card, clocks, and whether a cache of compiled kernels that was carried here will be used.

    python -m benchmarks.gpu.device [--out ROWS.jsonl]
    python -m benchmarks.gpu.device --stamp          note in Triton's cache what it was made with

Triton finds a compiled kernel again where its own files, the kernel's source and the path of that source are the same, byte for byte.
So a cache that was filled on one machine serves another one, and `--stamp` writes down there what must be equal.

Triton compiles a little C for every kernel that it launches, in a cache or not. So a small extension is built here the way Triton does it:
on a GPU the step fails where that is not possible, because nothing after it would run.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import os
import shutil
import subprocess
import sysconfig
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.measuring import REHEARSING
from benchmarks.recording import ROOT, commit_of, make_parser, parse_measuring, version_of
from dti_kernels.gpu import architecture

STAMP = "made-with.json"
_PACKAGES = ("triton", "transformers", "numpy", "peft", "accelerate", "flash-attn", "nvidia-ml-py", "pyarrow")
_EXTENSION_NAME, _ANSWER = "dti_c_compiler", 42
_EXTENSION = f"""
#include <Python.h>
static PyObject *answer(PyObject *self, PyObject *unused) {{ return PyLong_FromLong({_ANSWER}); }}
static PyMethodDef methods[] = {{{{"answer", answer, METH_NOARGS, ""}}, {{NULL, NULL, 0, NULL}}}};
static struct PyModuleDef module = {{PyModuleDef_HEAD_INIT, "{_EXTENSION_NAME}", NULL, -1, methods}};
PyMODINIT_FUNC PyInit_{_EXTENSION_NAME}(void) {{ return PyModule_Create(&module); }}
"""
# The first program that is there says what the card is doing.
_STATES: tuple[tuple[str, ...], ...] = (
    (
        "nvidia-smi",
        "--query-gpu=name,driver_version,pstate,clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu",
        "--format=csv",
    ),
    ("amd-smi", "metric", "--clock", "--power", "--temperature"),
    ("rocm-smi", "--showclocks", "--showpower", "--showtemp"),
)


def versions() -> dict[str, str | None]:
    """Of everything that a number depends on; None where a package is missing."""
    installed = {package: version_of(package) for package in _PACKAGES}
    return {"cuda": torch.version.cuda, "hip": torch.version.hip, **installed}


def card() -> dict[str, Any]:
    """Name, memory, and whose rows of the tile table it takes.

    Raises:
        SystemExit: there is no GPU.
    """
    if not torch.cuda.is_available() and not REHEARSING:
        raise SystemExit("torch.cuda.is_available() is False: PyTorch sees no GPU")
    properties = torch.cuda.get_device_properties(0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tiles_of = architecture(torch.device("cuda", 0))
    return {
        "card": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "processors": properties.multi_processor_count,
        "tiles_of": tiles_of,
        "warnings": [str(warning.message) for warning in caught],
    }


def state(programs: Sequence[Sequence[str]] = _STATES) -> str:
    """Clocks, power and temperature in the words of the driver's own program; empty where there is none."""
    for program, *arguments in programs:
        if shutil.which(program) is None:
            continue
        try:
            done = subprocess.run(
                [program, *arguments], capture_output=True, text=True, timeout=10, stdin=subprocess.DEVNULL
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"{program}: {error}"
        return f"{done.stdout}{done.stderr}".strip()
    return ""


@functools.cache
def triton_files() -> str | None:
    """Triton's own hash of its files, which is in the key of each compiled kernel; None: there is no Triton, or it has no such thing."""
    for module in ("triton.runtime.cache", "triton.compiler.compiler"):
        try:
            return hashlib.sha256(importlib.import_module(module).triton_key().encode()).hexdigest()[:16]
        except (ImportError, AttributeError):
            continue
    return None


def c_compiler() -> str:
    """ "good", or why Triton cannot compile what launches a kernel: the compiler is $CC, else gcc or clang, with Python's headers."""
    try:
        from triton.runtime.build import compile_module_from_src
    except ImportError as error:
        return f"no Triton: {error}"
    before = os.environ.get("TRITON_CACHE_DIR")
    # An extension that is in Triton's cache already proves no compiler.
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        try:
            answer = compile_module_from_src(_EXTENSION, _EXTENSION_NAME).answer()
        except (OSError, RuntimeError, ImportError, subprocess.CalledProcessError) as error:
            return _why_no_extension(error)
        finally:
            if before is None:
                del os.environ["TRITON_CACHE_DIR"]
            else:
                os.environ["TRITON_CACHE_DIR"] = before
    return "good" if answer == _ANSWER else f"the extension says {answer}"


def _why_no_extension(error: Exception) -> str:
    name = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if name is None or shutil.which(name) is None:
        return f"no C compiler: {'no gcc and no clang here' if name is None else f'CC={name} is not there'}"
    folder = Path(sysconfig.get_paths()["include"])
    if not (folder / "Python.h").is_file():
        return f"no Python.h in {folder}: install Python's headers"
    return f"{name} failed: {type(error).__name__}: {error}"[:300]


def cxx_compiler() -> str | None:
    """The compiler of inductor's code for a CPU; None: there is none, which kernels do without."""
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")


def sources() -> str:
    """Hash of the project's code, for a machine without git."""
    digest = hashlib.sha256()
    for file in sorted(
        file for folder in ("dti_kernels", "dti_model") for file in ROOT.glob(f"{folder}/**/*.py")
    ):
        digest.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def cache_folder() -> Path:
    """Triton's."""
    return Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")


def made_with() -> dict[str, str | None]:
    """Facts that must be equal for a cache to serve."""
    return {"triton_files": triton_files(), "checkout": str(ROOT), "sources": sources()}


def cache_state(folder: Path) -> str:
    """In words: whether the kernels in a cache folder are found again here."""
    num_entries = sum(entry.is_dir() for entry in folder.iterdir()) if folder.is_dir() else 0
    if not num_entries:
        return "empty"
    stamp = folder / STAMP
    if not stamp.is_file():
        return f"{num_entries} entries, no stamp"
    before, now = json.loads(stamp.read_text()), made_with()
    different = [name for name, value in now.items() if before.get(name) != value]
    return f"{num_entries} entries, " + (f"other {', '.join(different)}" if different else "good")


def main() -> None:
    """Print and keep the row, or write the stamp.

    Raises:
        SystemExit: there is no GPU, or no C compiler to launch kernels on it.
    """
    parser = make_parser(__doc__)
    parser.add_argument(
        "--stamp", action="store_true", help="write what Triton's cache was made with into it"
    )
    options = parse_measuring(parser, "device")
    if options.stamp:
        (cache_folder() / STAMP).write_text(json.dumps(made_with(), indent=1) + "\n")
        return
    now = state()
    row = {
        "benchmark": "device",
        "commit": commit_of(ROOT),
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() or REHEARSING else None,
        **card(),
        **versions(),
        "sources": sources(),
        "triton_files": triton_files(),
        "c_compiler": c_compiler(),
        "cxx_compiler": cxx_compiler(),
        "cache": cache_state(cache_folder()),
        "state": now[:2000],
    }
    for name, value in row.items():
        print(f"{name:14} {value}")
    options.rows.append([row])
    if row["c_compiler"] != "good" and not REHEARSING:
        raise SystemExit(f"RuntimeError: no kernel can be launched: {row['c_compiler']}")


if __name__ == "__main__":
    main()
