"""Installed versions: the floors are those of pyproject.toml, the tested versions are within its bounds, `make` asks the right index."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.checkout import environment_without_make
from tests.conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DECLARED = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["test"]]
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def version(text: str) -> tuple[int, ...]:
    """Numbers of a release; trailing zeros do not count."""
    numbers = [int(part) for part in text.split(".") if part.isdigit()]
    while numbers and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)


def declared() -> dict[str, tuple[str, str | None]]:
    """Floor of every declared dependency, and the version that it has to stay below."""
    found = {}
    for requirement in DECLARED:
        match = re.match(r"([\w-]+)(?:\[\w+\])?>=([\w.]+)(?:,<([\w.]+))?", requirement)
        assert match, f"{requirement} has no floor, so nobody knows which versions work"
        found[match[1].replace("_", "-").lower()] = (match[2], match[3])
    return found


def pinned(file: str) -> dict[str, str]:
    lines = [line for line in (ROOT / file).read_text().splitlines() if not line.startswith("#")]
    for line in lines:
        assert re.fullmatch(r"[\w.-]+==[\w.]+", line), f"{file}: {line} is not NAME==VERSION of any build"
    return {name.replace("_", "-").lower(): pin for name, pin in (line.split("==") for line in lines)}


def test_floors_are_the_declared_ones() -> None:
    """`activation_checkpointing=` was named to a transformers that the floors allow and that does not know it: nobody ran them."""
    pins = pinned("constraints/floors.txt")
    for name, (floor, _) in declared().items():
        assert version(pins[name]) == version(floor), name


def test_tested_versions_are_allowed() -> None:
    pins = pinned("constraints.txt")
    assert "triton" not in pins, "torch's CUDA build asks for one version, so none can be asked for beside it"
    for name, (floor, below) in declared().items():
        if name != "triton":
            assert version(pins[name]) >= version(floor), name
            assert below is None or version(pins[name]) < version(below), name


STUB = """#!{python}
import sys
arguments = sys.argv[1:]
if arguments[0] == "-c":
    sys.version_info = {version}
    exec(arguments[1])
    sys.exit(0)
with open({log!r}, "a") as file:
    print(*arguments, file=file)
sys.exit({status} if "--index-url" in arguments else 0)
"""


def make_install(
    folder: Path, python: tuple[int, ...] = (3, 11, 0), index_status: int = 0, *, nvidia: bool = False
) -> tuple[int, str, list[list[str]]]:
    """Exit status, output and calls of Python of `make install`, with a stub in Python's place."""
    if shutil.which("make") is None:
        pytest.skip("no make here")
    programs, log = folder / "venv" / "bin", folder / "log"
    programs.mkdir(parents=True)
    stub = STUB.format(python=sys.executable, version=python, log=str(log), status=index_status)
    scripts = {"python": stub, **({"nvidia-smi": "#!/bin/sh\necho GPU 0"} if nvidia else {})}
    for name, text in scripts.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    command = ["make", "install", f"VENV={folder / 'venv'}", f"PYTHON={programs / 'python'}"]
    environment = {**environment_without_make(), "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    calls = [line.split() for line in log.read_text().splitlines()] if log.exists() else []
    return done.returncode, done.stdout + done.stderr, calls


def test_without_a_gpu_the_cpu_build_is_asked_for_first(tmp_path: Path) -> None:
    """The "small CPU build" was small only where its wheel lay at hand: the ordinary index has the CUDA build under that version."""
    status, output, (torch, everything) = make_install(tmp_path)
    assert status == 0
    assert torch[torch.index("--index-url") + 1] == CPU_INDEX
    assert torch[-1] == "torch"
    assert "--no-deps" in torch, "its index does not have the other packages in the tested versions"
    assert (torch[torch.index("--retries") + 1], torch[torch.index("--timeout") + 1]) == ("0", "10")
    assert torch[torch.index("--constraint") + 1] == "constraints.txt"
    assert everything[-2:] == ["--editable", ".[test]"]
    assert "--index-url" not in everything
    assert "torch: the CPU build" in output


def test_the_ordinary_index_is_the_way_on(tmp_path: Path) -> None:
    status, output, (torch, everything) = make_install(tmp_path, index_status=1)
    assert status == 0
    assert "--index-url" in torch
    assert everything[-2:] == ["--editable", ".[test]"]
    assert f"torch: {CPU_INDEX} has none or cannot be reached" in output


def test_a_gpu_gets_its_own_build(tmp_path: Path) -> None:
    status, output, (everything,) = make_install(tmp_path, nvidia=True)
    assert status == 0
    assert "--index-url" not in everything
    assert "torch: the build for NVIDIA GPUs" in output


@pytest.mark.parametrize("python", [(3, 10, 9), (3, 11, 0), (3, 13, 1), (3, 14, 0), (3, 15, 0)])
def test_every_python_from_3_11_on_is_taken(python: tuple[int, ...], tmp_path: Path) -> None:
    """3.13 and 3.14 were refused although every dependency has wheels for them."""
    status, output, calls = make_install(tmp_path, python)
    assert (status == 0) == bool(calls) == (python >= (3, 11))
    assert ("Python 3.11 or newer is needed" in output) == (python < (3, 11))
