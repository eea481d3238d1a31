"""Files appear whole or not at all, locks end with their process, and a flipped bit is found."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from dti_model import files
from dti_model.files import whole
from tests.conftest import ROOT


def hold_in_another_process(code: str) -> subprocess.Popen:
    """Runs code, and returns when it has printed a line."""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "ready"
    return process


def write_half(whole: Any, error: BaseException) -> None:
    """Writes something, then fails."""
    with whole as temporary:
        (temporary / "half" if temporary.is_dir() else temporary).write_text("half")
        raise error


def test_a_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a[1].json"
    path.write_text("old")
    with files.whole_file(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
        assert temporary.parent == tmp_path
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == [path.name]
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt):
        write_half(files.whole_file(path), KeyboardInterrupt())
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "file")
    with files.whole_file(tmp_path / "link") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "file").read_text() == "new"


def test_a_folder_takes_the_place_of_an_older_one(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    for content in ("old", "new"):
        with files.whole_folder(folder) as temporary:
            (temporary / "below").mkdir()
            (temporary / "below" / content).write_text(content)
        assert os.listdir(folder / "below") == [content]
    with pytest.raises(ZeroDivisionError):
        write_half(files.whole_folder(folder), ZeroDivisionError())
    assert os.listdir(folder / "below") == ["new"]
    assert os.listdir(tmp_path) == ["folder"]


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_that_is_replaced_is_never_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    """The older folder was once deleted, file by file, before the new one had its name: a kill in between lost both."""
    folder = tmp_path / "folder"
    deleted: list[bool] = []
    rmtree = whole.shutil.rmtree

    def deleting(path: Path, *arguments: Any, **options: Any) -> None:
        deleted.append((folder / "new").is_file())
        rmtree(path, *arguments, **options)

    monkeypatch.setattr(whole.shutil, "rmtree", deleting)
    if not exchange:  # as on file systems that cannot
        monkeypatch.setattr(whole, "exchanged", lambda *_: False)
    folder.mkdir()
    (folder / "old").write_text("old")
    with files.whole_folder(folder) as temporary:
        (temporary / "new").write_text("new")
    assert deleted
    assert all(deleted)
    assert os.listdir(folder) == ["new"]
    assert os.listdir(tmp_path) == ["folder"]


def test_names_are_exchanged_in_one_step(tmp_path: Path) -> None:
    """While one thread replaces a folder, another never finds it missing."""
    folder = tmp_path / "folder"
    folder.mkdir()
    stop, missing = threading.Event(), []

    def watch() -> None:
        while not stop.is_set():
            if not folder.exists():
                missing.append(True)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for _ in range(50):
            with files.whole_folder(folder):
                pass
    finally:
        stop.set()
        watcher.join()
    assert not missing


def test_the_last_look_at_an_older_folder_can_keep_it(tmp_path: Path) -> None:
    """An error that `check` raises leaves everything as it was; it runs when the new folder is complete."""
    folder, seen = tmp_path / "folder", []
    folder.mkdir()

    def refuse() -> None:
        seen.extend(tmp_path.glob(".folder.*/new"))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), files.whole_folder(folder, refuse) as temporary:
        (temporary / "new").write_text("new")
    assert len(seen) == 1
    assert os.listdir(folder) == []
    assert os.listdir(tmp_path) == ["folder"]


@pytest.mark.parametrize("whole", ["whole_file", "whole_folder", "temporary_folder"])
def test_what_a_killed_writer_leaves_is_removed_and_what_a_living_one_writes_is_not(
    tmp_path: Path, whole: str
) -> None:
    code = (
        f"from dti_model import files\nwith files.{whole}({str(tmp_path / 'out')!r}) as t:\n"
        "    print('ready', flush=True)\n    import time; time.sleep(60)\n"
    )
    process = hold_in_another_process(code)
    try:
        (half,) = tmp_path.iterdir()
        files.remove_leftovers(tmp_path / "out")
        assert list(tmp_path.iterdir()) == [half], "a living process writes it"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert half.exists()
    with getattr(files, whole)(tmp_path / "out") as temporary:
        if whole == "whole_file":
            temporary.write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ([] if whole == "temporary_folder" else ["out"])


def test_a_leftover_of_another_user_does_not_keep_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a folder that users share, one that may not be opened ended the search for the rest."""
    names = [f".out.dti-{letter * 16}.incomplete" for letter in "abc"]
    for name in names:
        (tmp_path / name).mkdir()
    os_open = os.open

    def refusing(path: Any, *arguments: Any, **options: Any) -> int:
        if Path(path).name == names[refused]:
            raise PermissionError(13, "Permission denied", str(path))
        return os_open(path, *arguments, **options)

    monkeypatch.setattr(os, "open", refusing)
    for refused in range(3):
        for name in names:
            (tmp_path / name).mkdir(exist_ok=True)
        files.remove_leftovers(tmp_path / "out")
        assert os.listdir(tmp_path) == [names[refused]]


READ_ONLY = """
import os, sys
from pathlib import Path
from dti_model import files
folder, elsewhere = Path("folder"), Path("elsewhere")
elsewhere.mkdir()
elsewhere.chmod(0o500)

def make_read_only(folder):
    (folder / "a" / "b").mkdir(parents=True)
    (folder / "a" / "b" / "file").touch()
    (folder / "a" / "link").symlink_to(elsewhere.absolute())
    for path in (folder / "a" / "b", folder / "a", folder):
        path.chmod(0o500)

make_read_only(folder)
if os.access(folder, os.W_OK):
    sys.exit("all may write")
with files.whole_folder(folder):
    pass
folder.rmdir()
for ending in ("removed", "incomplete"):
    make_read_only(Path(f".folder.dti-0123456789abcdef.{ending}"))
with files.temporary_folder(folder) as temporary:
    make_read_only(temporary / "below")
make_read_only(folder)
files.remove_folder(folder)
print(*os.listdir(), oct(elsewhere.stat().st_mode & 0o777))
"""


def test_folders_that_nobody_writes_to_are_removed(tmp_path: Path) -> None:
    """Their subfolders were not: hidden ones stayed for ever, and a run could not go on over read-only checkpoints."""
    ordinary: list[str] = []
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("no setpriv")
        ordinary = ["setpriv", "--inh-caps=-all", "--bounding-set=-all"]
    ended = subprocess.run(
        [*ordinary, sys.executable, "-c", READ_ONLY],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    if "all may write" in ended.stderr or "setpriv" in ended.stderr:
        pytest.skip("permissions do not hold here")
    assert (ended.stdout, ended.stderr) == ("elsewhere 0o500\n", "")


def test_a_full_disk_is_one_line_that_names_the_file(tmp_path: Path) -> None:
    """Whatever type the library raises: tokenizers' is a bare Exception."""
    for error in (
        OSError(28, "No space left on device"),
        Exception("No space left on device (os error 28)"),
    ):
        with pytest.raises(files.WriteError, match=r"a\.json cannot be written .* make room"):
            write_half(files.whole_file(tmp_path / "a.json"), error)
    assert list(tmp_path.iterdir()) == []


def test_a_lock_has_one_holder_and_says_who(tmp_path: Path) -> None:
    lock = tmp_path / "run" / ".lock"
    code = (
        f"from pathlib import Path\nfrom dti_model import files\nwith files.locked(Path({str(lock)!r}), 'dti train'):\n"
        "    print('ready', flush=True)\n    import time; time.sleep(60)\n"
    )
    process = hold_in_another_process(code)
    try:
        message = rf"run is being written by dti train \(process {process.pid} on"
        with pytest.raises(files.LockedError, match=message), files.locked(lock, "another"):
            pytest.fail("held twice")
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    with files.locked(lock, "another"):
        assert "another" in lock.read_text()
    assert not lock.exists()


def test_a_lock_is_never_held_twice(tmp_path: Path) -> None:
    """Many processes take and remove the same lock file: a counter that all of them raise loses nothing."""
    counter = tmp_path / "counter"
    counter.write_text("0")
    code = f"""
from pathlib import Path
from dti_model import files
counter = Path({str(counter)!r})
done = 0
while done < 40:
    try:
        with files.locked(counter.with_name(".lock"), "count"):
            counter.write_text(str(int(counter.read_text()) + 1))
            done += 1
    except files.LockedError:
        pass
"""
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(3)]
    deadline = time.monotonic() + 60
    for process in processes:
        assert process.wait(max(1.0, deadline - time.monotonic())) == 0
    assert counter.read_text() == "120"


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(range(40)))
    files.write_checksums(tmp_path)
    files.check_checksums(tmp_path, "Copy it again")
    for name in ("a", files.CHECKSUMS_FILE):
        whole = (tmp_path / name).read_bytes()
        for place in range(0, len(whole), 7):
            changed = bytearray(whole)
            changed[place] ^= 4
            (tmp_path / name).write_bytes(changed)
            with pytest.raises(files.DamagedFileError, match=f"{name}.*Copy it again"):
                files.check_checksums(tmp_path, "Copy it again")
        (tmp_path / name).write_bytes(whole)
    (tmp_path / "a").write_bytes(bytes(41))
    with pytest.raises(files.DamagedFileError, match="41 bytes instead of 40"):
        files.check_checksums(tmp_path, "Copy it again")
    (tmp_path / "a").unlink()
    with pytest.raises(files.DamagedFileError, match="is missing"):
        files.check_checksums(tmp_path, "Copy it again")


def test_json_is_strict_and_sealed(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    files.write_json(path, {"gauc": float("nan"), "list": [1.5, float("inf")]})
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == {"gauc": None, "list": [1.5, None]}
    files.write_sealed(path, {"a": 1, "b": [0.1, "é"], 3: None})
    assert files.read_sealed(path, "Delete it") == {"a": 1, "b": [0.1, "é"], "3": None}
    path.write_text(path.read_text().replace("0.1", "0.2"))
    with pytest.raises(files.DamagedFileError, match=r"a\.json is damaged.*Delete it"):
        files.read_sealed(path, "Delete it")


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask
