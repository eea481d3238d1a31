"""Every benchmark's command runs at its smoke size, behind its parity gates, and its rows hold together. Times prove nothing here.

None of them may change a file of the project that nobody asked it to.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from benchmarks import (
    bench_attention,
    bench_quality,
    bench_score,
    bench_train,
    bench_train_gpu,
    leak_meter,
    simulate,
)
from benchmarks.measuring import interleaved_ms, median_and_p99, slowest_ms
from benchmarks.recording import command, commit_of
from benchmarks.scoring import Rerun
from benchmarks.scoring import shape as score_shape
from benchmarks.scoring.candidates import check_parity
from benchmarks.synthetic import made_up_data
from tests.checkout import file_hashes
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_up_data(tmp_path_factory.mktemp("made_up"))


def run_main(module: ModuleType, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [f"{module.__name__.split('.')[-1]}.py", *arguments])
    module.main()


@pytest.mark.parametrize(
    ("module", "num_rows", "takes_data", "in_precisions"),
    [
        (bench_attention, {"fp32": 16, "bf16": 12}, False, True),
        (bench_train, {"fp32": 3, "bf16": 3}, True, True),
        (bench_score, {"fp32": 9, "bf16": 9}, True, True),
        (leak_meter, {None: 12}, False, False),
    ],
    ids=lambda x: x.__name__ if isinstance(x, ModuleType) else "",
)
def test_smoke(
    module: ModuleType,
    num_rows: dict[str | None, int],
    takes_data: bool,
    in_precisions: bool,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["--data", str(data)] if takes_data else []
    arguments += ["--precision", "fp32", "bf16"] if in_precisions else []
    run_main(module, ["--size", "smoke", *arguments], monkeypatch)
    (written,) = (tmp_path / "runs" / "benchmarks" / "smoke").iterdir()  # not among the recorded results
    rows = [json.loads(line) for line in written.read_text().splitlines()]
    assert Counter(row.get("precision") for row in rows) == num_rows
    for row in rows:
        assert {"date", "commit", "machine", "torch", "benchmark"} <= row.keys()
        times = [value for key, value in row.items() if key.endswith(("_ms", "_per_s"))]
        assert all(time > 0 for time in times)
        assert times or row["benchmark"] == "leak"
    assert f"rows: {written.relative_to(tmp_path)}" in capsys.readouterr().out


# Full sizes as far as where rows go is concerned; their own options make them small.
FULL = {
    bench_attention: ["--lengths", "128", "256", "--repeats", "1"],
    bench_train: ["--layers", "1", "--width", "16", "--heads", "2", "--k", "1", "--steps", "1", "--data"],
    bench_train_gpu: ["--model", "tiny", "--device", "cpu", "--tokens", "512", "--steps", "1"],
    bench_score: ["--layers", "1", "--width", "16", "--repeats", "1", "--user-step", "40", "--part", "evaluation", "--data"],
    leak_meter: ["--layers", "1", "--prompts", "1"],
}  # fmt: skip
NAMES = {
    bench_attention: "attention-cpu",
    bench_train: "train-cpu",
    bench_train_gpu: "training-cpu",
    bench_score: "score-cpu",
    leak_meter: "leak",
}


@pytest.mark.parametrize("module", FULL, ids=lambda module: module.__name__)
def test_only_record_changes_results(
    module: ModuleType, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`python -m benchmarks.bench_train --data ...`, as the README had it, appended to a tracked file, and the README's tables then
    differed from their rows."""
    results = tmp_path / "results"
    monkeypatch.setattr(command, "RESULTS", results)
    monkeypatch.chdir(tmp_path)
    before = file_hashes(ROOT)
    arguments = [*FULL[module], *([str(data)] if FULL[module][-1] == "--data" else [])]
    run_main(module, arguments, monkeypatch)
    scratch = tmp_path / "runs" / "benchmarks" / f"{NAMES[module]}.jsonl"
    num_rows = len(scratch.read_text().splitlines())
    assert num_rows > 0
    assert not results.exists()
    assert file_hashes(ROOT) == before
    run_main(module, [*arguments, "--record"], monkeypatch)
    assert len((results / scratch.name).read_text().splitlines()) == num_rows
    assert len(scratch.read_text().splitlines()) == 2 * num_rows


def test_the_others_write_nothing_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`simulate` prints. The files of the GPU suite are tested in tests/benchmarks/test_gpu_suite.py."""
    monkeypatch.chdir(tmp_path)
    before = file_hashes(ROOT)
    run_main(simulate, [], monkeypatch)
    assert "Table 3" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    assert file_hashes(ROOT) == before


@pytest.mark.parametrize("module", [bench_train, bench_quality], ids=lambda module: module.__name__)
def test_a_smoke_run_is_never_recorded(
    module: ModuleType, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = ["--plan", "table1"] if module is bench_quality else []
    arguments = [*plan, "--size", "smoke", "--record", "--data", str(data)]
    with pytest.raises(SystemExit) as exit_:
        run_main(module, arguments, monkeypatch)
    assert exit_.value.code == 2
    assert "--size smoke" in capsys.readouterr().err


def test_a_shape_has_nothing_to_evaluate(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        run_main(bench_score, ["--shape", "smollm"], monkeypatch)
    assert exit_.value.code == 2
    assert "give --part candidates" in capsys.readouterr().err


def test_scoring_of_a_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal scores three ways, from a state of the right history only; and rows of them, behind that gate."""
    monkeypatch.setattr(
        score_shape, "TOKEN_BUDGET", 700
    )  # a prompt of a candidate has about 320 rows: several passes
    monkeypatch.setattr(score_shape, "REPEATS", {1: 1, 5: 1})
    scorer = score_shape.ShapeScorer("tiny", "cpu", torch.float32)
    providers = scorer.providers(5)
    assert score_shape.difference(providers, providers["one prompt each"]()) < score_shape.PARITY
    history, candidates = scorer.texts(20, 0), scorer.texts(5, 1)
    _, right = scorer.forward([score_shape.Prompt(history, [])])
    assert len(right[0].k) > 200
    # The keys of other rows in the same places: of another history, as far as a pass can tell.
    state = [type(layer)(*(None if x is None else torch.roll(x, 1, 0) for x in layer)) for layer in right]
    scores = scorer.score([score_shape.Prompt(history, candidates, state)])
    assert np.abs(scores - providers["one pass"]()).max() > 10 * score_shape.PARITY
    measured = score_shape.measure_shape("tiny", on_gpu=False, precisions=("fp32", "bf16"))
    rows = [row for of_count in measured for row in of_count]
    assert [(row["candidates"], row["precision"], row["provider"]) for row in rows] == [
        (count, precision, provider)
        for count in (1, 5)
        for precision in ("fp32", "bf16")
        for provider in providers
    ]
    assert all(("over_fp32" in row) == (row["precision"] == "bf16") for row in rows)
    monkeypatch.setattr(score_shape, "PARITY", -1.0)
    with pytest.raises(AssertionError, match="probabilities in fp32 differ"):
        next(score_shape.measure_shape("tiny", on_gpu=False, precisions=("fp32",)))


def test_scoring_of_a_shape_through_graphs() -> None:
    """Two more ways to the same scores, which a replay of each request gives: passes of one shape share a bucket, not their ids."""
    scorer = score_shape.ShapeScorer("tiny", "cpu", torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(score_shape, "CAPTURE", Rerun)
        graphs = scorer.through_graphs()
    first = scorer.providers(5, graphs)
    assert list(first) == [
        *("one pass", "encoded history", "one prompt each", "one pass, graph", "encoded history, graph")
    ]
    expected = first["one prompt each"]()
    for _ in range(3):
        assert score_shape.difference(first, expected) < score_shape.PARITY
    assert len(graphs.passes._graphs) == 2  # one pass, and an encoded history: that was computed once
    scorer.texts = lambda count, seed: score_shape.ShapeScorer.texts(scorer, count, seed + 7)
    others = scorer.providers(5, graphs)
    assert score_shape.difference(others, others["one prompt each"]()) < score_shape.PARITY
    assert np.abs(others["one pass, graph"]() - expected).max() > 10 * score_shape.PARITY


def test_slow_functions_are_repeated_less_often() -> None:
    """Fixed numbers of repeats, of calls that take ten times as long on a slow host, were a step that timed out without a row."""
    times = interleaved_ms(
        {"slow": lambda: time.sleep(0.02), "fast": lambda: None}, 50, warmup=1, seconds=0.05, least=2
    )
    assert {name: len(ms) for name, ms in times.items()} == {"slow": 3, "fast": 50}
    times = interleaved_ms({"slow": lambda: time.sleep(0.02)}, 50, warmup=0, seconds=0.001, least=4)
    assert len(times["slow"]) == 4


def test_no_row_of_scores_that_differ() -> None:
    """All precisions are held to float32, each to its own rounding; a NaN is no rounding."""
    one = {"one prompt each": lambda: np.array([0.25, 0.5])}
    near = {"one prompt each": lambda: np.array([0.25, 0.501])}
    most = {"fp32": 1e-5, "bf16": 2e-3}
    check_parity({"fp32": one, "bf16": near}, "one prompt each", most)
    for wrong in (near, {"one prompt each": lambda: np.array([0.25, np.nan])}):
        with pytest.raises(AssertionError, match="probabilities in bf16 differ"):
            check_parity({"fp32": one, "bf16": wrong}, "one prompt each", most | {"bf16": 5e-4})


def test_a_shape_in_bfloat16_is_what_training_loads() -> None:
    """Cast after apply_dti, slopes and rotary frequencies became bfloat16: other kernels than training's, and rounded positions."""
    scorer = score_shape.ShapeScorer("tiny", "cpu", torch.bfloat16)
    assert {parameter.dtype for parameter in scorer.model.parameters()} == {torch.bfloat16}
    buffers = dict(scorer.model.named_buffers())
    assert any(name.endswith("inv_freq") for name in buffers)
    assert any(name.endswith("alibi_slopes") for name in buffers)
    assert {buffer.dtype for buffer in buffers.values()} == {torch.float32}
    _, state = scorer.forward([score_shape.Prompt(scorer.texts(3, 0), [])])
    assert state[0].k.dtype == torch.bfloat16


def test_a_p99_is_of_a_hundred_repeats() -> None:
    """Of fifteen it was about the slowest, under another name."""
    assert slowest_ms(np.arange(1.0, 101.0)) == {"p99_ms": 99.01}
    assert slowest_ms(np.arange(1.0, 100.0)) == {"max_ms": 99.0}
    assert median_and_p99({"p50_ms": 1.0, "p99_ms": 2.0, "repeats": 100}, 1) == "1.0 / 2.0"
    assert median_and_p99({"p50_ms": 1.0, "p99_ms": 2.0, "repeats": 99}, 1) == "1.0"


def test_rows_without_git_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a git program every benchmark ended in a traceback, after it had measured; so did two tests."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit_of(ROOT) == "unknown"
    monkeypatch.setenv("DTI_COMMIT", "abc1234")
    assert commit_of(ROOT) == "abc1234", "whoever carried a copy there knows"


def test_rows_outside_of_a_repository_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in a repository that git does not trust, and in a copy that lies in somebody else's."""
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "file").touch()
    assert commit_of(copy) == "unknown"
    if shutil.which("git") is None:
        pytest.skip("no git here: the rest needs a repository")

    def commit(folder: Path, *, new: bool) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        for arguments in (["init", "-q"], ["add", "."], [*identity, "commit", "-q", "-m", "all"])[not new :]:
            subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True)

    commit(tmp_path, new=True)
    assert commit_of(copy) == "unknown"
    subprocess.run(["git", "init", "-q"], cwd=copy, check=True)
    assert commit_of(copy) == "unknown", "no commit yet"
    commit(copy, new=False)
    ours = commit_of(copy)
    assert re.fullmatch("[0-9a-f]{7,}", ours)
    (copy / "file").write_text("changed")
    assert commit_of(copy) == f"{ours}-dirty"
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    assert commit_of(copy) == "unknown", "dubious ownership"
