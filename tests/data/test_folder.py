"""Prepared folders on disk: what `prepare` may replace, who may write, flipped bits, and token caches."""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dti_model.cli import main
from dti_model.data import DataError, PreparedData, build, folder, prepare, store
from dti_model.data.tokens import train_tokenizer
from dti_model.files import checked as files
from tests.data.movielens_files import some_ratings, write_1m


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return write_1m(tmp_path / "raw", [*some_ratings(), (1, 7, 3, 1)])


@pytest.fixture
def out(tmp_path: Path, raw: Path) -> Path:
    prepare_small(tmp_path / "out", raw)
    return tmp_path / "out"


def prepare_small(out: Path, raw: Path, **settings: Any) -> None:
    prepare("ml-1m", out, raw, subset=True, vocab_size=270, **settings)


def content_of(path: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()
    }


def as_version_1(path: Path) -> None:
    """Rewrite stats.json and the token cache as version 1 of the format had them."""
    stats = json.loads((path / "stats.json").read_text())
    del stats["sha256"]
    stats["format_version"] = 1
    stats["files"] = {name: facts["bytes"] for name, facts in stats["files"].items()}
    (path / "stats.json").write_text(json.dumps(stats, indent=2) + "\n")
    for cache in (path / "tokens").iterdir():
        cache.rename(cache.with_name(f"{cache.name[:16]}.arrow"))


# -- what may be replaced -------------------------------------------------------------------------------------------------


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
            DataError, match=r"format version 1, this program reads 2\. Make the folder again"
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
        f"with build._locked(Path({str(out)!r})):\n    print('ready', flush=True)\n    import time; time.sleep(60)\n"
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


# -- damage ---------------------------------------------------------------------------------------------------------------


def test_every_flipped_bit_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flipped bit once changed labels, texts or counts in silence, or ended in a traceback of a library."""
    ratings = [*some_ratings(), (1, 7, 3, 1)]
    write_amazon_with_a_bad_line(tmp_path, ratings)
    out = tmp_path / "out"
    whole, stats = content_of(out), PreparedData.open(out).stats
    assert set(whole) == {
        "stats.json",
        *stats["files"],
        *(name for name in whole if name.startswith("tokens/")),
    }
    assert "rejected.csv" in whole
    rng, refused, the_same = random.Random(0), [], 0
    for name, content in whole.items():
        if name.startswith("tokens/"):
            continue
        for place in {0, len(content) - 1, *(rng.randrange(len(content)) for _ in range(60))}:
            changed = bytearray(content)
            changed[place] ^= 1 << rng.randrange(8)
            (out / name).write_bytes(changed)
            monkeypatch.setattr(folder, "_whole", set())
            try:
                data = PreparedData.open(out)
            except DataError as error:
                refused.append((str(out / name), str(error)))
            else:  # such as one blank of stats.json for another
                the_same += 1
                assert name == "stats.json"
                assert data.stats == stats
        (out / name).write_bytes(content)
    for path, message in refused:
        assert path in message
        assert "dti prepare" in message
        assert "\n" not in message
    assert len(refused) > 300
    assert the_same < 20


def write_amazon_with_a_bad_line(tmp_path: Path, ratings: list[Any]) -> None:
    """A prepared folder that has every kind of file."""
    from dti_model.data import AmazonFiles
    from tests.data.log_files import write_amazon

    reviews, meta = write_amazon(tmp_path / "amazon", ratings, zipped=False)
    reviews.write_text(reviews.read_text() + "{\n")
    prepare(AmazonFiles(reviews, meta, max_rejected=0.5), tmp_path / "out", vocab_size=270)


DAMAGED_STATS = [
    "",
    "{",
    "null",
    "3",
    '"text"',
    "[]",
    "{}",
    "[" * 5000,
    '{"a":' * 3000,
    '{"format_version": 2}',
    "\udcff",
]
DAMAGED_STATS += [
    '{"format_version": null}',
    '{"format_version": [2]}',
    '{"format_version": 1e400}',
    "9" * 5000,
]


@pytest.mark.parametrize("content", DAMAGED_STATS, ids=range(len(DAMAGED_STATS)))
def test_a_damaged_stats_file_is_one_line(
    out: Path, raw: Path, content: str, capsys: pytest.CaptureFixture
) -> None:
    """Open and prepare name it, and the way out that `open` names is one that works."""
    (out / "stats.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(DataError, match=r"stats\.json: ") as error:
        PreparedData.open(out)
    assert "\n" not in str(error.value)
    assert "Remove the folder and make it again with: dti prepare" in str(error.value)
    command = ["prepare", "ml-1m", "--raw-dir", str(raw), "--subset", "--out", str(out)]
    assert main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "exists and is not a prepared folder" in line
    shutil.rmtree(out)
    assert main(command) == 0


def test_every_changed_field_of_stats_is_found(out: Path) -> None:
    stats = json.loads((out / "stats.json").read_text())
    text = (out / "stats.json").read_text()
    for length in range(0, len(text) - 1, 97):
        (out / "stats.json").write_text(text[:length])
        with pytest.raises(DataError, match=r"stats\.json: "):
            PreparedData.open(out)
    for name in stats:
        for value in (None, -1, "text", [], {}, 1.5):
            (out / "stats.json").write_text(json.dumps({**stats, name: value}))
            with pytest.raises(DataError, match=r"stats\.json: "):
                PreparedData.open(out)


@pytest.mark.parametrize("name", ["files", "users", "items", "interactions", "source", "format_version"])
@pytest.mark.parametrize("value", [None, [], "text", {}, {"interactions.arrow": None}])
def test_sealed_fields_of_another_type_are_refused(out: Path, name: str, value: Any) -> None:
    """A seal says that nobody changed a file, not that its writer was right."""
    files.write_sealed(out / "stats.json", {**PreparedData.open(out).stats, name: value})
    with pytest.raises(
        DataError, match=r"stats\.json: its fields are not those of a prepared folder\. Remove"
    ):
        PreparedData.open(out)


@pytest.mark.parametrize("moment", ["check_whole", "read_table"])
def test_a_folder_that_is_made_again_while_it_is_opened(
    out: Path, raw: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """The stats of one and the files of the other were called damaged, or were mixed."""
    original, calls = getattr(store, moment), []

    def swapped(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            prepare_small(out, raw, threshold=4)
        return original(*arguments)

    monkeypatch.setattr(store, moment, swapped)
    data = PreparedData.open(out)
    monkeypatch.undo()
    again = PreparedData.open(out)
    assert data.stats == again.stats
    assert data.stats["threshold"] == 4
    assert np.array_equal(data.label, again.label)


def test_a_file_is_read_once_and_again_when_it_changed(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening a large folder ten times costs one pass over it; a file that changed later is noticed by the next open."""
    monkeypatch.setattr(folder, "_whole", set())
    read = []
    sha256_of = files.sha256_of
    monkeypatch.setattr(files, "sha256_of", lambda path: read.append(path.name) or sha256_of(path))
    stats = PreparedData.open(out).stats
    assert len(read) == len(stats["files"])
    PreparedData.open(out)
    assert len(read) == len(stats["files"])
    path = out / "interactions.arrow"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"interactions\.arrow is damaged"):
        PreparedData.open(out)
    path.write_bytes(content[:-1])
    with pytest.raises(DataError, match=r"interactions\.arrow: the file has"):
        PreparedData.open(out)


def test_data_that_is_open_keeps_what_it_shows(out: Path, raw: Path) -> None:
    """A run goes on with the files it has mapped when the folder is made again, and a new one sees the new files."""
    data = PreparedData.open(out)
    labels, texts = data.label.copy(), list(data.item_texts)
    prepare_small(out, raw, threshold=1)
    assert np.array_equal(data.label, labels)
    assert not np.array_equal(PreparedData.open(out).label, labels)
    tokenizer = train_tokenizer(texts, 300)
    data.token_ids(tokenizer)
    shutil.rmtree(out)
    assert np.array_equal(data.label, labels)
    assert data.token_ids(tokenizer)[0].size == len(texts) + 1  # nowhere to keep it


def test_fingerprint(out: Path, raw: Path, tmp_path: Path) -> None:
    """The same data have the same fingerprint, wherever they are; other labels, texts or pieces of text have another."""
    prepare_small(tmp_path / "again", raw)
    fingerprint = PreparedData.open(out).fingerprint
    assert len(fingerprint) == 64
    assert PreparedData.open(tmp_path / "again").fingerprint == fingerprint
    shutil.copytree(out, tmp_path / "copy")
    PreparedData.open(tmp_path / "copy").token_ids(train_tokenizer(["a"], 261))
    assert PreparedData.open(tmp_path / "copy").fingerprint == fingerprint
    prepare_small(tmp_path / "labels", raw, threshold=1)
    prepare("ml-1m", tmp_path / "pieces", raw, subset=True, vocab_size=280)
    (raw / "movies.dat").write_bytes((raw / "movies.dat").read_bytes().replace(b"Casino", b"Casina"))
    prepare_small(tmp_path / "texts", raw)
    others = {PreparedData.open(tmp_path / name).fingerprint for name in ("labels", "pieces", "texts")}
    assert len(others | {fingerprint}) == 4


# -- token caches ---------------------------------------------------------------------------------------------------------


def test_a_damaged_token_cache_is_made_again_and_said(
    out: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A flipped bit once put other tokens into every prompt. One line on the log; the ids are those of the tokenizer."""
    data = PreparedData.open(out)
    tokenizer = train_tokenizer(data.item_texts, 270)
    wanted = [array.copy() for array in data.token_ids(tokenizer)]
    (path,) = (out / "tokens").iterdir()
    content, rng = path.read_bytes(), random.Random(0)
    for place in {0, len(content) - 1, *(rng.randrange(len(content)) for _ in range(60))}:
        changed = bytearray(content)
        changed[place] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            found = PreparedData.open(out).token_ids(tokenizer)
        assert all(np.array_equal(a, b) for a, b in zip(found, wanted))
        assert caplog.messages == [f"{path} is damaged: it is made again"]
        assert path.read_bytes() == content
    for cut in (b"", content[:-1], content + b"\0"):
        path.write_bytes(cut)
        found = PreparedData.open(out).token_ids(tokenizer)
        assert all(np.array_equal(a, b) for a, b in zip(found, wanted))
    assert [path.name for path in (out / "tokens").iterdir()] == [path.name]


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EPERM])
@pytest.mark.parametrize("has_cache_folder", [True, False])
def test_token_ids_of_a_folder_that_may_not_be_written(
    out: Path, monkeypatch: pytest.MonkeyPatch, number: int, has_cache_folder: bool
) -> None:
    """A data set that several people share read-only once ended every run with another tokenizer."""
    data = PreparedData.open(out)
    tokenizer = train_tokenizer(data.item_texts, 300)
    wanted = PreparedData.open(out).token_ids(tokenizer)
    shutil.rmtree(out / "tokens")
    if has_cache_folder:
        (out / "tokens").mkdir()
    os_open, mkdir = os.open, os.mkdir

    def refusing_open(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if flags & os.O_CREAT:
            raise OSError(number, os.strerror(number), str(path))
        return os_open(path, flags, *rest, **named)

    def refusing_mkdir(path: Any, *rest: Any, **named: Any) -> None:
        if not os.path.exists(path):
            raise OSError(number, os.strerror(number), str(path))
        mkdir(path, *rest, **named)

    monkeypatch.setattr(os, "open", refusing_open)
    monkeypatch.setattr(os, "mkdir", refusing_mkdir)
    found = data.token_ids(tokenizer)
    assert all(np.array_equal(a, b) for a, b in zip(found, wanted))
    assert [array.dtype for array in found] == [array.dtype for array in wanted]
    assert not any(array.flags.writeable for array in found)
    assert list((out / "tokens").glob("*")) == []


def test_several_processes_write_one_cache(out: Path) -> None:
    shutil.rmtree(out / "tokens")
    code = f"""
from dti_model.data import PreparedData
from dti_model.data.tokens import train_tokenizer
data = PreparedData.open({str(out)!r})
tokenizer = train_tokenizer(data.item_texts, 265)
print("ready", flush=True)
input()
for _ in range(20):
    offsets, ids = data.token_ids(tokenizer)
    for path in (data.path / "tokens").glob("*.arrow"):
        path.unlink(missing_ok=True)
print(ids.sum(), offsets.sum())
"""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    printed = []
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        printed.append(process.communicate(timeout=120)[0])
        assert process.returncode == 0
    assert printed[0] == printed[1]
    assert [path.name for path in (out / "tokens").glob(".*")] == []
