"""Exports that something happens to: flipped bits, full disks, kills."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dti_model.files import DamagedFileError
from dti_model.model.export import export_run
from dti_model.scorer import Scorer
from tests.conftest import ROOT
from tests.model.test_export import RESET, export, run_folder


def test_a_flipped_bit_anywhere_in_an_export_is_named(small_folder: Path, tmp_path: Path) -> None:
    """It used to be another result, or a traceback."""
    out, _ = export(run_folder(tmp_path / "run", small_folder, RESET), library_only=True)
    rng = np.random.default_rng(0)
    names = {path.name for path in out.iterdir()}
    assert {"checksums.json", "dti.json", "config.json", "model.safetensors", "tokenizer.json"} <= names
    for path in sorted(out.iterdir()):
        if path.name == "README.md":
            continue  # for people, who may edit it
        whole = path.read_bytes()
        for place in rng.integers(0, 8 * len(whole), 12).tolist():
            flipped = bytearray(whole)
            flipped[place // 8] ^= 1 << place % 8
            path.write_bytes(flipped)
            with pytest.raises(DamagedFileError, match=re.escape(path.name)):
                Scorer.from_export(out, device="cpu")
        path.write_bytes(whole)
    (out / "README.md").write_text("mine")
    Scorer.from_export(out, device="cpu")
    checksums = (out / "checksums.json").read_bytes()
    (out / "checksums.json").unlink()
    with pytest.raises(DamagedFileError, match=r"checksums\.json is missing"):
        Scorer.from_export(out, device="cpu")  # without it nothing was checked
    (out / "checksums.json").write_bytes(checksums)
    (out / "dti.json").unlink()
    with pytest.raises(FileNotFoundError, match="is not a folder made by `dti export`"):
        Scorer.from_export(out)


def export_process(run: Path, out: Path, **more: Any) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "dti_model.cli",
        "export",
        f"--run={run}",
        f"--out={out}",
        "--library-only",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, **more)


@pytest.mark.parametrize("room", [100, 2_000, 30_000])
def test_a_full_disk_is_one_line_and_leaves_nothing(small_folder: Path, tmp_path: Path, room: int) -> None:
    """No file may become larger than `room`: what a full disk does, for one process."""
    run = run_folder(tmp_path / "runs" / "run", small_folder, RESET)
    folder = tmp_path / "exports"
    process = export_process(
        run, folder / "out", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    )
    error = process.communicate()[1]
    assert process.returncode == 2, error
    assert error.count("\n") == 1
    assert re.match(r"dti export: error: \S+out\S* cannot be written \(.*\)", error)
    assert not folder.exists()
    export_run(run, folder / "out", library_only=True)


@pytest.mark.slow
def test_a_killed_export_leaves_nothing_that_the_next_does_not_remove(
    small_folder: Path, tmp_path: Path
) -> None:
    run = run_folder(tmp_path / "runs" / "run", small_folder, RESET)
    folder = tmp_path / "exports"
    for _ in range(3):
        process = export_process(run, folder / "out")
        while not list(folder.glob(".out.dti-*")):
            assert process.poll() is None
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not (folder / "out").exists()
        assert {path.name.partition(".dti-")[0] for path in folder.iterdir()} == {".out", ".out.lock"}
    export_run(run, folder / "out", library_only=True)
    assert [path.name for path in folder.iterdir()] == ["out"]
