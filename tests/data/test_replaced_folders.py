"""Folders that `prepare` may replace, and who may write: anything else in the way stays."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dti_model.cli import main
from dti_model.config import TrainConfig
from dti_model.data import DataError, PreparedData, build, prepare
from dti_model.model.run_folder import RunExistsError
from dti_model.training import search, train
from tests.data.log_files import small_log
from tests.data.prepared_folders import as_version_1, content_of, prepare_small

FOREIGN_STATS = {
    "another program's": '{"mean": 3, "files": {"a": 1}}',
    "a list": "[1, 2]",
    "a version alone": '{"format_version": 1}',
    "a version without tables": json.dumps(
        {"format_version": 1, "source": {}, "users": 1, "items": 1, "interactions": 1, "files": {}}
    ),
    "not JSON": "mean 3",
    "not text": "\udcff\udcfe",
    "nothing": "",
}


@pytest.mark.parametrize("stats", FOREIGN_STATS.values(), ids=FOREIGN_STATS)
def test_a_folder_that_happens_to_hold_stats_json_is_not_removed(
    tmp_path: Path, raw: Path, stats: str
) -> None:
    """It was once removed with everything in it: only the name of the file was looked at."""
    mine = tmp_path / "thesis"
    (mine / "chapters").mkdir(parents=True)
    (mine / "chapters" / "one.tex").write_text("years of work")
    (mine / "stats.json").write_bytes(stats.encode(errors="surrogateescape"))
    before = content_of(mine)
    with pytest.raises(DataError, match="thesis: exists and is not a prepared folder"):
        prepare_small(mine, raw)
    assert content_of(mine) == before


@pytest.mark.parametrize("version", [1, 2])
def test_an_older_prepared_folder_is_replaced(out: Path, raw: Path, version: int) -> None:
    """Also one of version 1, which cannot be opened any more, and one with damaged tables: making it again is the way out."""
    if version == 1:
        as_version_1(out)
        with pytest.raises(
            DataError, match=r"format version 1, this program reads 2 and 3\. Make the folder again"
        ):
            PreparedData.open(out)
    (out / "interactions.arrow").write_bytes(b"damaged")
    (out / "tokens" / f".{'0' * 16}.arrow.k3_x81ab").write_bytes(b"left by a killed process")
    prepare_small(out, raw, threshold=4)
    assert PreparedData.open(out).stats["threshold"] == 4
    assert [path.name for path in out.parent.glob(".*")] == []


@pytest.mark.parametrize(
    ("added", "named"),
    [
        (["notes.txt"], "notes.txt in it"),
        ([".hidden"], ".hidden in it"),
        (["runs/model.bin"], "runs/ in it"),
        (["tokenizer/mine.json"], "tokenizer/mine.json in it"),
        (["tokens/mine.arrow"], "tokens/mine.arrow in it"),
        (["tokens/deep/a.arrow"], "tokens/deep/ in it"),
        (["a", "b", "c", "d", "e"], "a, b, c and 2 more in it"),
    ],
)
@pytest.mark.parametrize("version", [1, 2])
def test_a_prepared_folder_with_other_files_in_it_is_not_removed(
    out: Path, raw: Path, added: list[str], named: str, version: int
) -> None:
    if version == 1:
        as_version_1(out)
    for name in added:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("mine")
    before = content_of(out)
    with pytest.raises(DataError, match="out: a prepared folder, but ") as error:
        prepare_small(out, raw)
    assert named in str(error.value)
    assert "would be lost" in str(error.value)
    assert content_of(out) == before


def test_an_empty_foreign_folder_and_a_link_to_a_folder_stay(out: Path, raw: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_text("mine")
    (out / "link").symlink_to(tmp_path / "elsewhere")
    (out / "empty").mkdir()
    with pytest.raises(DataError, match="but empty/, link/ in it would be lost"):
        prepare_small(out, raw)
    assert (tmp_path / "elsewhere" / "file").exists()


def test_a_file_that_comes_while_preparing_is_not_removed(
    out: Path, raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything is looked at again right before the swap: a long `prepare` leaves time to put something there."""
    save = build.save_tokenizer

    def save_and_add(*arguments: Any) -> None:
        save(*arguments)
        (out / "notes.txt").write_text("mine")

    monkeypatch.setattr(build, "save_tokenizer", save_and_add)
    with pytest.raises(DataError, match=r"notes\.txt in it would be lost"):
        prepare_small(out, raw, threshold=4)
    assert (out / "notes.txt").read_text() == "mine"
    assert PreparedData.open(out).stats["threshold"] == 3
    assert [path.name for path in out.parent.glob(".*")] == []


def test_a_link_to_a_folder_stays_a_link(out: Path, raw: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("out")
    (tmp_path / "new").symlink_to("disk/data")
    prepare_small(tmp_path / "link", raw, threshold=4)
    prepare_small(tmp_path / "new", raw, threshold=2)
    assert (tmp_path / "link").is_symlink()
    assert PreparedData.open(out).stats["threshold"] == 4
    assert PreparedData.open(tmp_path / "disk" / "data").stats["threshold"] == 2
    (tmp_path / "file").write_text("mine")
    (tmp_path / "to_file").symlink_to("file")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(DataError, match="to_file: exists and is not a prepared folder"):
        prepare_small(tmp_path / "to_file", raw)
    with pytest.raises(DataError, match="loop: cannot be written"):
        prepare_small(tmp_path / "loop", raw)


@pytest.mark.parametrize("name", [".", "", "tokens/..", "./"])
def test_the_current_folder_is_not_replaced(
    out: Path, raw: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """It would pull the floor from under the shell; once it was a traceback about an invalid path."""
    monkeypatch.chdir(out)
    with pytest.raises(DataError, match="is the current folder, or around it, and cannot be replaced"):
        prepare_small(Path(name), raw)
    monkeypatch.chdir(out / "tokens")
    with pytest.raises(DataError, match=r"\.\.: is the current folder, or around it"):
        prepare_small(Path(".."), raw)
    assert PreparedData.open(out).stats["threshold"] == 3


def test_the_root_folder_is_refused(raw: Path) -> None:
    with pytest.raises(DataError, match=r"^/: exists and is not a prepared folder"):
        prepare_small(Path("/"), raw)


def test_a_second_prepare_is_told_of_the_first(out: Path, raw: Path, capsys: pytest.CaptureFixture) -> None:
    code = (
        f"from pathlib import Path\nfrom dti_model.data import build\n"
        f"with build.locked_place(Path({str(out)!r})):\n    print('ready', flush=True)\n    import time; time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline().strip() == "ready"
        command = ["prepare", "ml-1m", "--raw-dir", str(raw), "--subset", "--out", str(out)]
        assert main(command) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{out} is being written by dti prepare (process {process.pid} on" in line
    finally:
        process.kill()
        process.wait()
    assert main(command) == 0
    assert [path.name for path in out.parent.glob(".*")] == []


def test_nothing_is_made_inside_another_folder_s_own_files(
    small_folder: Path, run_folder: Path, tmp_path: Path
) -> None:
    """It went with the next run, or was taken for a part of the model or the tokenizer."""
    for place in (
        small_folder / "tokenizer" / "new",
        run_folder / "model" / "new",
        run_folder / "checkpoints",
    ):
        with pytest.raises(DataError, match=r"is a place of .*'s own files: choose another name"):
            prepare(small_log(tmp_path), place, min_context=0)
        config = TrainConfig(data=small_folder, out=place)
        with pytest.raises(RunExistsError, match=r"is a place of .*'s own files: choose another name"):
            train(config)
        with pytest.raises(RunExistsError, match=r"is a place of .*'s own files: choose another name"):
            search(config, {"window": [3]}, [0])
    assert not (small_folder / "tokenizer" / "new").exists()
