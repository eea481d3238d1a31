"""Imports on machines that lack a package: an operator on CPUs needs no Triton, training and scoring no polars, msgspec or jsonargparse."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dti_model.__main__ import run
from dti_model.cli import main
from dti_model.data import PreparedData, prepare
from dti_model.model import Run
from tests.conftest import ROOT
from tests.data.movielens_files import some_ratings, write_1m


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


def test_training_and_scoring_need_no_polars(tmp_path: Path) -> None:
    """Nor msgspec, jsonargparse or gguf: without them `import dti_model.training` ended in a ModuleNotFoundError."""
    folder = tmp_path / "data"
    prepare("ml-1m", folder, write_1m(tmp_path / "raw", some_ratings(60)), subset=True, vocab_size=400)
    command = [sys.executable, "-m", "tests.without_polars", str(folder), str(tmp_path / "run")]
    subprocess.run(command, check=True, cwd=ROOT, env=_without_interpreter())
    assert (tmp_path / "run" / "report.png").read_bytes().startswith(b"\x89PNG")
    data = PreparedData.open(folder)
    rows = data.targets("val")
    wanted = {
        "user": pa.array([data.user_ids[i] for i in data.users_of(rows)], pa.large_string()),
        "item": pa.array([data.item_ids[i] for i in data.item[rows]], pa.large_string()),
        "timestamp": pa.array(data.timestamp[rows]),
        "label": pa.array(data.label[rows]),
        "raw_probability": pa.array(np.load(tmp_path / "val.npy")),
    }
    predictions = pq.read_table(tmp_path / "run" / "predictions-val.parquet")
    assert predictions.drop_columns(["probability"]).equals(pa.table(wanted))
    calibration = Run.load(tmp_path / "run", device="cpu").calibration
    assert calibration is not None
    assert predictions["probability"].to_numpy() == pytest.approx(calibration(np.load(tmp_path / "val.npy")))


@pytest.mark.parametrize("package", ["polars", "msgspec"])
def test_preparing_names_a_missing_package(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("build", "sources.amazon"):
        monkeypatch.delitem(sys.modules, f"dti_model.data.{name}", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["prepare", "amazon", "--reviews=r", "--meta=m", f"--out={tmp_path / 'out'}"]) == 2
    message = f"making prepared data needs {package}, which is not installed: pip install {package}"
    assert capsys.readouterr().err == f"dti prepare: error: {message}\n"
    with pytest.raises(ModuleNotFoundError, match=f"^{message}$"):
        from dti_model.data import AmazonFiles  # noqa: F401


def test_the_command_names_a_missing_parser(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in [name for name in sys.modules if name.startswith("dti_model.cli")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    with pytest.raises(SystemExit, match="^2$"):
        run()
    error = capsys.readouterr().err
    assert error.endswith("pip install 'jsonargparse[signatures]'\n")
    assert error.count("\n") == 1


def _without_interpreter() -> dict[str, str]:
    import os

    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
