"""The folder of results of `benchmarks.gpu_suite`: rows, log, summary, tiles and archive, all readable whatever ended a call.

Folders are carried from machine to machine, and processes are killed halfway: what is damaged is said, set aside or skipped, and is
never the end of a call that has a GPU.
"""

from __future__ import annotations

import json
import lzma
import tarfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.gpu.steps import Places
from benchmarks.recording import read_rows, row_lines
from dti_model.files import whole_file

# One file is carried with at most 16 MiB; xz packs this many unpacked bytes in a few seconds.
MOST_PACKED, MOST_UNPACKED = 15 << 20, 60 << 20
# Facts in a row of the step `device` that say where a result came from, and those that make a former result another one.
_ORIGIN = ("commit", "sources", "torch", "triton", "triton_files", "machine")
_COMPARED = ("sources", "triton", "triton_files", "machine")


def log(places: Places, text: str) -> None:
    """Append to the log."""
    with places.log.open("a") as file:
        file.write(text)


def mend_rows(places: Places) -> None:
    """Move lines that are no rows into the log: a killed process leaves half a line, which no reader of rows expects."""
    if not places.rows.is_file():
        return
    good, damaged = row_lines(places.rows)
    if not damaged and places.rows.read_bytes()[-1:] in (b"", b"\n"):
        return
    with whole_file(places.rows) as temporary:
        temporary.write_bytes(b"".join(line + b"\n" for line in good))
    for line in damaged:
        text = line[:200].decode(errors="replace")
        say(places, f"{places.rows.name}: a damaged line is skipped: {text}")


def say(places: Places, text: str) -> None:
    """Print a line, and log it."""
    print(text, flush=True)
    log(places, f"=== {text}\n")


def num_rows(places: Places) -> int:
    """Lines of the file of rows."""
    return places.rows.read_bytes().count(b"\n") if places.rows.is_file() else 0


def read_summary(places: Places) -> dict[str, Any]:
    """`origin` (commit and versions) and `steps` by name; empty where there is none, or none that can be read."""
    empty: dict[str, Any] = {"origin": {}, "steps": {}}
    if not places.summary.is_file():
        return empty
    try:
        summary = json.loads(places.summary.read_text())
    except (ValueError, RecursionError):
        print(f"{places.summary.name} is damaged and begins anew", flush=True)
        return empty
    if not isinstance(summary, dict) or not all(isinstance(summary.get(name), dict) for name in empty):
        print(f"{places.summary.name} is not one of this program and begins anew", flush=True)
        return empty
    steps = {name: entry for name, entry in summary["steps"].items() if isinstance(entry, dict)}
    return {**summary, "steps": steps}


def write_summary(places: Places, summary: Mapping[str, Any]) -> None:
    """Replace `summary.json` as a whole."""
    with whole_file(places.summary) as temporary:
        temporary.write_text(json.dumps(summary, indent=1) + "\n")


def note_origin(summary: dict[str, Any], places: Places) -> None:
    """Take commit, versions and card from the last row of the step `device`, and say what differs from a former call."""
    rows = [row for row in read_rows(places.rows) if row.get("benchmark") == "device"]
    if not rows:
        return
    row = rows[-1]
    origin = {name: row.get(name) for name in _ORIGIN}
    for name, value in summary["origin"].items():
        if origin.get(name) != value:
            say(places, f"CHANGED: {name} was {value} in a former call and is {origin.get(name)} now")
    summary["origin"] = origin


def origin_of(entry: Mapping[str, Any], former: Mapping[str, Any]) -> Mapping[str, Any]:
    """The origin of a step of a former call; `former` where its entry does not say."""
    origin = entry.get("origin", former)
    return origin if isinstance(origin, dict) else {}


def same_origin(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether results may stand beside each other: the same card, sources and Triton."""
    return all(one.get(name) == other.get(name) for name in _COMPARED)


def set_aside_tiles(summary: Mapping[str, Any], places: Places, former: Mapping[str, Any]) -> None:
    """Put tiles that won on another card, or on nobody knows which, into `kept/`: no step runs with them."""
    machine = origin_of(summary["steps"].get("tiles", {}), former).get("machine")
    if places.tiles.is_file() and machine != summary["origin"].get("machine"):
        places.tiles.replace(places.kept / "tiles-before.json")
        say(places, f"{places.tiles.name} is of {machine or 'an unknown card'}: not used, and put into kept/")


def pack(places: Places) -> None:
    """Put what `kept/` holds into the archive, if anything is new; what is too large stays in `kept/`."""
    files = sorted((x for x in places.kept.rglob("*") if x.is_file()), key=lambda x: x.stat().st_size)
    newest = max((file.stat().st_mtime for file in files), default=0.0)
    if not files or (places.archive.is_file() and places.archive.stat().st_mtime > newest):
        return
    left_out = []
    while True:
        if sum(file.stat().st_size for file in files) <= MOST_UNPACKED:
            _write_archive(places, files)
            if places.archive.stat().st_size <= MOST_PACKED:
                break
        left_out.append(files.pop().name)
    for name in left_out:
        log(places, f"=== {name} is too large for {places.archive.name}\n")


def _write_archive(places: Places, files: Sequence[Path]) -> None:
    with whole_file(places.archive) as temporary, tarfile.open(temporary, "w:xz", preset=1) as archive:
        for file in files:
            archive.add(file, str(file.relative_to(places.out)), filter=_nobody)


def _nobody(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member


def unpack(places: Places) -> None:
    """Files of the archive that `kept/` lacks. An archive of something else, or a damaged one, is renamed, so that nothing replaces it."""
    if not places.archive.is_file():
        return
    reason = None
    try:
        with tarfile.open(places.archive) as archive:
            for member in archive:
                target = (places.out / member.name).resolve()
                content = archive.extractfile(member)
                if not content or not target.is_relative_to(places.kept.resolve()):
                    reason = f"{member.name} in it is not of this program"
                elif not target.exists():
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(content.read())
    except (tarfile.TarError, lzma.LZMAError, OSError, EOFError) as error:
        reason = f"it cannot be unpacked: {error}"
    if reason is not None:
        number = 1
        while (aside := places.out / f"before-{number}-{places.archive.name}").exists():
            number += 1
        places.archive.rename(aside)
        say(places, f"{places.archive.name} is now {aside.name}: {reason}")


def remove_packed(places: Places) -> None:
    """Remove from `kept/` what the archive has, and `kept/` where it is empty: a folder of results is then five files."""
    with (
        suppress(OSError, tarfile.TarError, lzma.LZMAError, EOFError),
        tarfile.open(places.archive) as archive,
    ):
        for member in archive:
            file = places.out / member.name
            if file.is_file() and file.stat().st_size == member.size:
                file.unlink()
    folders = [folder for folder in places.kept.rglob("*") if folder.is_dir()]
    for folder in [*sorted(folders, reverse=True), places.kept]:
        with suppress(OSError):  # not empty
            folder.rmdir()


def table(entries: Sequence[Mapping[str, Any]]) -> str:
    """Step, status, seconds and the first line of the error."""
    lines = [
        f"{entry['step']:20} {entry['status']:12} {entry['seconds']:7.1f} s  {entry.get('error', '')}".rstrip()
        for entry in entries
    ]
    return "\n".join(lines)
