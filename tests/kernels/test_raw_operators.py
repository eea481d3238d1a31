"""The registered operators called by anybody: right calls compute, wrong ones are refused, and none reads what it does not own.

The row `sanitizers` of .ci/matrix.py runs this file with the C++ built for the address and undefined-behaviour sanitizers, which end the process
at the first wrong read, and 10,000 calls. Elsewhere the calls are fewer, and only what ends the process by itself is noticed.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest
import torch

from dti_kernels import ops
from dti_kernels.cpu import compiled
from dti_kernels.layout import check_spans
from tests.kernels.raw_calls import (
    READ_ELSEWHERE,
    READ_ELSEWHERE_OF_SUMS,
    REFUSED,
    Call,
    full_call,
    right_call,
    tampered,
)
from tests.kernels.test_cpu_native import built_with

pytestmark = pytest.mark.usefixtures("native")

NUM_CALLS = int(os.environ.get("DTI_TEST_CALLS", "1000"))
SANITIZED = "-fsanitize" in os.environ.get("CXX", "")
DTYPES = [torch.float32, torch.bfloat16]
WRONG = [
    *((name, False, change) for name, change in {**READ_ELSEWHERE, **REFUSED}.items()),
    *((name, True, change) for name, change in READ_ELSEWHERE_OF_SUMS.items()),
]
IDS = [name for name, _, _ in WRONG]


@pytest.fixture
def nan_in_new_memory() -> Iterator[None]:
    """Memory that nobody has written is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "with_sums", "change"), WRONG, ids=IDS)
def test_wrong_calls_are_refused(
    name: str, with_sums: bool, change: Callable[[Call], Call], dtype: torch.dtype
) -> None:
    """They read behind what they were given, ended the process (no heads: SIGFPE) or were converted without a word."""
    call = full_call(dtype, with_sums)
    out, lse = call.forward()
    wrong = change(call)
    with pytest.raises((TypeError, ValueError)):
        wrong.forward()
    with pytest.raises((TypeError, ValueError)):
        wrong.backward(out, lse)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("out", lambda out, lse: (out[:-1], lse)),
        ("out", lambda out, lse: (out.double(), lse)),
        ("lse", lambda out, lse: (out, lse[:, :-1])),
        ("lse", lambda out, lse: (out, lse.double())),
        ("grad_out", lambda out, lse: (out, lse)),
    ],
)
def test_what_the_backward_gets_besides_is_checked(name: str, change: Callable) -> None:
    """A short gradient or output was read beyond its end."""
    call = full_call(torch.float32, True)
    out, lse = call.forward()
    if name == "grad_out":
        call = Call(call.tensors, call.grad_out[:-1])
    with pytest.raises((TypeError, ValueError), match=f"^{name} must"):
        call.backward(*change(out, lse))


@pytest.mark.usefixtures("nan_in_new_memory")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_calls(dtype: torch.dtype) -> None:
    """Right ones write all that they return; those with a tampered layout are refused or, where it is one all the same, computed."""
    rng = random.Random(17)
    torch.manual_seed(17)
    refused = 0
    for _ in range(NUM_CALLS // 4):  # four each
        call = right_call(rng, dtype)
        out, lse = call.forward()
        for result in (out, lse, *call.backward(out, lse)):
            assert bool(torch.isfinite(result).all())
        other = tampered(call, rng)
        try:
            check_spans(other["rows"], other["keys"])
        except ValueError:
            refused += 1
        for run in (other.forward, lambda other=other, out=out, lse=lse: other.backward(out, lse)):
            with suppress(ValueError):
                run()
    assert refused > NUM_CALLS // 8


def test_the_compiled_check_of_spans_is_that_of_the_layout() -> None:
    """Stated twice, in C++ for its speed and in Python for its message: they agree on every layout and on tampered ones."""
    rng = random.Random(5)
    outcomes = {True: 0, False: 0}
    for _ in range(NUM_CALLS // 4):
        call = tampered(right_call(rng, torch.float32), rng)
        rows, keys = call["rows"], torch.zeros_like(call["keys"])  # which the C++ does not read
        arguments, kept = compiled._arguments(call.inputs)
        accepted = compiled._call("num_gradients", arguments, torch.float32) >= 0
        assert kept
        try:
            check_spans(rows, keys)
        except ValueError as error:
            right = str(error).startswith("keys")
        else:
            right = True
        assert accepted == right, rows
        outcomes[right] += 1
    assert min(outcomes.values()) > NUM_CALLS // 80


@pytest.fixture(scope="module")
def unchecked() -> Iterator[None]:
    """The operators without a check, in Python and in C++."""
    if not SANITIZED:
        pytest.skip("built without sanitizers: .ci/matrix.py sanitizers")
    with pytest.MonkeyPatch.context() as monkeypatch, built_with("-DDTI_UNCHECKED"):
        for name in ("check_inputs", "check_saved"):
            monkeypatch.setattr(ops, name, lambda *_: None)
        yield


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("name", "with_sums", "change"),
    [row for row in WRONG if row[0] not in REFUSED],
    ids=[name for name in IDS if name not in REFUSED],
)
def test_without_the_checks_the_sanitizers_report(
    name: str, with_sums: bool, change: Callable[[Call], Call], tmp_path
) -> None:
    """So that a sanitizer's silence says something: these calls do arrive where memory is read."""
    call = full_call(torch.float32, with_sums)
    out, lse = call.forward()
    for run in (lambda: change(call).forward(), lambda: change(call).backward(out, lse)):
        report = tmp_path / "report"
        child = os.fork()
        if child == 0:
            with report.open("w") as file:
                os.dup2(file.fileno(), 2)
                try:
                    run()
                finally:
                    os._exit(0)
        assert os.waitpid(child, 0)[1] != 0
        text = report.read_text()
        if "AddressSanitizer" in text or "runtime error" in text:
            return
    raise AssertionError(f"nothing was reported: {name}")
