"""A scoring job that something happens to: it ends with the bytes of an unbroken one, or with one line that says what to do."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import multiprocessing
import os
import random
import re
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dti_model.cli import main
from dti_model.data import prepare
from dti_model.files import DamagedFileError, LockedError, WriteError, locked
from dti_model.model.run import Run
from dti_model.scorer import Scorer
from dti_model.scorer.file import CHUNK_LINES
from dti_model.scorer.job import Job
from tests.data.movielens_files import some_ratings, write_1m
from tests.scorer.scoring_jobs import (
    Stop,
    assert_same,
    broken_off,
    command,
    meanwhile,
    requests,
    run_command,
    score,
    started,
    stop,
    write_jsonl,
)

NUM_LINES = 3 * CHUNK_LINES + 5  # of requests_file


def test_a_second_process_is_told_who_writes(run_folder: Path, run_scorer: Scorer, tmp_path: Path) -> None:
    """Two calls with one --output gave twice as many lines, interleaved."""
    requests_file, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_jsonl(requests_file, requests(1_500))
    process = started(run_command, command(run_folder, requests_file, output))
    while not output.with_name("out.jsonl.partial").exists():
        assert process.is_alive()
        time.sleep(0.01)
    expected = rf"out.jsonl is being written by dti score \(process {process.pid} on .*choose another"
    link = tmp_path / "link.jsonl"
    link.symlink_to(output)
    for name in (output, link):
        with pytest.raises(LockedError, match=expected):
            score(run_scorer, requests_file, name)
    process.join()
    assert process.exitcode == 0
    lines = [json.loads(line)["line"] for line in output.read_text().splitlines()]
    assert lines == list(range(1, 1_501))
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", "out.jsonl", "link.jsonl"}


def test_a_lock_ends_with_its_process(run_scorer: Scorer, requests_file: Path, whole_scores: bytes) -> None:
    output = requests_file.with_name("out.jsonl")
    lock = requests_file.with_name(".out.jsonl.lock")
    lock.write_text("dti score (process 1)")  # what a kill leaves
    with locked(lock, "dti score", output), pytest.raises(LockedError):
        score(run_scorer, requests_file, output)
    score(run_scorer, requests_file, output)
    assert output.read_bytes() == whole_scores
    assert not lock.exists()


def test_another_job_is_told_what_differs(
    run_folder: Path, run_scorer: Scorer, requests_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prepared data, weights and settings exchanged under a job were not noticed: half of the output was of the other ones."""
    output = requests_file.with_name("out.jsonl")
    partial, _ = broken_off(run_scorer, requests_file, output, monkeypatch)
    kept = partial.read_bytes()
    model = run_scorer.click_model
    changed = {
        name: dataclasses.replace(model, prompt=dataclasses.replace(model.prompt, window=3))
        for name in ("prompt format",)
    }
    changed["dti settings"] = dataclasses.replace(model, dti=dataclasses.replace(model.dti, alpha_max=0.25))
    others = [(name, Scorer(other)) for name, other in changed.items()]
    others.append(("token budget (16384, not 500)", Scorer(model, 500)))
    again = Run.load(run_folder, device="cpu")
    with torch.no_grad():
        next(again.model.parameters())[0, 0] += 1e-3
    others.append(("weights", Scorer(again)))
    again = Run.load(run_folder, device="cpu")
    again.tokenizer.add_tokens(["Toy Story"])
    others.append(("tokenizer", Scorer(again)))
    again = Run.load(run_folder, device="cpu")
    again.data.stats["files"] = {"interactions.arrow": {"bytes": 7, "sha256": "0" * 64}}
    others.append(("prepared data", Scorer(again)))
    for name, other in others:
        with pytest.raises(
            FileExistsError, match=rf"belongs to a job with another {re.escape(name)}: delete it and"
        ):
            score(other, requests_file, output)
        assert partial.read_bytes() == kept
    assert score(run_scorer, requests_file, output).resumed == 2 * CHUNK_LINES


def test_prepared_data_that_the_run_was_not_trained_on(
    run_folder: Path,
    run_scorer: Scorer,
    requests_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Another data set behind the same ids was scored without a word, also in the middle of a job."""
    folder = tmp_path_factory.mktemp("other")
    raw = write_1m(folder / "raw", some_ratings(num_users=60, seed=1))
    prepare("ml-1m", folder / "data", raw, subset=True, vocab_size=400)
    output = requests_file.with_name("out.jsonl")
    broken_off(run_scorer, requests_file, output, monkeypatch)
    arguments = [*command(run_folder, requests_file, output), f"--data={folder / 'data'}"]
    capsys.readouterr()
    for more, message in (
        ([], "is not the prepared data that"),
        (["--other-data"], "out.jsonl.partial belongs to a job with another prepared data: delete it"),
    ):
        assert main([*arguments, *more]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert (
        main([*arguments[:3], f"--output={output.with_name('other.jsonl')}", *arguments[4:], "--other-data"])
        == 0
    )


def test_a_moved_input_and_a_reloaded_run_are_the_same_job(
    run_folder: Path,
    run_scorer: Scorer,
    requests_file: Path,
    whole_scores: bytes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = requests_file.with_name("out.jsonl")
    broken_off(run_scorer, requests_file, output, monkeypatch)
    moved = requests_file.with_name("moved.jsonl")
    requests_file.rename(moved)
    moved.touch()
    assert score(Scorer.from_run(run_folder, device="cpu"), moved, output).resumed == 2 * CHUNK_LINES
    assert output.read_bytes() == whole_scores


def test_skipped_lines_are_not_taken_over_by_a_job_that_stops_at_them(
    run_scorer: Scorer, requests_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = requests_file.read_text().splitlines()
    lines[3] = "bad"
    write_jsonl(requests_file, lines)
    output = requests_file.with_name("out.jsonl")
    meanwhile(monkeypatch, 2, stop)
    with pytest.raises(Stop):
        score(run_scorer, requests_file, output, skip_bad_lines=True)
    monkeypatch.undo()
    with pytest.raises(FileExistsError, match=r"another --bad-lines \(skip, not stop\)"):
        score(run_scorer, requests_file, output)
    done = score(run_scorer, requests_file, output, skip_bad_lines=True)
    assert (done.resumed, done.bad) == (CHUNK_LINES, 1)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_flipped_bit_changes_nothing_or_is_named(
    run_scorer: Scorer, requests_file: Path, whole_scores: bytes, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    """It was a traceback, a message without a file name, or other probabilities."""
    output = requests_file.with_name("out" + suffix)
    partial, job = broken_off(run_scorer, requests_file, output, monkeypatch)
    contents = {path: path.read_bytes() for path in (partial, job)}
    rng = random.Random(0)
    for path, places in ((partial, 12), (job, 40)):
        for _ in range(places):
            for each, content in contents.items():
                each.write_bytes(content)
            flipped = bytearray(contents[path])
            place = rng.randrange(8 * len(flipped))
            flipped[place // 8] ^= 1 << place % 8
            path.write_bytes(flipped)
            if path == job:
                with pytest.raises(
                    DamagedFileError,
                    match=rf"{job.name} is damaged: .* Delete it and {partial.name} to start anew",
                ):
                    score(run_scorer, requests_file, output)
                continue
            score(run_scorer, requests_file, output)
            assert_same(output, whole_scores)
            output.unlink()


def test_bits_that_flip_after_they_were_read(
    run_scorer: Scorer, requests_file: Path, whole_scores: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The records are read back before the output appears."""
    output, partial = requests_file.with_name("out.jsonl"), requests_file.with_name("out.jsonl.partial")

    def damage() -> None:
        content = bytearray(partial.read_bytes())
        content[100] ^= 4
        partial.write_bytes(content)

    meanwhile(monkeypatch, 4, damage)
    with pytest.raises(DamagedFileError, match=r"out.jsonl.partial is damaged behind line 0 of 197"):
        score(run_scorer, requests_file, output)
    monkeypatch.undo()
    assert not output.exists()
    score(run_scorer, requests_file, output)
    assert output.read_bytes() == whole_scores


@pytest.mark.parametrize("lines", [[1, 2, 2, 3], [1, 3], [2, 1], [0, 1], [1, 2, 3, 4, 5]])
def test_only_complete_and_ordered_records_become_an_output(tmp_path: Path, lines: list[int]) -> None:
    job = Job(tmp_path / "out.jsonl", {}, skip_bad_lines=False)
    job.resume()
    job.append([{"line": line, "user": None, "probabilities": []} for line in lines])
    with pytest.raises(DamagedFileError, match=r"out.jsonl.partial"):
        job.publish(4)
    assert not job.output.exists()


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_kill_right_behind_the_last_renaming(
    run_scorer: Scorer, requests_file: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    """The output was complete, and the same command said that it exists; what lay beside it stayed there."""
    output = requests_file.with_name("out" + suffix)
    for removed in ((), ("partial",)):
        monkeypatch.setattr(Job, "drop", lambda job: stop())

        with pytest.raises(Stop):
            score(run_scorer, requests_file, output)
        monkeypatch.undo()
        content = output.read_bytes()
        for name in removed:
            output.with_name(f"{output.name}.{name}").unlink()
        done = score(run_scorer, requests_file, output)
        assert (done.lines, done.resumed) == (NUM_LINES, NUM_LINES)
        assert output.read_bytes() == content
        assert {path.name for path in requests_file.parent.iterdir()} == {"in.jsonl", output.name}
        with pytest.raises(FileExistsError, match=r"exists: choose another --output"):
            score(run_scorer, requests_file, output)
        output.unlink()


def test_an_output_that_is_not_the_job_s(
    run_scorer: Scorer, requests_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = requests_file.with_name("out.jsonl")
    broken_off(run_scorer, requests_file, output, monkeypatch)
    output.write_text("mine")
    with pytest.raises(FileExistsError, match=r"out.jsonl exists: choose another --output"):
        score(run_scorer, requests_file, output)
    assert output.read_text() == "mine"


def score_with_little_room(room: int, arguments: list[str], pipe: Any) -> None:
    """No file may become larger than `room`: what a full disk does, for one process."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        status = run_command(arguments)
    pipe.send((status, errors.getvalue()))


@pytest.mark.parametrize("room", [100, 1_000, 5_000, 12_000])
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(
    run_folder: Path,
    run_scorer: Scorer,
    requests_file: Path,
    whole_scores: bytes,
    room: int,
) -> None:
    output = requests_file.with_name("out.jsonl")
    assert len(whole_scores) > room
    receive, send = multiprocessing.Pipe()
    started(score_with_little_room, room, command(run_folder, requests_file, output), send).join()
    assert receive.poll(1), "it ended otherwise"
    status, error = receive.recv()
    assert status == 2, error
    assert error.count("\n") == 1, error
    assert re.match(
        r"dti score: error: \S+out.jsonl(\.job|\.partial)? cannot be written \(.*make room", error
    )
    assert not output.exists()
    score(run_scorer, requests_file, output)
    assert output.read_bytes() == whole_scores
    assert {path.name for path in requests_file.parent.iterdir()} == {"in.jsonl", "out.jsonl"}


def test_a_disk_that_is_full_when_the_output_appears(
    run_scorer: Scorer, requests_file: Path, whole_scores: bytes
) -> None:
    """The chunks fit, and their copy does not."""
    output = requests_file.with_name("out.parquet")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    original = Job.publish

    def publish(job: Job, num_lines: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_500, limit[1]))
        try:
            original(job, num_lines)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Job, "publish", publish)
        with pytest.raises(WriteError, match=r"out.parquet cannot be written \(.*make room"):
            score(run_scorer, requests_file, output)
    assert {path.name for path in requests_file.parent.iterdir()} == {
        "in.jsonl",
        "out.parquet.job",
        "out.parquet.partial",
    }
    assert score(run_scorer, requests_file, output).resumed == NUM_LINES
    assert_same(output, whole_scores)


def killed_before(count: int, arguments: list[str]) -> None:
    """SIGKILL this process right before its `count`-th flush, renaming, cut or removal of a file."""
    calls = [0]

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            if calls[0] == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return call

    for name in ("fsync", "replace", "truncate", "write"):
        setattr(os, name, counted(getattr(os, name)))
    Path.unlink = counted(Path.unlink)  # type: ignore[method-assign]
    sys.exit(run_command(arguments))


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_sigkill_before_every_change_of_a_file(
    run_folder: Path, run_scorer: Scorer, requests_file: Path, whole_scores: bytes, suffix: str
) -> None:
    output = requests_file.with_name("out" + suffix)
    for count in range(1, 100):
        process = started(killed_before, count, command(run_folder, requests_file, output))
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        if not output.exists() or output.with_name(output.name + ".job").exists():
            score(run_scorer, requests_file, output)
        assert_same(output, whole_scores)
        output.unlink()
        # At most a lock that nobody holds, which the next call takes.
        assert {path.name for path in requests_file.parent.iterdir()} <= {"in.jsonl", f".{output.name}.lock"}
    assert count > 15


@pytest.mark.slow
def test_sigkill_at_random_moments(run_folder: Path, requests_file: Path, whole_scores: bytes) -> None:
    output, rng, kills = requests_file.with_name("out.jsonl"), random.Random(0), 0
    for _ in range(60):
        if output.exists() and not output.with_name("out.jsonl.job").exists():
            if kills:
                break
            output.unlink()  # it ended before it could be killed
        process = started(run_command, command(run_folder, requests_file, output))
        before = _size(output)
        while process.is_alive() and _size(output) == before:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.02))
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        assert process.exitcode in (0, -signal.SIGKILL)
    assert kills
    assert output.read_bytes() == whole_scores


def _size(output: Path) -> int:
    partial = output.with_name(output.name + ".partial")
    return partial.stat().st_size if partial.exists() else -1
