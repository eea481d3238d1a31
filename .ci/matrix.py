"""The suites whose numbers or environment a machine decides, under the settings of other machines. Run after `make test`.

    python .ci/matrix.py [ROW ...]        rows whose names contain one of the words; none: all. Ends with a table; a red row is exit status 1

Rows that this machine cannot set (an instruction set it has not, a compiler that is not installed) are skipped and say why.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NATIVE_TESTS = (
    "tests/kernels/test_cpu_native.py",
    "tests/kernels/test_cpu_parity.py",
    "-k",
    "test_parity and native and not variants and not random",
)
PYTORCH_TESTS = ("tests/kernels/test_cpu_parity.py", "-k", "not native")
INTERPRETER_TESTS = (
    "tests/kernels/test_triton_interpreter.py",
    "-k",
    "test_parity and not shapes and not several and not random",
)
THREADED_TESTS = (
    "tests/kernels/test_properties.py",
    "tests/model/test_attention.py",
    "tests/scorer/test_scorer.py",
)
# The operators under the sanitizers: all cases and 10,000 calls, right and wrong. They write to the process's own standard error, and C++'s
# runtime must be there before they look for it. The compiler runs without them.
SANITIZED_TESTS = (
    "tests/kernels/test_raw_operators.py",
    "tests/kernels/test_cpu_parity.py",
    "--capture=sys",
    "-p",
    "no:faulthandler",
    "-k",
    "test_raw_operators or (test_parity and native and (float32 or bfloat16))",
)
SANITIZER_FLAGS = "-g1 -fsanitize=address,undefined -fno-sanitize-recover=undefined"
OPERATOR_TESTS = ("tests/kernels/test_properties.py", "tests/kernels/test_torch_integration.py")


@dataclass(frozen=True)
class Row:
    """Tests under an environment.

    Attributes:
        name: of the row.
        tests: pytest's arguments.
        environment: variables over the process's own; None takes one away.
        why_not: a reason to skip it here, or nothing.
    """

    name: str
    tests: tuple[str, ...]
    environment: dict[str, str | None] = field(default_factory=dict)
    why_not: Callable[[], str] = lambda: ""


def has(*flags: str) -> Callable[[], str]:
    """Whether the processor has all of some instruction sets."""

    def why_not() -> str:
        cpuinfo = Path("/proc/cpuinfo")
        found = set(cpuinfo.read_text().split()) if cpuinfo.is_file() else set()
        missing = [flag for flag in flags if flag not in found]
        return f"the processor has no {', '.join(missing)}" if missing else ""

    return why_not


def installed(command: str) -> Callable[[], str]:
    """Whether a command is there."""
    return lambda: "" if shutil.which(command) else f"{command} is not installed"


def avx512_of_numpy() -> str:
    """NumPy's names of the AVX-512 sets that it would choose loops for on this processor."""
    code = (
        "from numpy._core import _multiarray_umath as m\n"
        "print(' '.join(f for f in m.__cpu_dispatch__ if 'AVX512' in f and m.__cpu_features__.get(f)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def path_without(folder: Path, *commands: str) -> str:
    """A PATH of one folder that links to every command of today's but some."""
    folder.mkdir()
    for place in os.environ["PATH"].split(os.pathsep):
        if not Path(place).is_dir():
            continue
        for command in Path(place).iterdir():
            link = folder / command.name
            if command.name not in commands and not link.is_symlink():
                link.symlink_to(command)
    return str(folder)


def sanitizer_libraries() -> list[str]:
    """The runtimes of the sanitizers that c++ builds for, C++'s own last; none where one is missing."""
    found = []
    for library in ("libasan.so", "libubsan.so", "libstdc++.so"):
        command = ["c++", f"-print-file-name={library}"]
        done = (
            subprocess.run(command, capture_output=True, text=True, check=False)
            if shutil.which("c++")
            else None
        )
        if done is None or not Path(done.stdout.strip()).is_absolute():
            return []
        found.append(done.stdout.strip())
    return found


def sanitized() -> Row:
    """Wrong reads and undefined behaviour end the process, memory that nobody gives back does not."""
    libraries = sanitizer_libraries()
    environment = {
        "CXX": f"env -u LD_PRELOAD c++ {SANITIZER_FLAGS}",
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",
        "DTI_TEST_CALLS": "10000",
    }
    why_not = (
        "" if libraries else "c++ or the runtimes of its sanitizers (libasan, libubsan) are not installed"
    )
    return Row("C++: sanitizers", SANITIZED_TESTS, environment, lambda: why_not)


def compiled(name: str, cxx: str, why_not: Callable[[], str]) -> Row:
    """The C++ as another compiler, or for another processor."""
    return Row(f"C++: {name}", NATIVE_TESTS, {"CXX": cxx}, why_not)


def rows(scratch: Path) -> list[Row]:
    """The matrix, the longest first."""
    numpy_sets = avx512_of_numpy()
    no_tools = path_without(scratch / "bin", "git", "make")
    threads = {str(n): {"DTI_TEST_THREADS": str(n), "OMP_NUM_THREADS": str(n)} for n in (2, 3, 4)}
    return [
        Row(
            "NumPy: no AVX-512",
            INTERPRETER_TESTS,
            {"NPY_DISABLE_CPU_FEATURES": numpy_sets},
            lambda: "" if numpy_sets else "NumPy chooses no AVX-512 loops here",
        ),
        sanitized(),
        Row(
            "no git, no make",
            (
                "tests/test_readme.py",
                "tests/benchmarks/test_bench_quality.py",
                "tests/benchmarks/test_benchmarks_smoke.py",
                "-k",
                "not test_smoke",
            ),
            {"PATH": no_tools},
        ),
        Row("4 threads", (*THREADED_TESTS, "tests/training/test_ranks.py"), threads["4"]),
        Row("PyTorch's loops: default", PYTORCH_TESTS, {"ATEN_CPU_CAPABILITY": "default"}),
        Row("PyTorch's loops: avx2", PYTORCH_TESTS, {"ATEN_CPU_CAPABILITY": "avx2"}, has("avx2")),
        Row("MKL: COMPATIBLE", PYTORCH_TESTS, {"MKL_CBWR": "COMPATIBLE"}),
        compiled("no AVX-512", "c++ -mno-avx512f", has("avx512f")),
        compiled("no AVX-512, no FMA", "c++ -mno-avx512f -mno-fma", has("avx2")),
        compiled("no AVX", "c++ -mno-avx", has("avx")),
        compiled("clang++", "clang++", installed("clang++")),
        Row("no compiler", OPERATOR_TESTS, {"CXX": "no-such-compiler"}),
        Row("HOME unwritable", OPERATOR_TESTS, {"HOME": "/dev/null", "XDG_CACHE_HOME": None}),
        Row("2 threads", THREADED_TESTS, threads["2"]),
        Row("3 threads", THREADED_TESTS, threads["3"]),
    ]


def run(row: Row) -> tuple[str, str, float, str]:
    """Status, pytest's closing line, seconds and, where it is red, the output."""
    if reason := row.why_not():
        return "skipped", reason, 0.0, ""
    environment = {name: value for name, value in os.environ.items() if name not in row.environment}
    environment |= {name: value for name, value in row.environment.items() if value is not None}
    began = time.monotonic()
    command = [sys.executable, "-m", "pytest", "--tb=short", *row.tests]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if re.search(r"\d+ (passed|failed|error)", line)]
    closing = lines[-1] if lines else f"pytest ended with status {done.returncode}"
    output = "" if done.returncode == 0 else done.stdout[-6000:] + done.stderr[-2000:]
    return "green" if done.returncode == 0 else "RED", closing, time.monotonic() - began, output


def main(words: list[str]) -> int:
    """Run the rows, as many at once as there are processors."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="dti-matrix-") as scratch:
        wanted = [row for row in rows(Path(scratch)) if not words or any(word in row.name for word in words)]
        with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)))) as pool:
            results = list(pool.map(run, wanted))
    if not wanted:
        print(f"no row is named like {' or '.join(words)}", file=sys.stderr)
        return 2
    for row, (status, _, _, output) in zip(wanted, results):
        if status == "RED":
            print(f"--- {row.name}\n{output}")
    width = max(len(row.name) for row in wanted)
    for row, (status, closing, seconds, _) in zip(wanted, results):
        print(f"{row.name:{width}}  {status:8} {seconds:5.0f} s  {closing}")
    print(f"matrix: {len(wanted)} rows in {time.monotonic() - began:.0f} s")
    return int(any(status == "RED" for status, *_ in results))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
