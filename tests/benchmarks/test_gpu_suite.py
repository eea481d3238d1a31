"""The GPU suite without a GPU: its bookkeeping with steps that take a moment, and a rehearsal of all its real ones."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu_suite
from benchmarks.gpu.results import table
from benchmarks.gpu.steps import SLOTS, Places, steps_of
from benchmarks.gpu_suite import environment_of, run_steps
from benchmarks.recording import SKIPPED
from benchmarks.synthetic import made_up_data
from dti_model.files.locks import locked
from tests.benchmarks.fake_steps import MakeStep, call, statuses, step_maker
from tests.checkout import file_hashes
from tests.conftest import ROOT

AGREED = {"rows.jsonl", "log.txt", "summary.json", "tiles.json", "kept.tar.xz"}
# A child that a polite signal does not end, and the process that it is.
STUBBORN = """
import os, subprocess, sys, time
child = subprocess.Popen(["/bin/sh", "-c", "trap '' TERM; sleep 60; exit"])
open(sys.argv[1], "w").write(f"{os.getpid()} {child.pid}")
"""


@pytest.fixture
def make_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeStep:
    return step_maker(tmp_path, monkeypatch)


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
    for line, entry in zip(table(entries).splitlines(), entries):
        assert line.split()[0] == entry["step"]
        assert entry["status"] in line
        assert entry.get("error", "") in line


@pytest.mark.parametrize("ends_by_itself", [False, True])
def test_a_step_takes_its_children_with_it(tmp_path: Path, make_step: MakeStep, ends_by_itself: bool) -> None:
    """Of a hung `pytest -n 10`, workers that survived would hold the card's memory and spoil every number after it."""
    code = STUBBORN + ("" if ends_by_itself else "time.sleep(60)")
    step = make_step("hangs", code, str(tmp_path / "pids"), limit=60 if ends_by_itself else 5)
    (entry,) = run_steps([step], call(tmp_path))
    assert entry["status"] == ("ok" if ends_by_itself else "timed out")
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 2
    assert ends_soon(pids)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_ending_the_suite_ends_its_step(
    number: signal.Signals, status: int, tmp_path: Path, make_step: MakeStep
) -> None:
    """Steps lead sessions of their own, which the signal of a caller's time-out or Ctrl-C does not reach. The summary is written."""
    make_step("hangs", STUBBORN + "time.sleep(60)")
    code = (
        "import sys; from benchmarks import gpu_suite; from benchmarks.gpu import steps as gpu_steps\n"
        f"step = gpu_steps.Step('hangs', 'step_hangs', ({str(tmp_path / 'pids')!r},), 60, 'a test', least=0)\n"
        "gpu_suite.steps_of = lambda *_: (step, gpu_steps.Step('rest', 'nowhere', (), 60, 'a test'))\n"
        "gpu_suite.main()\n"
    )
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ['PYTHONPATH']}"}
    command = [sys.executable, "-c", code, "--slot", "A", "--out", str(tmp_path / "out")]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as suite:
        pids: list[int] = []
        while len(pids) < 2:
            assert suite.poll() is None
            time.sleep(0.05)
            if (tmp_path / "pids").is_file():
                pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
        suite.send_signal(number)
        assert suite.communicate(timeout=60)[1] == b""
        assert suite.returncode == status
    assert ends_soon(pids)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())["steps"]
    assert {name: entry["status"] for name, entry in summary.items()} == {
        "hangs": "interrupted",
        "rest": "left out",
    }
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"log.txt", "summary.json"}


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
    assert entries[0]["error"].endswith("s left, it needs 15")
    assert entries[1]["error"] == "smoke left out"


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
    assert "DTI_TILES" not in environment_of(by_name["tiles"], there)
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
        (["--slot", "A", "--deadline", "0"], "must be a number of seconds above 0, got '0'"),
        (["--slot", "A", "--deadline=-5"], "must be a number of seconds above 0, got '-5'"),
        (["--slot", "A", "--deadline", "nan"], "must be a number of seconds above 0, got 'nan'"),
        (["--slot", "A", "--out", "FILE"], "--out FILE: "),
        (["--slot", "A", "--out", "FILE/below"], "--out FILE/below: "),
        (["--slot", "B", "--data", "nowhere", "--weights", "FILE"], "--data nowhere: no such folder"),
        (["--slot", "B", "--data", ".", "--weights", "FILE"], "--data .: not a prepared folder"),
    ],
)
def test_wrong_options_are_refused(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("FILE").write_text("somebody's")
    monkeypatch.setattr(sys, "argv", ["gpu_suite", *arguments])
    with pytest.raises(SystemExit) as exit_:
        gpu_suite.main()
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["FILE"]


def test_a_resumed_call_knows_its_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step that says which card this is runs with whatever `--step` names."""
    for more, names in (([], ["host"]), (["--resume"], ["device", "host"])):
        monkeypatch.setattr(sys, "argv", ["gpu_suite", "--slot", "A", "--step", "host", *more])
        options = gpu_suite.parse(gpu_suite.suite_parser())
        assert [step.name for step in options.steps] == names


def test_the_host_step_ends_in_time(tmp_path: Path) -> None:
    step = next(step for step in steps_of("A") if step.name == "host")
    command = step.command(Places(tmp_path), {}, 45, rehearse=False, resume=False)
    assert command[command.index("--seconds") + 1] == "30"


def test_weights_are_there_before_anything_runs(tmp_path: Path) -> None:
    data = made_up_data(tmp_path)
    assert gpu_suite.why_unusable(data, None) == ""
    for name, content in (("good.gguf", b"GGUF..."), ("bad.gguf", b"zip"), ("config.json", b"{}")):
        (tmp_path / name).write_bytes(content)
    for weights in (tmp_path, tmp_path / "good.gguf"):
        assert gpu_suite.why_unusable(data, weights) == ""
    assert gpu_suite.why_unusable(data, tmp_path / "bad.gguf").endswith("this file is no GGUF file")
    assert "no GGUF file, and no folder" in gpu_suite.why_unusable(data, tmp_path / "nowhere")
    (data / "items.arrow").write_bytes(b"")
    assert "items.arrow" in gpu_suite.why_unusable(data, None)


def test_a_folder_has_one_call_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_suite", "--slot", "A", "--out", str(tmp_path)])
    with locked(tmp_path / ".lock", "gpu_suite"), pytest.raises(SystemExit) as exit_:
        gpu_suite.main()
    assert exit_.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith(f"gpu_suite: {tmp_path} is being written by gpu_suite (process {os.getpid()} ")
    assert message.count("\n") == 1
    assert not list(tmp_path.iterdir())


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
        if step.module != "benchmarks.gpu.precompile" and step.name not in reasons:
            assert entries[step.name]["rows"] > 0, step.name
    assert sum(entry["rows"] for entry in entries.values()) == len(rows)
    assert not list(elsewhere.iterdir())
    # PyTorch's own cache, wherever that is.
    left = [path.name for path in temporary.iterdir() if not path.name.startswith("torchinductor_")]
    assert not left
    assert file_hashes(ROOT) == before
