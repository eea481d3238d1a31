"""The meter of the host's time without a GPU."""

from __future__ import annotations

import ast
import os
from typing import Any

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    "TRITON_INTERPRET" in os.environ, reason="interpreted kernels are not launched"
)

from benchmarks.gpu import host_path  # noqa: E402


def test_calls_are_measured_up_to_the_door(monkeypatch: Any, capsys: Any) -> None:
    """Three launches forward and seven backward; a call whose like has run before is cheaper than the first of its kind."""
    monkeypatch.setattr("sys.argv", ["host_path", "--arch", "sm_80"])
    monkeypatch.setattr(host_path, "_CALLS", 10)
    monkeypatch.setattr(host_path, "_BATCHES", 5)
    host_path.main()
    rows = [ast.literal_eval(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["launches"] for row in rows] == [3, 3, 10, 10] * 2
    for again, first in zip(rows[::2], rows[1::2]):
        assert (again["call"], first["call"]) == ("again", "first of its kind")
        assert 0 < 2 * again["p50_us"] < first["p50_us"]
