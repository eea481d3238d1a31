"""A copy of the checkout with an environment of its own, in which commands run as a reader pastes them into bash."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

from tests.conftest import ROOT

# Folders that git ignores, or that are not the project's: nothing of it is needed to run a command.
_LEFT_OUT = {"data", "runs", "models", "build", "dist"}
_KEPT = {".ci", ".gitignore"}
_SCRIPT = "#!{python}\nimport sys\nfrom {module} import {function}\nsys.exit({function}())\n"


def copy_checkout(folder: Path) -> Path:
    """Copy the tracked files, and make `.venv` with this process's packages, `dti` of the copy and `torchrun`.

    The environment is a real one, with the `activate` that Python writes; `make` takes it for installed.

    Args:
        folder: to make.

    Returns:
        The folder.
    """
    shutil.copytree(ROOT, folder, ignore=_ignored)
    environment = folder / ".venv"
    venv.create(environment, symlinks=True)
    (packages,) = environment.glob("lib/python*/site-packages")
    others = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (packages / "checkout.pth").write_text("\n".join([str(folder), *others]) + "\n")
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    torchrun = importlib.metadata.entry_points(group="console_scripts", name="torchrun")
    for name, target in {**project["scripts"], "torchrun": next(iter(torchrun)).value}.items():
        module, function = target.split(":")
        script = environment / "bin" / name
        script.write_text(
            _SCRIPT.format(python=environment / "bin" / "python", module=module, function=function)
        )
        script.chmod(0o755)
    (environment / "installed").touch()
    return folder


def _ignored(folder: str, names: list[str]) -> set[str]:
    if Path(folder) != ROOT:
        return {"__pycache__"}.intersection(names)
    hidden = {name for name in names if name.startswith(".")} - _KEPT
    return hidden | _LEFT_OUT.intersection(names) | {name for name in names if name.endswith(".egg-info")}


def paste(command: str, checkout: Path, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run a command in bash in the checkout, after the README's `source .venv/bin/activate`; single-threaded like the suite."""
    environment = environment_without_make()
    for name in ("PYTHONPATH", "VIRTUAL_ENV"):
        environment.pop(name, None)
    return subprocess.run(
        ["bash", "-c", f"source .venv/bin/activate\n{command}"],
        cwd=checkout,
        env={**environment, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def environment_without_make() -> dict[str, str]:
    """This process's, without what a `make` above it hands down: `make test-floors` names another environment and other versions."""
    ours = re.findall(r"^(\w+) \?=", (ROOT / "Makefile").read_text(), re.MULTILINE)
    handed_down = {*ours, "PIP", "MAKEFLAGS", "MFLAGS", "MAKEOVERRIDES", "MAKELEVEL"}
    return {name: value for name, value in os.environ.items() if name not in handed_down}


def file_hashes(checkout: Path) -> dict[str, str]:
    """sha256 of every file that is not in a folder that git ignores, by its name in the checkout."""
    found = {}
    for path in sorted(checkout.rglob("*")):
        name = path.relative_to(checkout)
        first = name.parts[0]
        hidden = first.startswith(".") and first not in _KEPT
        ignored = hidden or first in _LEFT_OUT or "__pycache__" in name.parts
        if path.is_file() and not ignored:
            found[str(name)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found
