"""Steps of the GPU suite that take a moment: a few lines of Python each, which import nothing heavy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.steps import Places, Step
from benchmarks.gpu_suite import Call

MakeStep = Callable[..., Step]


def step_maker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeStep:
    """Makes a step of a few lines of Python, as a module in a folder that PYTHONPATH has already."""
    modules = tmp_path / "modules"
    modules.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(modules))

    def make(
        name: str, code: str, *arguments: str, limit: float = 100, least: float = 0, **more: Any
    ) -> Step:
        (modules / f"step_{name}.py").write_text(code)
        return Step(name, f"step_{name}", arguments, limit, "a test", least=least, **more)

    return make


def call(tmp_path: Path, deadline_s: float = 300, **more: Any) -> Call:
    return Call(Places(tmp_path / "out"), {"k": "50"}, deadline_s, **more)


def statuses(entries: list[dict[str, Any]]) -> dict[str, str]:
    return {entry["step"]: entry["status"] for entry in entries}
