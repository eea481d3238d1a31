"""The tree shows how the project is built: arrows between rooms point one way, a folder's face is its only door, and nothing is too
long to read. A room is a folder, or a file beside folders."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.conftest import ROOT

PACKAGES = ("dti_kernels", "dti_model", "benchmarks")
SOURCES = sorted(path for package in (*PACKAGES, "tests", ".ci") for path in (ROOT / package).rglob("*.py"))
MOST_LINES, MOST_LINES_OF_FUNCTION = 400, 60

# The floors of each package, from the ground up: a room imports rooms of lower floors, and nothing else of its package. Rooms of the
# ground floor may import each other: that floor is many small files and two folders.
FLOORS: dict[str, tuple[set[str], ...]] = {
    "dti_model": (
        {
            *("config", "devices", "downloads", "error_lines", "files", "launch", "output", "process"),
            *("precision", "ranks", "shown"),
        },
        {"data"},
        {"prompts"},
        {"model"},
        {"evaluation", "scorer"},
        {"training"},
        {"cli"},
        {"__main__"},
    ),
    "benchmarks": (
        {"recording", "cards", "shapes"},
        {"measuring", "synthetic"},
        {"attention"},
        {"quality", "report", "scoring", "gpu"},
        {
            *(
                "bench_attention",
                "bench_days",
                "bench_quality",
                "bench_score",
                "bench_train",
                "bench_train_gpu",
            ),
            *("compile_report", "gpu_suite", "leak_meter", "simulate", "tune_tiles"),
        },
    ),
}
# Packages that each package imports. dti_model knows the operator by its face; benchmarks may ask its modules at the root.
OTHERS = {"dti_kernels": set(), "dti_model": {"dti_kernels"}, "benchmarks": {"dti_kernels", "dti_model"}}
# The operator's root is what it computes; its implementations know the root and never each other.
IMPLEMENTATIONS = ("dti_kernels.cpu", "dti_kernels.gpu")


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in SOURCES if path.relative_to(ROOT).parts[0] in PACKAGES}
FOLDERS = {name for name, path in MODULES.items() if path.name == "__init__.py"}


@cache
def imports_of(module: str) -> frozenset[str]:
    """Modules of ours that a module imports, anywhere in it: an import in a function is an arrow too."""
    return frozenset(imported(MODULES[module].read_text()))


def imported(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            names = [_source(str(node.module), alias.name) for alias in node.names]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] in (*PACKAGES, "tests"))


def _source(package: str, name: str) -> str:
    """The module that `from package import name` reads: a submodule, unless the face binds a name like it."""
    submodule = f"{package}.{name}"
    return submodule if submodule in MODULES and name not in names_of_face(package) else package


@cache
def names_of_face(folder: str) -> frozenset[str]:
    """Names that a folder's `__init__` imports."""
    body = ast.parse(MODULES[folder].read_text()).body if folder in FOLDERS else []
    imports = (node for node in body if isinstance(node, ast.ImportFrom))
    return frozenset(alias.asname or alias.name for node in imports for alias in node.names)


def room_of(module: str) -> str:
    """`dti_model.data.store` is of the room `data`; a package's own `__init__` of none."""
    return ".".join(module.split(".")[1:2])


def floor_of(package: str, room: str) -> int:
    return next(i for i, rooms in enumerate(FLOORS[package]) if room in rooms)


@pytest.mark.parametrize("module", MODULES)
def test_arrows_point_down(module: str) -> None:
    package, room = module.split(".")[0], room_of(module)
    for other in imports_of(module):
        its_package, its_room = other.split(".")[0], room_of(other)
        if its_package != package:
            assert its_package in OTHERS[package], f"{module} imports {other}"
            if package == "dti_model":
                assert other == "dti_kernels", f"{module} imports {other}: no public name"
        elif package in FLOORS and room and its_room and room != its_room:
            floor, its_floor = floor_of(package, room), floor_of(package, its_room)
            assert its_floor < floor or its_floor == floor == 0, f"{module} imports {other}: an arrow up"
        for one, another in (IMPLEMENTATIONS, IMPLEMENTATIONS[::-1]):
            assert not (module.startswith(one) and other.startswith(another)), f"{module} imports {other}"


@pytest.mark.parametrize("package", FLOORS)
def test_every_room_has_a_floor(package: str) -> None:
    rooms = {room_of(module) for module in MODULES if module.startswith(f"{package}.")}
    assert rooms == set().union(*FLOORS[package])


def circles(arrows: dict[str, frozenset[str]]) -> list[list[str]]:
    """Circles that a walk along the arrows meets; every graph that has one gives one."""
    found, done = [], set()

    def walk(module: str, path: list[str]) -> None:
        if module in path:
            found.append(path[path.index(module) :])
        elif module not in done:
            for other in sorted(arrows[module] & arrows.keys()):
                walk(other, [*path, module])
            done.add(module)

    for module in arrows:
        walk(module, [])
    return found


def test_no_circle_of_files() -> None:
    assert circles({"a": frozenset("b"), "b": frozenset("c"), "c": frozenset("b")}) == [["b", "c"]]
    assert circles({module: imports_of(module) for module in MODULES}) == []


def doors(module: str) -> list[str]:
    """Folders around a module whose face others use, from the outside in; the operator's root and the benchmarks' have modules of
    their own."""
    parts = module.split(".")
    around = [".".join(parts[:i]) for i in range(1, len(parts))]
    return [folder for folder in around if folder in FOLDERS and folder not in PACKAGES]


@pytest.mark.parametrize("module", MODULES)
def test_a_folder_is_entered_by_its_face(module: str) -> None:
    for other in imports_of(module):
        for folder in doors(other):
            assert module.startswith(f"{folder}.") or module == folder, (
                f"{module} imports {other}: outside {folder} its face is enough"
            )


def long_functions(source: str) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno is not None
            lines = node.end_lineno - node.lineno + 1
            is_kernel = any(ast.unparse(each).startswith("triton.jit") for each in node.decorator_list)
            if lines > MOST_LINES_OF_FUNCTION and not is_kernel:
                yield node.name, lines


def test_nothing_is_too_long_to_read() -> None:
    native = [*(ROOT / "dti_kernels").rglob("*.h"), *(ROOT / "dti_kernels").rglob("*.cpp")]
    assert len(native) >= 4
    lengths = {path: len(path.read_text().splitlines()) for path in (*SOURCES, *native)}
    assert {str(path.relative_to(ROOT)): n for path, n in lengths.items() if n > MOST_LINES} == {}
    assert list(long_functions("def f():\n" + "    x = 1\n" * 60)) == [("f", 61)]
    found = {str(path.relative_to(ROOT)): list(long_functions(path.read_text())) for path in SOURCES}
    assert {path: functions for path, functions in found.items() if functions} == {}


def test_benchmarks_need_nothing_of_the_tests() -> None:
    for module in MODULES:
        assert not [other for other in imports_of(module) if other.split(".")[0] == "tests"], module
