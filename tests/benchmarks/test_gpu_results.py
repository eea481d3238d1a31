"""The GPU suite's folder of results: carried, resumed, damaged, packed. Its steps take a moment."""

from __future__ import annotations

import json
import os
import shutil
import tarfile
from pathlib import Path

import pytest

from benchmarks import gpu_suite
from benchmarks.gpu import results as gpu_results
from benchmarks.gpu.results import pack, remove_packed, table, unpack
from benchmarks.gpu.steps import Places
from benchmarks.gpu_suite import Call, run_steps
from benchmarks.recording import DOUBTFUL, INCOMPLETE
from tests.benchmarks.fake_steps import MakeStep, call, statuses, step_maker


@pytest.fixture
def make_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeStep:
    return step_maker(tmp_path, monkeypatch)


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
        entries = run_steps(steps, Call(Places(elsewhere), {}, 300, resume=True))
    assert statuses(entries) == {"device": "ok", "good": "done before", "bad": "ok", "keeps": "done before"}
    assert {name: len(count.read_text()) for name, count in counts.items()} == {"good": 1, "bad": 2}
    assert "CHANGED: commit was first in a former call and is second now" in capsys.readouterr().out
    assert "=== CHANGED: commit was first" in (elsewhere / "log.txt").read_text()
    with tarfile.open(elsewhere / "kept.tar.xz") as archive:
        assert archive.getnames() == ["kept/report"]
    assert not (elsewhere / "kept").exists()
    summary = json.loads((elsewhere / "summary.json").read_text())
    assert [entry["status"] for entry in summary["steps"].values()] == ["ok"] * 4
    assert len((elsewhere / "rows.jsonl").read_text().splitlines()) == 2


def test_a_good_step_is_not_forgotten_for_want_of_time(tmp_path: Path, make_step: MakeStep) -> None:
    step = make_step("good", "", least=1)
    run_steps([step], call(tmp_path))
    entries = run_steps([step], call(tmp_path, deadline_s=0))
    assert statuses(entries) == {"good": "left out"}
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["steps"]["good"]["status"] == "ok"


@pytest.mark.parametrize(
    "damaged",
    [
        '{"steps": ',
        "[]",
        '{"origin": {}, "steps": []}',
        '{"origin": [], "steps": {}}',
        '{"origin": {}, "steps": {"good": 1}}',
    ],
)
def test_a_damaged_summary_begins_anew(damaged: str, tmp_path: Path, make_step: MakeStep) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "summary.json").write_text(damaged)
    entries = run_steps([make_step("good", "")], call(tmp_path, resume=True))
    assert statuses(entries) == {"good": "ok"}
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["steps"] == {"good": entries[0]}


def test_damaged_rows_are_skipped(
    tmp_path: Path, make_step: MakeStep, capsys: pytest.CaptureFixture[str]
) -> None:
    """A killed process leaves half a line; the row after it has a line of its own, and all readers can read all lines."""
    rows = tmp_path / "out" / "rows.jsonl"
    rows.parent.mkdir()
    rows.write_bytes(b'{"benchmark": "device", "torch": "1"}\n5\n{"benchmark": "device", "torc\xff')
    tears = "import sys; open(sys.argv[1], 'a').write('{}\\n{')"
    entries = run_steps([make_step("tears", tears, "{rows}")], call(tmp_path))
    assert (statuses(entries), entries[0]["rows"]) == ({"tears": "ok"}, 1)
    assert [json.loads(line) for line in rows.read_text().splitlines()] == [
        {"benchmark": "device", "torch": "1"},
        {},
    ]
    printed, log = capsys.readouterr().out, (tmp_path / "out" / "log.txt").read_text()
    assert printed.count("rows.jsonl: a damaged line is skipped") == 3
    assert log.count("rows.jsonl: a damaged line is skipped") == 3
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["origin"]["torch"] == "1"


def test_an_incomplete_step_runs_again(tmp_path: Path, make_step: MakeStep) -> None:
    """Its rows are there, its summary says what it lacks, nothing else stops, and `--resume` goes on with it."""
    code = (
        "import sys; open(sys.argv[1], 'a').write('{}\\n'); again = '--resume' in sys.argv\n"
        f"print('' if again else 'left out: the last workload'); sys.exit(0 if again else {INCOMPLETE})"
    )
    steps = [
        make_step("part", code, "{rows}", resumed=("--resume",), stops=True),
        make_step("doubtful", f"import sys; print('1.5 of its budget'); sys.exit({DOUBTFUL})", stops=True),
        make_step("rest", ""),
    ]
    entries = run_steps(steps, call(tmp_path))
    assert statuses(entries) == {"part": "incomplete", "doubtful": "doubtful", "rest": "ok"}
    assert (entries[0]["error"], entries[0]["rows"]) == ("left out: the last workload", 1)
    assert "doubtful" in table(entries).splitlines()[1]
    assert "1.5 of its budget" in table(entries).splitlines()[1]
    assert not {"incomplete", "doubtful"} & set(gpu_suite.ENDED_WELL)
    run_steps(steps[:1], call(tmp_path, deadline_s=0, resume=True))
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["steps"]["part"]["status"] == "incomplete"  # not forgotten for want of time
    entries = run_steps(steps, call(tmp_path, resume=True))
    assert statuses(entries) == {"part": "ok", "doubtful": "doubtful", "rest": "done before"}


@pytest.mark.parametrize("other", ["machine", "sources", "triton"])
def test_nothing_counts_that_another_machine_did(other: str, tmp_path: Path, make_step: MakeStep) -> None:
    """Steps run again as in a first call, what they ran on is kept by step, and tiles of another card are not used."""
    device = (
        "import json, os, sys; row = json.loads(os.environ['ROW']); "
        "open(sys.argv[1], 'a').write(json.dumps({'benchmark': 'device', **row}) + '\\n')"
    )
    note = "import os, sys; open(sys.argv[1], 'a').write(' '.join([os.environ.get('DTI_TILES', '-'), *sys.argv[2:]]) + '\\n')"
    noted = tmp_path / "noted"
    steps = [
        make_step("device", device, "{rows}", always=True, stops=True),
        make_step("tiles", "import sys; open(sys.argv[1], 'w').write('[]')", "{tiles}", old_table=True),
        make_step("attention", note, str(noted), resumed=("--resume",)),
    ]
    first = {"machine": "one", "sources": "s", "triton": "3.6.0", "triton_files": "f"}
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("ROW", json.dumps(first))
        run_steps(steps, call(tmp_path))
        entries = run_steps(steps, call(tmp_path, resume=True))
        assert statuses(entries) == {"device": "ok", "tiles": "done before", "attention": "done before"}
        environment.setenv("ROW", json.dumps(first | {other: "another"}))
        entries = run_steps([steps[0], steps[2]], call(tmp_path, resume=True))
        assert statuses(entries) == {"device": "ok", "attention": "ok"}
        tiles = str(tmp_path / "out" / "tiles.json")
        assert noted.read_text().splitlines() == [tiles, "-" if other == "machine" else tiles]
        summary = json.loads((tmp_path / "out" / "summary.json").read_text())["steps"]
        assert [summary[step.name]["origin"][other] for step in steps] == ["another", first[other], "another"]
        entries = run_steps(steps, call(tmp_path, resume=True))
    assert statuses(entries) == {"device": "ok", "tiles": "ok", "attention": "done before"}
    assert Path(tiles).is_file()


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
    monkeypatch.setattr(gpu_results, "MOST_PACKED", 1000)
    pack(places)
    with tarfile.open(places.archive) as archive:
        assert archive.getnames() == ["kept/small"]
    assert "large is too large for kept.tar.xz" in places.log.read_text()
    before = places.archive.stat().st_mtime_ns
    pack(places)
    assert places.archive.stat().st_mtime_ns == before  # nothing is new
    monkeypatch.setattr(gpu_results, "MOST_UNPACKED", 50)
    (places.kept / "small").write_bytes(b"y" * 100)
    pack(places)
    with tarfile.open(places.archive) as archive:
        assert archive.getnames() == []


def test_at_the_end_the_archive_is_the_only_copy(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few files come back from a lent machine; what is too large for the archive stays where it is."""
    (places.kept / "folder").mkdir()
    (places.kept / "folder" / "small").write_bytes(b"x" * 100)
    (places.kept / "large").write_bytes(os.urandom(5000))
    monkeypatch.setattr(gpu_results, "MOST_PACKED", 1000)
    pack(places)
    remove_packed(places)
    assert [path.name for path in places.kept.iterdir()] == ["large"]
    (places.kept / "large").unlink()
    remove_packed(places)
    assert not places.kept.exists()
    unpack(places)
    assert (places.kept / "folder" / "small").read_bytes() == b"x" * 100


def test_a_foreign_archive_is_neither_unpacked_nor_replaced(
    places: Places, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file outside `kept/`, or a damaged one, is put aside under a name of its own."""
    file = places.out / "source"
    file.write_text("packed")
    for name in ("kept/report", "kept/../../outside", "summary.json"):
        with tarfile.open(places.archive, "w:xz") as archive:
            archive.add(file, name)
        unpack(places)
    assert (places.kept / "report").read_text() == "packed"
    assert not (places.out.parent / "outside").exists()
    assert not places.summary.exists()
    for number in (1, 2):
        assert (places.out / f"before-{number}-kept.tar.xz").is_file()
    assert "kept.tar.xz is now before-2-kept.tar.xz: summary.json in it is not" in capsys.readouterr().out
    places.archive.write_bytes(b"somebody's notes")
    unpack(places)
    assert (places.out / "before-3-kept.tar.xz").read_bytes() == b"somebody's notes"
    assert "before-3-kept.tar.xz: it cannot be unpacked" in capsys.readouterr().out
