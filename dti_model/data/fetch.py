"""Fetching raw files: GroupLens first, then RecBole's wheel from the Python package index.

The wheel of RecBole 1.2.1 carries ML-100K, so a machine that reaches only a package index gets the same data.
Archives are checked as a whole before anything in them is unpacked, and of the package index only wheels are taken: a source
distribution is a program that pip would run. What archives hold is checked again, by line, count and content digest, by the loader.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import subprocess
import sys
import urllib.request
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

from dti_model.data.errors import DataError

TIMEOUT_S = 15  # a blocked network must not hold the second route up
PIP_TIMEOUT_S = 300
MAX_BYTES = 2**30  # of an archive, and of each file in it; the largest has a tenth of that
RECBOLE = "recbole==1.2.1"
RECBOLE_SHA256 = "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407"
RECBOLE_FILES = (
    "recbole/dataset_example/ml-100k/ml-100k.inter",
    "recbole/dataset_example/ml-100k/ml-100k.item",
)
GROUPLENS_URL = "https://files.grouplens.org/datasets/movielens/{name}.zip"
# As GroupLens publishes them beside the archives.
GROUPLENS_MD5 = {"ml-100k": "0e33842e24a9c977be4e0107933c0723", "ml-1m": "c4d9eecfca2ab87c1945afe126590906"}
GROUPLENS_FILES = {"ml-100k": ("u.data", "u.item"), "ml-1m": ("ratings.dat", "movies.dat")}


class FetchError(Exception):
    """One route failed; the next may work."""


def fetch(name: str, folder: Path) -> Path:
    """Fetch the raw files of a MovieLens set.

    Args:
        name: "ml-100k" or "ml-1m".
        folder: an existing folder for the archive and its files.

    Returns:
        The folder with the raw files.

    Raises:
        DataError: every route failed; the message names each with its reason.
    """
    routes: dict[str, Callable[[], Path]] = {"GroupLens": lambda: _from_grouplens(name, folder)}
    if name == "ml-100k":
        routes["the package index"] = lambda: _from_recbole(folder)
    failures = []
    for route, download in routes.items():
        try:
            return download()
        except FetchError as error:
            failures.append(f"{route}: {error}")
    files = " and ".join(GROUPLENS_FILES[name])
    raise DataError(
        f"{name} could not be fetched. {'; '.join(failures)}. Put the files {files} into a folder and "
        "name it with raw_dir (--raw-dir)."
    )


def _from_grouplens(name: str, folder: Path) -> Path:
    url = GROUPLENS_URL.format(name=name)
    archive = folder / f"{name}.zip"
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as response:
            content = response.read(MAX_BYTES + 1)
            if len(content) > MAX_BYTES:
                raise FetchError(f"{url} sends more than {MAX_BYTES:,} bytes")
            archive.write_bytes(content)
    except (OSError, http.client.HTTPException) as error:
        raise FetchError(f"{url} ({error})") from error
    _check_digest(archive, "md5", GROUPLENS_MD5[name])
    return extract(archive, tuple(f"{name}/{file}" for file in GROUPLENS_FILES[name]), folder)


def _from_recbole(folder: Path) -> Path:
    return extract(wheel_from_index(RECBOLE, RECBOLE_SHA256, folder), RECBOLE_FILES, folder)


def wheel_from_index(requirement: str, sha256: str, folder: Path) -> Path:
    """Download one wheel, `name==version`, into an existing folder and check it.

    Raises:
        FetchError: it could not be downloaded, or is another one.
    """
    pinned = folder / "requirement.txt"
    pinned.write_text(f"{requirement} --hash=sha256:{sha256}\n")
    # -P: else a pip.py of the current folder would be run.
    command = [
        sys.executable,
        "-P",
        "-m",
        "pip",
        "download",
        "--only-binary=:all:",
        "--require-hashes",
        "--no-deps",
    ]
    command += ["--quiet", "--retries", "1", "--dest", str(folder), "--requirement", str(pinned)]
    environment = {**os.environ, "TMPDIR": str(folder)}  # what a killed pip leaves goes with the folder
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=PIP_TIMEOUT_S, check=False, env=environment
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise FetchError(f"pip download {requirement} ({error})") from error
    name = requirement.split("==")[0].replace("-", "_")
    wheels = sorted(folder.glob(f"{name}-*.whl"))
    if done.returncode or not wheels:
        lines = done.stderr.strip().splitlines() or ["no wheel came"]
        reason = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1])
        raise FetchError(f"pip download {requirement} ({reason})")
    _check_digest(wheels[0], "sha256", sha256)
    return wheels[0]


def _check_digest(archive: Path, algorithm: str, wanted: str) -> None:
    with archive.open("rb") as file:
        found = hashlib.file_digest(file, algorithm).hexdigest()
    if found != wanted:
        size = archive.stat().st_size
        raise FetchError(
            f"{archive.name} is cut short or changed: its {size:,} bytes have {algorithm} {found}, "
            f"expected {wanted}"
        )


def extract(archive: Path, members: tuple[str, ...], folder: Path) -> Path:
    """Extract members that lie next to each other and return their folder; their checksums inside the archive are checked on the way.

    `zipfile` writes nothing outside the folder, whatever a member is called, and no links.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            for member in members:
                if opened.getinfo(member).file_size > MAX_BYTES:
                    raise FetchError(f"{archive.name}: {member} has more than {MAX_BYTES:,} bytes")
                opened.extract(member, folder)
    # The last three: compressed or encrypted in a way that nobody knows, or damaged there.
    except (
        zipfile.BadZipFile,
        KeyError,
        EOFError,
        OSError,
        RuntimeError,
        NotImplementedError,
        zlib.error,
    ) as error:
        raise FetchError(f"{archive.name} is cut short or not the expected archive ({error})") from error
    return (folder / members[0]).parent
