"""Every benchmark's command runs at its smoke size, behind its parity gates, and its rows hold together. Times prove nothing here."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks import bench_attention, bench_score, bench_train, leak_meter
from benchmarks.made_up import made_up_data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_up_data(tmp_path_factory.mktemp("made_up"))


@pytest.mark.parametrize(
    ("module", "num_rows", "takes_data"),
    [(bench_attention, 12, False), (bench_train, 3, True), (bench_score, 9, True), (leak_meter, 12, False)],
    ids=lambda x: x.__name__ if isinstance(x, ModuleType) else "",
)
def test_smoke(
    module: ModuleType,
    num_rows: int,
    takes_data: bool,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["--size", "smoke", *(["--data", str(data)] if takes_data else [])]
    monkeypatch.setattr(sys, "argv", [f"{module.__name__.split('.')[-1]}.py", *arguments])
    module.main()
    (written,) = (tmp_path / "runs" / "smoke").iterdir()  # not among the recorded results
    rows = [json.loads(line) for line in written.read_text().splitlines()]
    assert len(rows) == num_rows
    for row in rows:
        assert {"date", "commit", "machine", "torch", "benchmark"} <= row.keys()
        times = [value for key, value in row.items() if key.endswith(("_ms", "_per_s"))]
        assert all(time > 0 for time in times)
        assert times or row["benchmark"] == "leak"
    assert capsys.readouterr().out
