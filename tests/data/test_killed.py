"""Real processes of `dti prepare` are killed and starved of disk: the older folder stays, nothing hidden does, and the same command goes on."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from dti_model import downloads
from dti_model.cli import main
from dti_model.data import DataError, PreparedData, build
from dti_model.data.sources import movielens
from dti_model.data.text_encoder import TextEncoder
from dti_model.data.tokens import train_tokenizer
from dti_model.files import whole
from tests.data.log_files import write_amazon
from tests.data.movielens_files import some_ratings
from tests.data.prepared_folders import content_of

# A server imports once; every process that is killed starts from it.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["dti_model.training.driver", "dti_model.cli"])


def command(out: Path, raw: Path | None, *more: str) -> list[str]:
    given = [] if raw is None else ["--raw-dir", str(raw)]
    return ["prepare", "ml-1m", *given, "--subset", "--out", str(out), "--vocab-size", "270", *more]


def hidden(*folders: Path) -> list[str]:
    return [path.name for folder in folders for path in folder.iterdir() if path.name.startswith(".")]


def ended(target: Any, *arguments: Any) -> Any:
    process = PROCESSES.Process(target=target, args=arguments)
    process.start()
    process.join(120)
    return process.exitcode


MOMENTS: dict[str, tuple[Any, str]] = {
    "locked": (movielens.MovieLens, "load"),
    "a table": (build, "write_table"),
    "the tokenizer": (build, "save_tokenizer"),
    "stats": (build, "write_stats"),
    "the token cache": (TextEncoder, "encode_all"),
    "the disk": (whole, "_flush"),
    "the swap": (whole, "exchanged"),
    "the removal": (whole.shutil, "rmtree"),
}


def killed_at(moment: str, count: int, arguments: list[str]) -> None:
    """`dti`, ended by SIGKILL before (the swap also: after) the `count`-th call of a function."""
    module, name = MOMENTS[moment]
    original, calls = getattr(module, name), [0]

    def kill(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if moment == "the swap" and count == 2:
            original(*args, **kwargs)
        elif calls[0] < count:
            return original(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(module, name, kill)
    main(arguments)


@pytest.mark.parametrize(
    ("moment", "count"),
    [
        *((moment, 1) for moment in MOMENTS),
        ("a table", 3),
        ("the disk", 9),
        ("the swap", 2),
    ],
)
def test_a_killed_prepare_leaves_nothing_that_stays(
    tmp_path: Path, raw: Path, moment: str, count: int
) -> None:
    """Hidden folders of killed calls once stayed for ever, each as large as the data."""
    out = tmp_path / "out"
    assert main(command(out, raw, "--threshold", "2")) == 0
    for _ in range(2):
        assert ended(killed_at, moment, count, command(out, raw)) == -signal.SIGKILL
        after = moment == "the removal" or (moment, count) == ("the swap", 2)
        assert PreparedData.open(out).stats["threshold"] == (3 if after else 2)
        assert hidden(tmp_path)
    assert main(command(out, raw, "--threshold", "4")) == 0
    assert PreparedData.open(out).stats["threshold"] == 4
    assert hidden(tmp_path, out, out / "tokens") == []


@pytest.mark.parametrize("moment", ["stats", "the swap"])
def test_a_killed_extension(tmp_path: Path, raw: Path, moment: str) -> None:
    """Nothing is at the place of the new folder, or what was there; the folder to extend is as it was; the same command makes it."""
    older, out = tmp_path / "old", tmp_path / "new"
    assert main(command(older, raw)) == 0
    (tmp_path / "log.csv").write_text("user,item,rating,timestamp\n1,1,5,99\n")
    (tmp_path / "items.csv").write_text("item,title,genres\n1,Toy Story,Comedy\n")
    files = [
        f"--{name}={tmp_path / file}" for name, file in (("interactions", "log.csv"), ("items", "items.csv"))
    ]
    arguments = ["prepare", "custom", f"--extend={older}", *files, f"--out={out}"]
    if moment == "the swap":
        assert main(arguments) == 0
    before = content_of(older), content_of(out)
    assert ended(killed_at, moment, 1, arguments) == -signal.SIGKILL
    assert (content_of(older), content_of(out)) == before
    assert out.exists() == (moment == "the swap")
    assert main(arguments) == 0
    assert PreparedData.open(out).chain[0] == PreparedData.open(older).fingerprint
    assert hidden(tmp_path, older, out) == []


def test_a_prepare_that_is_killed_at_random_moments(tmp_path: Path, raw: Path) -> None:
    rng, out = random.Random(0), tmp_path / "out"
    for _ in range(8):
        process = PROCESSES.Process(target=main, args=(command(out, raw),))
        process.start()
        time.sleep(rng.uniform(0.0, 0.6))
        process.kill()
        process.join()
        if out.exists():
            PreparedData.open(out)
    assert main(command(out, raw)) == 0
    PreparedData.open(out)
    assert hidden(tmp_path, out, out / "tokens") == []


def killed_download(raw: Path, arguments: list[str]) -> None:
    def urlopen(*_: Any, **__: Any) -> io.BytesIO:
        (folder,) = Path(tempfile.gettempdir()).glob(".dti-fetch-*")
        shutil.copy(raw / "ratings.dat", folder / "half")
        os.kill(os.getpid(), signal.SIGKILL)
        return io.BytesIO()

    downloads.urllib.request.urlopen = urlopen
    main(arguments)


def test_a_killed_download_leaves_nothing_that_stays(
    tmp_path: Path, raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Downloads of killed calls once filled the folder for temporary files, one folder a call."""
    downloads = tmp_path / "tmp"
    downloads.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(downloads))
    arguments = command(tmp_path / "out", None)
    for _ in range(2):
        assert ended(with_downloads, downloads, raw, arguments) == -signal.SIGKILL
        (left,) = downloads.iterdir()
        assert os.listdir(left) == ["half"]
    seen = []

    def fetched(name: str, folder: Path) -> Path:
        seen.extend(downloads.iterdir())
        assert seen == [folder]
        return raw

    monkeypatch.setattr(movielens, "fetch", fetched)
    assert main(arguments) == 0
    assert len(seen) == 1
    assert list(downloads.iterdir()) == []


def with_downloads(downloads: Path, raw: Path, arguments: list[str]) -> None:
    tempfile.tempdir = str(downloads)
    killed_download(raw, arguments)


def test_pip_keeps_its_own_temporary_files_in_the_download_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed pip leaves folders where TMPDIR says."""

    def run(command: list[str], env: dict[str, str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert env["TMPDIR"] == str(tmp_path)
        assert env["PATH"] == os.environ["PATH"]
        return subprocess.CompletedProcess(command, 1, "", "no such wheel")

    monkeypatch.setattr(downloads.subprocess, "run", run)
    with pytest.raises(downloads.FetchError, match="no such wheel"):
        downloads.wheel_from_index("a==1", "0", tmp_path)


def with_little_room(size: int, arguments: list[str], pipe: Any) -> None:
    """No file may become larger than `size` bytes: what a full disk does, for one process."""
    said = io.StringIO()
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        status = main(arguments)
    pipe.send((status, said.getvalue()))


def test_a_full_disk_is_one_line_whatever_is_being_written(tmp_path: Path) -> None:
    """The tokenizer's file once ended in a traceback: its library raises a bare Exception."""
    reviews, meta = write_amazon(tmp_path / "raw", some_ratings(), zipped=False)
    reviews.write_text(reviews.read_text() + '{"asin": "so that there is a file of rejected rows"}\n' * 400)
    out = tmp_path / "out"
    arguments = ["prepare", "amazon", "--reviews", str(reviews), "--meta", str(meta), "--out", str(out)]
    arguments += ["--max-rejected", "1", "--vocab-size", "400"]
    assert main([*arguments, "--threshold", "3"]) == 0
    sizes = {path.stat().st_size for path in out.rglob("*") if path.is_file()}
    largest = max(sizes)
    tried = {0, 1, 100, *(size - 1 for size in sizes), *(size // 2 for size in sizes)} - {largest}
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for size in sorted(tried):
        receive, send = multiprocessing.Pipe()
        assert ended(with_little_room, size, arguments, send) == 0, size
        status, said = receive.recv()
        assert status == 2
        assert "cannot be written (" in said
        assert "Nothing half written is left: make room and give the same command again" in said
        assert str(out) in said
        assert len(said.splitlines()) == 1
        assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
        assert hidden(tmp_path, out, out / "tokens") == []
    assert main(arguments) == 0
    assert PreparedData.open(out).stats["threshold"] == 4


def cache_with_little_room(size: int, out: Path, pipe: Any) -> None:
    data = PreparedData.open(out)
    tokenizer = train_tokenizer(data.item_texts, 300)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    try:
        data.token_ids(tokenizer)
    except DataError as error:
        pipe.send(str(error))


@pytest.mark.parametrize("size", [0, 500])
def test_a_full_disk_and_the_token_cache(tmp_path: Path, raw: Path, size: int) -> None:
    out = tmp_path / "out"
    assert main(command(out, raw)) == 0
    before = sorted(os.listdir(out / "tokens"))
    receive, send = multiprocessing.Pipe()
    assert ended(cache_with_little_room, size, out, send) == 0
    assert receive.poll()
    assert "tokens: cannot write the token cache (File too large). Make room" in receive.recv()
    assert sorted(os.listdir(out / "tokens")) == before


def test_the_command_itself_when_it_is_killed(tmp_path: Path, raw: Path) -> None:
    """`dti prepare` as a process of its own, killed while it holds the lock: the next one does not wait for a dead one."""
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-m", "dti_model.cli", *command(out, raw)])
    deadline = time.monotonic() + 60
    while not (tmp_path / ".out.lock").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.005)
    process.kill()
    assert process.wait() in (-signal.SIGKILL, 0)
    assert main(command(out, raw)) == 0
    assert hidden(tmp_path) == []
