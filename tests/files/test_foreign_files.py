"""Files and folders that are somebody's own, where this program would write: they stay as they are, also those that come meanwhile."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from dti_model import files
from dti_model.files import locks, renames, whole, whole_file, whole_folder
from dti_model.files.locks import locked, locked_beside
from dti_model.model import export as export_module
from dti_model.model import fetch as fetch_module
from dti_model.model.export import export_run
from dti_model.model.fetch import fetch_model
from dti_model.model.pretrained import PretrainedModelError
from dti_model.scorer import Scorer
from dti_model.scorer.file import CHUNK_LINES
from tests.model.pretrained_files import pretrained_folder
from tests.scorer.scoring_jobs import broken_off, meanwhile, score

EXPORT = {"library_only": True}
HOLDER = "dti train (process 1 on elsewhere, since 2026-01-01T00:00:00+00:00)\n"


def content_of(folder: Path) -> dict[str, Any]:
    return {
        path.relative_to(folder).as_posix(): os.readlink(path)
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else None
        for path in folder.rglob("*")
    }


@pytest.mark.parametrize(
    "make",
    [
        lambda lock, mine: lock.symlink_to(mine),
        lambda lock, mine: lock.symlink_to("nothing"),
        lambda lock, mine: lock.symlink_to(lock),
        lambda lock, mine: os.link(mine, lock),
        lambda lock, mine: lock.write_text("my notes\n"),
        lambda lock, mine: lock.write_text(f"{HOLDER}my notes\n"),
        lambda lock, mine: lock.write_text(HOLDER[:-2] + "x" * 1000 + ")\n"),
        lambda lock, mine: lock.mkdir(),
        lambda lock, mine: os.mkfifo(lock),
    ],
    ids=["link", "dangling", "loop", "hard link", "notes", "notes below", "long", "folder", "pipe"],
)
def test_a_lock_that_is_somebody_s_own_file_is_refused(tmp_path: Path, make: Any) -> None:
    """It was cut to nothing, also through a link, and deleted at the end."""
    mine, lock = tmp_path / "mine.txt", tmp_path / ".lock"
    mine.write_text("years of work")
    make(lock, mine)
    before = content_of(tmp_path)
    with (
        pytest.raises(FileExistsError, match=r"\.lock must be a lock file.*left as it is"),
        locked(lock, "x"),
    ):
        pytest.fail("locked")
    assert content_of(tmp_path) == before


@pytest.mark.parametrize("content", ["", HOLDER, "dti score (process 1)"])
def test_a_lock_that_a_killed_process_left_is_taken(tmp_path: Path, content: str) -> None:
    lock = tmp_path / ".lock"
    lock.write_text(content)
    with locked(lock, "dti train"):
        assert "dti train (process" in lock.read_text()
    assert not lock.exists()


def test_the_holder_s_own_line_is_one_that_the_next_accepts(tmp_path: Path) -> None:
    with locked(tmp_path / ".lock", "dti fetch-model"):
        assert locks._HOLDER.fullmatch((tmp_path / ".lock").read_bytes())


def test_a_lock_that_was_exchanged_meanwhile_stays(tmp_path: Path) -> None:
    """Whatever had its name at the end was deleted."""
    with locked(tmp_path / ".lock", "x"):
        (tmp_path / ".lock").unlink()
        (tmp_path / ".lock").write_text("mine")
    assert (tmp_path / ".lock").read_text() == "mine"


def test_locks_of_runs_outputs_and_prepared_folders_are_such_locks(
    tmp_path: Path, run_scorer: Scorer, requests_file: Path
) -> None:
    (tmp_path / ".out.jsonl.lock").symlink_to(requests_file)
    before = content_of(tmp_path)
    with pytest.raises(FileExistsError, match=r"\.out\.jsonl\.lock must be a lock file"):
        score(run_scorer, requests_file, tmp_path / "out.jsonl")
    (tmp_path / ".data.lock").write_text("mine")
    before[".data.lock"] = b"mine"
    with (
        pytest.raises(FileExistsError, match=r"\.data\.lock must"),
        locked_beside(tmp_path / "data", "dti prepare"),
    ):
        pytest.fail("locked")
    assert content_of(tmp_path) == before


def test_folders_that_a_lock_made_go_again_if_nothing_came_into_them(tmp_path: Path) -> None:
    """A failed `dti score` left the folders of its --output."""
    for kept in (False, True):
        with locked(tmp_path / "a" / "b" / ".lock", "x"):
            if kept:
                (tmp_path / "a" / "file").touch()
    assert content_of(tmp_path) == {"a": None, "a/file": b""}


def test_a_failed_job_leaves_no_folder(run_scorer: Scorer, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        score(run_scorer, tmp_path / "none.jsonl", tmp_path / "a" / "b" / "out.jsonl")
    assert content_of(tmp_path) == {}


def test_a_folder_that_takes_no_files_is_an_error() -> None:
    """Not a loop without end: /proc has no folder missing, and says so of every file."""
    with pytest.raises(FileNotFoundError), locked(Path("/proc/.out.lock"), "x"):
        pytest.fail("locked")


FOREIGN_NAMES = [
    ".out.20261126.incomplete",
    ".out.abcdefgh.removed",
    ".out.dti-0123456789abcdeF.incomplete",
    ".out.dti-0123456789abcdef.incomplete.txt",
    ".out.dti-0123456789abcde.removed",
    ".our.dti-0123456789abcdef.removed",
]


@pytest.mark.parametrize("name", FOREIGN_NAMES)
def test_hidden_folders_of_others_are_no_leftovers(tmp_path: Path, name: str) -> None:
    """Eight characters and an ending were enough to be deleted, so a date was."""
    (tmp_path / name).mkdir()
    (tmp_path / name / "file").write_text("mine")
    with whole_folder(tmp_path / "out"), whole_file(tmp_path / "out.x"):
        pass
    assert (tmp_path / name / "file").read_text() == "mine"
    assert not files.is_temporary(tmp_path / name) or name.startswith(".our.")


def test_names_with_dots_and_brackets_have_leftovers_too(tmp_path: Path) -> None:
    name = "a+[1](b).jsonl"
    for ending in ("incomplete", "removed"):
        (tmp_path / f".{name}.dti-0123456789abcdef.{ending}").mkdir()
    files.remove_leftovers(tmp_path / name)
    assert content_of(tmp_path) == {}


@pytest.mark.parametrize(
    "content", ["mine", '{"a": 1}', '{"a": 1, "sha256": "0"}'], ids=["text", "JSON", "another seal"]
)
def test_a_job_file_of_somebody_is_refused(
    run_scorer: Scorer, requests_file: Path, tmp_path: Path, content: str
) -> None:
    """It was overwritten, and deleted at the end."""
    (tmp_path / "out.jsonl.job").write_text(content)
    before = content_of(tmp_path)
    with pytest.raises(FileExistsError, match=r"out\.jsonl\.job exists and is not a file of `dti score`"):
        score(run_scorer, requests_file, tmp_path / "out.jsonl")
    files.write_sealed(tmp_path / "out.jsonl.job", {"made by": "another command"})
    with pytest.raises(FileExistsError, match=r"out\.jsonl\.job exists and is not a file of `dti score`"):
        score(run_scorer, requests_file, tmp_path / "out.jsonl")
    assert content_of(tmp_path).keys() == before.keys()


@pytest.mark.parametrize("name", ["out.jsonl.job", "out.jsonl.partial"])
def test_links_in_the_place_of_a_job_s_files_are_refused(
    run_scorer: Scorer, requests_file: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their targets were overwritten."""
    broken_off(run_scorer, requests_file, tmp_path / "out.jsonl", monkeypatch)
    (tmp_path / name).rename(tmp_path / "target")
    (tmp_path / name).symlink_to("target")
    before = content_of(tmp_path)
    with pytest.raises(FileExistsError, match=rf"{name} must be a regular file"):
        score(run_scorer, requests_file, tmp_path / "out.jsonl")
    assert content_of(tmp_path) == before


def test_a_job_file_that_a_killed_call_left_alone_is_taken(
    run_scorer: Scorer, requests_file: Path, whole_scores: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = requests_file.with_name("out.jsonl")
    partial, _ = broken_off(run_scorer, requests_file, output, monkeypatch)
    partial.unlink()
    assert score(run_scorer, requests_file, output).resumed == 0
    assert output.read_bytes() == whole_scores


@pytest.mark.parametrize("without", ["nothing", "renameat2", "renameat2 and hard links"])
def test_an_output_that_comes_meanwhile_stays(
    run_scorer: Scorer,
    requests_file: Path,
    whole_scores: bytes,
    monkeypatch: pytest.MonkeyPatch,
    without: str,
) -> None:
    """It was replaced when the scores were complete."""
    output = requests_file.with_name("out.jsonl")

    def refused(*_: Any) -> None:
        raise PermissionError

    meanwhile(monkeypatch, 4, lambda: output.write_text("mine"))
    if without != "nothing":
        monkeypatch.setattr(renames, "_renamed", lambda *_: False)
    if "links" in without:
        monkeypatch.setattr(os, "link", refused)
    with pytest.raises(FileExistsError, match=r"out\.jsonl came while .* left as it is: move it away"):
        score(run_scorer, requests_file, output)
    assert output.read_text() == "mine"
    output.unlink()
    assert score(run_scorer, requests_file, output).resumed == 3 * CHUNK_LINES + 5
    assert output.read_bytes() == whole_scores
    assert set(content_of(output.parent)) == {"in.jsonl", "out.jsonl"}


def test_an_export_leaves_what_comes_meanwhile(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was deleted with the empty folder that it had come into, in the last moment too."""
    out = tmp_path / "out"
    write_card = export_module.write_card

    def and_somebody_writes(*arguments: Any, **options: Any) -> None:
        write_card(*arguments, **options)
        out.mkdir()
        (out / "mine").write_text("mine")

    monkeypatch.setattr(export_module, "write_card", and_somebody_writes)
    for last_look in (True, False):
        with pytest.raises(FileExistsError, match=r"out (exists and is not empty|came while)"):
            export_run(run_folder, out, **EXPORT)
        assert content_of(tmp_path) == {"out": None, "out/mine": b"mine"}
        (out / "mine").unlink()
        out.rmdir()
        if last_look:
            monkeypatch.setattr(whole, "_open_to_others", lambda *_: None)
            monkeypatch.setattr(export_module, "check_new_folder", lambda _: None)


def test_one_process_makes_an_export(run_folder: Path, tmp_path: Path) -> None:
    with (
        locked_beside(tmp_path / "out", "dti export"),
        pytest.raises(locks.LockedError, match="out is being written by dti export"),
    ):
        export_run(run_folder, tmp_path / "out", **EXPORT)


def test_the_current_folder_is_not_replaced_by_a_model(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shell stood in a folder that was deleted."""
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path / "in")
    for out in (Path(), Path("../in"), tmp_path / "in"):
        with pytest.raises(FileExistsError, match="is the current folder, or around it"):
            export_run(run_folder, out, **EXPORT)
        with pytest.raises(PretrainedModelError, match="is the current folder, or around it"):
            fetch_model("smollm2-135m", out)
    assert content_of(tmp_path) == {"in": None}


def test_a_fetched_model_leaves_what_comes_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(_: Any, made: Path) -> None:
        pretrained_folder(made)
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").write_text("mine")

    monkeypatch.setattr(fetch_module, "_from_hub", download)
    with pytest.raises(PretrainedModelError, match="out exists and is not empty"):
        fetch_model("smollm2-135m", tmp_path / "out")
    assert content_of(tmp_path) == {"out": None, "out/mine": b"mine"}


def test_what_is_replaced_leaves_its_mode(tmp_path: Path) -> None:
    """A private folder became one that everybody reads."""
    for mode in (0o700, 0o750, 0o500):
        folder, file = tmp_path / "folder", tmp_path / "file"
        folder.mkdir(exist_ok=True)
        file.touch()
        folder.chmod(mode)
        file.chmod(mode & 0o666)
        with whole_folder(folder) as made:
            assert made.stat().st_mode & 0o777 == mode | 0o700, "as private while it is made"
            (made / "a").touch()
        with whole_file(file) as made:
            assert made.stat().st_mode & 0o777 == mode & 0o666 | 0o600
        assert folder.stat().st_mode & 0o777 == mode
        assert file.stat().st_mode & 0o777 == mode & 0o666
        with whole_folder(tmp_path / "empty", replace=False) as made:
            assert made.stat().st_mode & 0o777 in (0o755, 0o700)
        (tmp_path / "empty").chmod(0o700)


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_a_model_is_for_whom_the_umask_says(run_folder: Path, tmp_path: Path, umask: int) -> None:
    """Weights were readable for one user alone, whatever the umask."""
    before = os.umask(umask)
    try:
        export_run(run_folder, tmp_path / "out", **EXPORT)
        with whole_folder(tmp_path / "other") as made:
            for name, mode in (("private", 0o600), ("program", 0o700), ("own", 0o640)):
                (made / name).touch()
                (made / name).chmod(mode)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert set(modes.values()) == {0o666 & ~umask}, modes
    others = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "other").iterdir()}
    assert others == {"private": 0o666 & ~umask, "program": 0o700, "own": 0o640}
