"""Prepared folders on disk: flipped bits, damaged stats, files that change, and fingerprints."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dti_model.cli import main
from dti_model.data import DataError, PreparedData, folder, prepare, store
from dti_model.data.tokens import train_tokenizer
from dti_model.files import checked as files
from tests.data.movielens_files import some_ratings
from tests.data.prepared_folders import content_of, prepare_small


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
