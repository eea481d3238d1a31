"""Token ids kept in a prepared folder: damage, folders that may not be written, and several writers."""

from __future__ import annotations

import errno
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

from dti_model.data import DataError, PreparedData, prepare
from dti_model.data.tokens import train_tokenizer
from tests.data.log_files import small_log

TOKENIZER = train_tokenizer(["abc"], 300)


def test_what_is_in_the_way_of_cached_tokens_is_named(tmp_path: Path) -> None:
    """The way out was to make room on the disk."""
    prepare(small_log(tmp_path), tmp_path / "out", min_context=0)
    data = PreparedData.open(tmp_path / "out")
    before = set((tmp_path / "out" / "tokens").iterdir())
    data.token_ids(TOKENIZER)
    (cached,) = set((tmp_path / "out" / "tokens").iterdir()) - before
    cached.unlink()
    cached.mkdir()
    with pytest.raises(
        DataError, match=rf"tokens/{cached.name}: cannot write the token cache \(Is a dir.* in the way"
    ):
        data.token_ids(TOKENIZER)


def test_a_damaged_token_cache_is_made_again_and_said(out: Path, caplog: pytest.LogCaptureFixture) -> None:
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
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    number: int,
    has_cache_folder: bool,
) -> None:
    """A data set that several people share read-only ended every run with another tokenizer; then, no word said what that costs."""
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
    with caplog.at_level(logging.WARNING):
        found = data.token_ids(tokenizer)
    assert (
        "tokens may not be written: every process makes the token ids of this tokenizer anew" in caplog.text
    )
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
