"""Arrows between packages point one way: dti_kernels <- dti_model <- benchmarks. And triton stays out of a CPU import."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest

from tests.conftest import ROOT

ALLOWED = {
    "dti_kernels": {"dti_kernels"},
    "dti_model": {"dti_model", "dti_kernels"},
    "benchmarks": {"benchmarks", "dti_model", "dti_kernels"},
}
OURS = {"dti_kernels", "dti_model", "benchmarks", "tests"}


def imported_modules(source: str) -> set[str]:
    modules: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            modules.add(node.module)
    return modules


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_follow_the_arrows(package: str) -> None:
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for file in files:
        for module in imported_modules(file.read_text()):
            top = module.split(".")[0]
            assert top not in OURS or top in ALLOWED[package], f"{file.relative_to(ROOT)} imports {module}"
            if package == "dti_model" and top == "dti_kernels":
                assert module == "dti_kernels", (
                    f"{file.relative_to(ROOT)} imports {module}, not a public name"
                )


def test_the_operator_imports_and_runs_without_triton() -> None:
    """Neither importing nor running on CPU tensors loads triton; a broken or missing triton does no harm."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from dti_kernels import StreamLayout, windowed_attn\n"
        "layout = StreamLayout.build([[2, 1]], [[1, 0]], [1], window=1)\n"
        "x = torch.randn(layout.num_rows, 2, 16, requires_grad=True)\n"
        "windowed_attn(x, x, x, layout).sum().backward()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=_without_interpreter())


def _without_interpreter() -> dict[str, str]:
    import os

    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
