"""The GPU suite without a GPU: its bookkeeping with steps that take a moment, and a rehearsal of all its real ones."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_suite
from benchmarks.gpu_steps import SKIPPED, SLOTS, Places, Step, steps_of
from benchmarks.gpu_suite import Call, environment_of, pack, run_steps, unpack
from tests.checkout import file_hashes
from tests.conftest import ROOT

AGREED = {"rows.jsonl", "log.txt", "summary.json", "tiles.json", "kept.tar.xz", "kept"}
# A child that a polite signal does not end, and the process that it is.
STUBBORN = """
import os, signal, subprocess, sys, time
code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
child = subprocess.Popen([sys.executable, "-c", code])
open(sys.argv[1], "w").write(f"{os.getpid()} {child.pid}")
"""
MakeStep = Callable[..., Step]


@pytest.fixture
def make_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeStep:
    """Makes a step of a few lines of Python, as a module in a folder that PYTHONPATH has already."""
    modules = tmp_path / "modules"
    modules.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(modules))

    def make(name: str, code: str, *arguments: str, limit: float = 20, least: float = 0, **more: Any) -> Step:
        (modules / f"step_{name}.py").write_text(code)
        return Step(name, f"step_{name}", arguments, limit, "a test", least=least, **more)

    return make


def call(tmp_path: Path, deadline_s: float = 60, **more: Any) -> Call:
    return Call(Places(tmp_path / "out"), {"k": "50"}, deadline_s, **more)


def statuses(entries: list[dict[str, Any]]) -> dict[str, str]:
    return {entry["step"]: entry["status"] for entry in entries}


def is_running(pid: int) -> bool:
    """Dead processes that nobody has waited for do not count."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def ends_soon(pids: list[int]) -> bool:
    for _ in range(100):
        if not any(map(is_running, pids)):
            return True
        time.sleep(0.05)
    return False


def test_failures_are_recorded_and_the_next_step_runs(tmp_path: Path, make_step: MakeStep) -> None:
    where = f"{tmp_path / 'out'}/rows.jsonl"
    steps = [
        make_step("crashes", "import os; print('so far'); os.abort()"),
        make_step("raises", f"raise ValueError('no ' + {where!r})"),
        make_step("hangs", "import time; time.sleep(60)", limit=1),
        make_step("cannot", f"import sys; print('skipped: no such card'); sys.exit({SKIPPED})"),
        make_step("works", "import sys; open(sys.argv[1], 'a').write('{}\\n'); print('done')", "{rows}"),
    ]
    entries = run_steps(steps, call(tmp_path))
    assert [entry["status"] for entry in entries] == ["failed", "failed", "timed out", "skipped", "ok"]
    errors = [entry.get("error") for entry in entries]
    assert errors == [
        "SIGABRT: so far",
        "ValueError: no rows.jsonl",
        "stopped after 1 s",
        "skipped: no such card",
        None,
    ]
    assert (tmp_path / "out" / "rows.jsonl").read_text() == "{}\n"
    assert [entry["rows"] for entry in entries] == [0, 0, 0, 0, 1]
    log = (tmp_path / "out" / "log.txt").read_text()
    for step in steps:
        assert f"=== {step.name} (a test), " in log
        assert f"=== python -m step_{step.name}" in log
    assert "done" in log
    summary = (tmp_path / "out" / "summary.json").read_text()
    assert list(json.loads(summary)["steps"].values()) == entries
    assert str(tmp_path) not in summary
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"rows.jsonl", "log.txt", "summary.json"}
    for line, entry in zip(gpu_suite.table(entries).splitlines(), entries):
        assert line.split()[0] == entry["step"]
        assert entry["status"] in line
        assert entry.get("error", "") in line


@pytest.mark.parametrize("ends_by_itself", [False, True])
def test_a_step_takes_its_children_with_it(tmp_path: Path, make_step: MakeStep, ends_by_itself: bool) -> None:
    """Of a hung `pytest -n 10`, workers that survived would hold the card's memory and spoil every number after it."""
    code = STUBBORN + ("" if ends_by_itself else "time.sleep(60)")
    step = make_step("hangs", code, str(tmp_path / "pids"), limit=4)
    (entry,) = run_steps([step], call(tmp_path))
    assert entry["status"] == ("ok" if ends_by_itself else "timed out")
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 2
    assert ends_soon(pids)


def test_ending_the_suite_ends_its_step(tmp_path: Path, make_step: MakeStep) -> None:
    """Steps lead sessions of their own, which the signal of a caller's time-out does not reach."""
    make_step("hangs", STUBBORN + "time.sleep(60)")
    code = (
        "import sys; from benchmarks import gpu_steps, gpu_suite\n"
        f"step = gpu_steps.Step('hangs', 'step_hangs', ({str(tmp_path / 'pids')!r},), 60, 'a test', least=0)\n"
        "gpu_suite.steps_of = lambda *_: (step,)\n"
        "gpu_suite.main()\n"
    )
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ['PYTHONPATH']}"}
    command = [sys.executable, "-c", code, "--slot", "A", "--out", str(tmp_path / "out")]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as suite:
        pids: list[int] = []
        while len(pids) < 2:
            assert suite.poll() is None
            time.sleep(0.05)
            if (tmp_path / "pids").is_file():
                pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
        suite.terminate()
        assert suite.wait(20) == 128 + signal.SIGTERM
    assert ends_soon(pids)


def test_the_call_ends_before_its_deadline(tmp_path: Path, make_step: MakeStep) -> None:
    """A step is cut to the time that is left, and left out where that is too little for it."""
    steps = [
        make_step("long", "import time; time.sleep(60)", limit=60),
        make_step("needs_more", "", least=1),
    ]
    start = time.monotonic()
    entries = run_steps(steps, call(tmp_path, gpu_suite.RESERVE_S + 2))
    assert time.monotonic() - start < gpu_suite.RESERVE_S + 2
    assert statuses(entries) == {"long": "timed out", "needs_more": "left out"}
    assert entries[1]["error"].startswith("no time: 0 s left, it needs 1")


def test_seconds_of_a_command_follow_the_time_that_is_left(tmp_path: Path) -> None:
    step = next(step for step in steps_of("A") if step.name == "attention")
    places = Places(tmp_path)
    for seconds, inner in ((140, "110"), (60, "30"), (10, "1")):
        command = step.command(places, {}, seconds, rehearse=False, resume=False)
        assert command[command.index("--seconds") + 1] == inner
    assert "--resume" not in command
    assert step.command(places, {}, 60, rehearse=False, resume=True)[-1] == "--resume"


def test_nothing_runs_after_a_failed_smoke_test(tmp_path: Path, make_step: MakeStep) -> None:
    steps = [
        make_step("smoke", "raise RuntimeError('no kernel')", stops=True),
        make_step("rest", "", "{rows}"),
    ]
    entries = run_steps(steps, call(tmp_path))
    assert statuses(entries) == {"smoke": "failed", "rest": "left out"}
    assert entries[1]["error"] == "smoke failed"
    steps[0] = dataclasses.replace(steps[0], least=15)
    entries = run_steps(steps, call(tmp_path, gpu_suite.RESERVE_S + 10))
    assert [entry["error"] for entry in entries] == ["no time: 10 s left, it needs 15", "smoke left out"]


def test_resume_goes_on_elsewhere(
    tmp_path: Path, make_step: MakeStep, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a folder that was carried away and back: what ended well is not run again, the rest is, and another commit is said."""
    mark = "import sys; open(sys.argv[1], 'a').write('x')"
    device = 'import os, sys; open(sys.argv[1], \'a\').write(\'{"benchmark": "device", "commit": "%s"}\\n\' % os.environ[\'COMMIT\'])'
    counts = {name: tmp_path / name for name in ("good", "bad")}
    bad = mark + "; sys.exit(0 if len(open(sys.argv[1]).read()) > 1 else 'ValueError: once')"
    steps = [
        make_step("device", device, "{rows}", always=True),
        make_step("good", mark, str(counts["good"])),
        make_step("bad", bad, str(counts["bad"])),
        make_step("keeps", "import sys; open(sys.argv[1] + '/report', 'w').write('long')", "{kept}"),
    ]
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("COMMIT", "first")
        entries = run_steps(steps, call(tmp_path))
        assert statuses(entries) == {"device": "ok", "good": "ok", "bad": "failed", "keeps": "ok"}
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        for name in ("rows.jsonl", "log.txt", "summary.json", "kept.tar.xz"):
            shutil.move(tmp_path / "out" / name, elsewhere)
        environment.setenv("COMMIT", "second")
        entries = run_steps(steps, Call(Places(elsewhere), {}, 60, resume=True))
    assert statuses(entries) == {"device": "ok", "good": "done before", "bad": "ok", "keeps": "done before"}
    assert {name: len(count.read_text()) for name, count in counts.items()} == {"good": 1, "bad": 2}
    assert "CHANGED: commit was first in a former call and is second now" in capsys.readouterr().out
    assert "=== changed: commit was first" in (elsewhere / "log.txt").read_text()
    assert (elsewhere / "kept" / "report").read_text() == "long"
    summary = json.loads((elsewhere / "summary.json").read_text())
    assert [entry["status"] for entry in summary["steps"].values()] == ["ok"] * 4
    assert len((elsewhere / "rows.jsonl").read_text().splitlines()) == 2


def test_a_good_step_is_not_forgotten_for_want_of_time(tmp_path: Path, make_step: MakeStep) -> None:
    step = make_step("good", "", least=1)
    run_steps([step], call(tmp_path))
    entries = run_steps([step], call(tmp_path, deadline_s=0))
    assert statuses(entries) == {"good": "left out"}
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["steps"]["good"]["status"] == "ok"


def test_a_damaged_summary_begins_anew(tmp_path: Path, make_step: MakeStep) -> None:
    run_steps([make_step("good", "")], call(tmp_path))
    (tmp_path / "out" / "summary.json").write_text('{"steps": ')
    entries = run_steps([make_step("good", "")], call(tmp_path, resume=True))
    assert statuses(entries) == {"good": "ok"}


@pytest.fixture
def places(tmp_path: Path) -> Places:
    found = Places(tmp_path / "out")
    found.kept.mkdir(parents=True)
    return found


def test_the_archive_holds_what_fits(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest file stays out of it where all together are too large, and the log says so."""
    pack(places)
    assert not places.archive.exists()
    (places.kept / "small").write_bytes(b"x" * 100)
    (places.kept / "large").write_bytes(os.urandom(5000))
    monkeypatch.setattr(gpu_suite, "MOST_PACKED", 1000)
    pack(places)
    with tarfile.open(places.archive) as archive:
        assert archive.getnames() == ["kept/small"]
    assert "large is too large for kept.tar.xz" in places.log.read_text()
    before = places.archive.stat().st_mtime_ns
    pack(places)
    assert places.archive.stat().st_mtime_ns == before  # nothing is new
    monkeypatch.setattr(gpu_suite, "MOST_UNPACKED", 50)
    (places.kept / "small").write_bytes(b"y" * 100)
    pack(places)
    with tarfile.open(places.archive) as archive:
        assert archive.getnames() == []


def test_unpacking_stays_in_its_folder(places: Places, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("kept/report", "kept/../../outside", "summary.json"):
        file = places.out / "source"
        file.write_text("packed")
        with tarfile.open(places.archive, "w:xz") as archive:
            archive.add(file, name)
        unpack(places)
    assert (places.kept / "report").read_text() == "packed"
    assert not (places.out.parent / "outside").exists()
    assert not places.summary.exists()
    places.archive.write_bytes(places.archive.read_bytes()[:50])
    unpack(places)
    assert "kept.tar.xz cannot be unpacked" in capsys.readouterr().out


def test_environment_of_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PYTHONPATH is extended: replacing it would lose packages that were carried to the machine."""
    by_name = {step.name: step for step in steps_of("A")}
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["/one", "", "two"]))
    monkeypatch.setenv("DTI_TILES", "another call's")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    there = call(tmp_path)
    environment = environment_of(by_name["training"], there)
    assert environment["PYTHONPATH"].split(os.pathsep) == [str(ROOT), "/one", os.path.abspath("two")]
    assert environment["TRITON_INTERPRET"] == "0"
    assert "DTI_TILES" not in environment
    there.places.out.mkdir()
    there.places.tiles.write_text("[]")
    assert environment_of(by_name["training"], there)["DTI_TILES"] == str(there.places.tiles)
    for name in ("tiles", "attention-old-table"):
        assert "DTI_TILES" not in environment_of(by_name[name], there)
    rehearsal = environment_of(by_name["gpu-tests"], call(tmp_path, rehearse=True))
    assert (rehearsal["DTI_REHEARSE"], rehearsal["TRITON_INTERPRET"]) == ("1", "1")


@pytest.mark.parametrize("slot", SLOTS)
def test_plan(slot: str, tmp_path: Path) -> None:
    """Names are unique, every command can be filled in, and all steps get their least before the deadline."""
    steps = steps_of(slot, "50")
    assert len({step.name for step in steps}) == len(steps)
    values = {"data": "D", "weights": "W", "k": "50", "epochs": "1"}
    for step in steps:
        assert step.spare < step.least <= step.limit
        for rehearse in (False, True):
            command = step.command(Places(tmp_path), values, step.limit, rehearse=rehearse, resume=True)
            assert command[1:3] == ["-m", step.module]
            assert str(tmp_path / "rows.jsonl") in command
            assert not any("{" in word for word in command)
    assert sum(step.least for step in steps) < gpu_suite.DEADLINES_S[slot] - gpu_suite.RESERVE_S


def test_every_step_is_there() -> None:
    for slot in SLOTS:
        for step in steps_of(slot):
            assert importlib.util.find_spec(step.module), step.module


def test_two_fine_tunings_share_a_folder() -> None:
    assert [step.name for step in steps_of("B", "1")][-1] != [step.name for step in steps_of("B", "50")][-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--slot A or --slot B"),
        (["--slot", "B"], "--data and --weights"),
        (
            ["--slot", "A", "--step", "smoke", "smokes"],
            "no step 'smokes'; there are device, precompile, smoke",
        ),
    ],
)
def test_wrong_options_are_refused(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_suite", *arguments])
    with pytest.raises(SystemExit) as exit_:
        gpu_suite.main()
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_the_suite_itself_starts_at_once() -> None:
    """Every step pays for loading PyTorch; the suite does not."""
    code = "import sys, benchmarks.gpu_suite; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.slow
@pytest.mark.parametrize("slot", SLOTS)
def test_rehearsal(slot: str, tmp_path: Path) -> None:
    """Every step of a slot runs on a CPU, every line of Python that a GPU would run, and writes its rows, here and nowhere else."""
    before = file_hashes(ROOT)
    out, temporary, elsewhere = (tmp_path / name for name in ("out", "temporary", "elsewhere"))
    temporary.mkdir()
    elsewhere.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_suite", "--rehearse", "--slot", slot, "--out", str(out)],
        cwd=elsewhere,
        env=os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    log = (out / "log.txt").read_text()
    assert done.returncode == 0, done.stdout + log[-6000:]
    entries = json.loads((out / "summary.json").read_text())["steps"]
    reasons = {name: entry["error"] for name, entry in entries.items() if entry["status"] == "skipped"}
    assert reasons in ({}, {"ncu": "skipped: no ncu here"})
    assert {path.name for path in out.iterdir()} <= AGREED
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    for row in rows:
        assert {"date", "commit", "machine", "torch", "benchmark"} <= row.keys()
    assert list(entries) == [step.name for step in steps_of(slot)]
    for step in steps_of(slot):
        if step.gives_rows and step.name not in reasons:
            assert entries[step.name]["rows"] > 0, step.name
    assert sum(entry["rows"] for entry in entries.values()) == len(rows)
    assert not list(elsewhere.iterdir())
    # PyTorch's own cache, wherever that is.
    left = [path.name for path in temporary.iterdir() if not path.name.startswith("torchinductor_")]
    assert not left
    assert file_hashes(ROOT) == before
