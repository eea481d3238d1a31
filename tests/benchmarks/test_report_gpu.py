"""The README's part about GPUs, from made-up rows: nothing of it is recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from benchmarks.cards import card_of
from benchmarks.report import gpu as report_gpu
from benchmarks.report import report
from benchmarks.report.finetuning import finetuned

H100, MI300X = "NVIDIA H100 80GB HBM3", "AMD Instinct MI300X"
# Forward ms and useful TFLOP/s of the made-up attention rows.
PROVIDERS = {"windowed_attn": (0.5, 400.0), "flex": (0.9, 222.0), "sdpa_causal": (4.0, 50.0)}


def made(machine: str, **fields: Any) -> dict[str, Any]:
    about = {"date": "2000-01-01", "commit": "unknown", "machine": machine, "torch": "2", "triton": "3"}
    return {**about, **fields}


def attention_rows(
    machine: str, table: str = "frozen", workload: str = "llama8b_k50_16k"
) -> list[dict[str, Any]]:
    facts = {
        "benchmark": "attention",
        "workload": workload,
        "table": table,
        "rows": 16852,
        "mean_span": 650.4,
    }
    rows = []
    for provider, (ms, tflops) in PROVIDERS.items():
        for mode, factor in (("forward", 1.0), ("backward", 3.0), ("forward+backward", 4.0)):
            row = {
                "provider": provider,
                "mode": mode,
                "p50_ms": ms * factor,
                "useful_tflops": tflops / factor,
            }
            row |= {"flops_per_byte": 500.0 / factor, "host_ahead": 1.0, "peak_mib": 300.0}
            rows.append(made(machine, **facts, **row))
    failed = {"provider": "flash_scalar_window", "failed": "Unavailable: flash_attn | is not\ninstalled"}
    return [*rows, made(machine, **facts, **failed)]


def all_rows(machine: str) -> list[dict[str, Any]]:
    check = {"benchmark": "attention", "provider": "windowed_attn", "table": "frozen"}
    tile = {"benchmark": "tiles", "workload": "smollm_k50_16k", "kernel": "ctx_dkv", "arch": "sm_90"}
    training = {
        "benchmark": "training",
        "model": "smollm",
        "tokens_per_s": 1e5,
        "peak_mib": 9000,
        "mfu": 0.31,
    }
    score = {"benchmark": "score", "part": "shape", "model": "smollm", "history": 20, "candidates": 100}
    host = {
        "benchmark": "host",
        "provider": "windowed_attn",
        "reset": True,
        "way": "graph",
        "mode": "forward",
    }
    test = {"benchmark": "gpu_tests"}
    finetune = {
        "benchmark": "finetune",
        "part": "test",
        "model": "smollm2-135m",
        "k": 50,
        "test_k": 50,
        "gauc": 0.7001,
    }
    texts = {"template": "{item} ->{label}\n", "contexts": "{item_rate}", "compile": True}
    return [
        *({**row, "p50_ms": 9.0} for row in attention_rows(machine) if "p50_ms" in row),
        *attention_rows(machine, "DTI_TILES"),
        *(row for row in attention_rows(machine, workload="alone") if row["provider"] == "windowed_attn"),
        made(machine, **test, test="test_a", outcome="passed", shares={"out": 0.31, "dq": 0.74}),
        made(machine, **test, test="test_b", outcome="failed", failed="AssertionError: no", shares={"out": 1.5}),
        made(machine, **test, test="test_c", outcome="skipped"),
        made(machine, **test, test="all", outcome="counts", passed=1, failed=1),
        made(machine, **finetune, targets=6000, auc=0.8012, log_loss=0.5432, item_user_auc=0.7797),
        made(machine, **finetune, **texts, targets=6000, auc=0.8123, log_loss=0.5321, item_user_auc=0.7797),
        made(machine, **check, workload="a", check="equal runs", runs=100, equal=True),
        made(machine, **check, workload="a, b", check="memory", peak_mib=[300.0, 1210.0], memory_ratio=4.03, rows_ratio=4.0),
        made(machine, **tile, tile=[64, 64, 4, 2, 16], in_table=True, won=False, p50_ms=0.3),
        made(machine, **tile, tile=[32, 64, 4, 3, 16], in_table=False, won=True, p50_ms=0.2),
        made(machine, **tile, tile=[64, 128, 8, 3, 16], in_table=False, won=False, failed="OutOfResources: x"),
        made(machine, **training, kind="streaming_k50", targets_per_s=4000.0, speedup=12.5, flops_ratio=13.1),
        made(machine, **training, kind="sliding_window", targets_per_s=320.0),
        made(machine, **score, provider="one pass", p50_ms=9.5, p99_ms=11.0, repeats=100, candidates_per_s=10526.0, speedup=8.0),
        made(machine, **score, provider="encoded history", p50_ms=5.5, max_ms=7.0, repeats=40, candidates_per_s=2.0, speedup=9.0),
        made(machine, **host, failed="RuntimeError: capture"),
    ]  # fmt: skip


def written(rows: list[dict[str, Any]], path: Path) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_without_rows_nothing_is_claimed(tmp_path: Path) -> None:
    assert report_gpu.gpu(tmp_path) == report_gpu.NOTHING
    assert report_gpu.draw(tmp_path) == []


def test_recorded_rows_make_the_part_and_the_plot(tmp_path: Path) -> None:
    results = tmp_path / "results"
    for machine in (H100, MI300X):
        report_gpu.record(written(all_rows(machine), tmp_path / "rows.jsonl"), results)
    assert sorted(path.name for path in results.iterdir()) == ["gpu-h100.jsonl", "gpu-mi300x.jsonl"]
    text = report_gpu.gpu(results)
    assert report_gpu.NOTHING not in text
    for line in (
        f"**{H100}** (torch 2, triton 3, commit unknown, 2000-01-01)",
        "| windowed_attn | 0.500 (400) | 1.500 (133) | 2.000 (100) | 1.00 | 300 |",
        "| `alone` | 16,852 | 650 | 0.500 (400) | 1.500 (133) | 2.000 (100) | 300 |",
        "| flex | 0.900 (222) | 2.700 (74) | 3.600 (56) | 1.80 | 300 |",
        "| flash_scalar_window | failed: Unavailable: flash_attn \\| is not installed | | | | |",
        "| ctx_dkv | smollm_k50_16k | 64 x 64, 4, 2 | 0.300 | 32 x 64, 4, 3 | 0.200 |",
        "| smollm | streaming k50 | 4,000 | 100,000 | 31.0% | 9,000 | 12.5 | 13.1 |",
        "| smollm2-135m | `{item}{label}` | 50 |  |  | 1 |  | 50 | 6,000 | 0.8012 | 0.5432 | 0.7001 | 0.7797 |",
        r"| smollm2-135m | `{item}; {item_rate} ->{label}\n`, compiled | 50 |  |  | 1 |  | 50 | 6,000 | 0.8123 | 0.5321 | 0.7001 | 0.7797 |",
        "1 of 2 tests passed on this card. `test_b`: failed: AssertionError: no. The largest error against the float64 "
        "reference is 1.50 of its budget.",
        "| 100 | one pass | 9.5 / 11.0 | 10,526 | 8.0 x |",
        "| 100 | encoded history | 5.5 | 2 | 9.0 x |",
        "| windowed_attn, reset | graph | failed: RuntimeError: capture |  |",
        "![roofline of mi300x](benchmarks/results/gpu-mi300x.png)",
    ):
        assert line in text.splitlines(), f"{line}\n\n{text}"
    assert "50 targets a prompt, 16,852 rows: 100 TFLOP/s.\n" in text
    assert "9.000" not in text, "the table's tiles, where tiles that won on the card were timed too"
    assert "100 runs of `a`, output and gradients: equal bit for bit." in text
    assert "300 MiB, and 1,210 MiB at 4.0 times the rows (4.0 times)" in text
    for path in report_gpu.draw(results):
        assert imread(path).shape[0] > 300
    assert len(report_gpu.draw(results)) == 2


def test_every_line_of_a_table_has_its_columns(tmp_path: Path) -> None:
    report_gpu.record(written(all_rows(H100), tmp_path / "rows.jsonl"), tmp_path)
    columns = 0
    for line in report_gpu.gpu(tmp_path).splitlines():
        found = line.replace("\\|", "").count("|")
        assert not (columns and found) or found == columns, line
        columns = found


def test_a_time_with_the_host_in_it_is_marked(tmp_path: Path) -> None:
    rows = [{**row, "host_ahead": 0.5} for row in attention_rows(H100) if row["provider"] == "flex"]
    report_gpu.record(written(rows, tmp_path / "rows.jsonl"), tmp_path)
    text = report_gpu.gpu(tmp_path)
    assert "| flex | 0.900* (222) |" in text
    assert "the host was not ahead" in text


def test_ratios_are_of_the_same_turns() -> None:
    """Ours is timed alone first: a time that nothing took turns with makes no ratio."""
    rows = attention_rows(H100, workload="w")
    alone = [{**row, "alone": True} for row in rows if row["provider"] == "windowed_attn"]
    beside = [{**row, "beside": "flex", "p50_ms": 0.6} for row in alone]
    flex = [row for row in rows if row["provider"] == "flex"]
    early = report_gpu.attention([*alone, *flex])
    assert "| windowed_attn | 0.500 (400) | 1.500 (133) | 2.000 (100) |  | 300 |" in early
    assert "| flex | 0.900 (222) | 2.700 (74) | 3.600 (56) |  | 300 |" in early
    whole = report_gpu.attention([*alone, *beside, *({**row, "ours_p50_ms": 2.4} for row in flex)])
    assert "| flex | 0.900 (222) | 2.700 (74) | 3.600 (56) | 1.50 | 300 |" in whole


def test_the_headline_compares_within_turns() -> None:
    rows = attention_rows(H100)
    tuned = [
        {**row, "provider": "flex_tuned", "ours_p50_ms": 1.8} for row in rows if row["provider"] == "flex"
    ]
    options = {"benchmark": "flex_options", "heads": 32, "head_dim": 128}
    both = {"forward+backward": {"p50_ms": 2.0}}
    tried = [made(H100, **options, options=name, **both) for name in ("default", "long rows", "default")]
    tried.append(made(H100, **options, options="fine mask", forward={"p50_ms": 1.0}))
    tried.append(made(H100, **options, options="mask", failed="left out: time is up"))
    assert report_gpu.headline([*rows, *tuned, *tried]) == (
        "Forward and backward with Llama-3.1-8B's heads, 50 targets a prompt, 16,852 rows: 100 TFLOP/s, "
        "2.0 times as fast as FlexAttention with the best of 2 settings."
    )
    assert report_gpu.headline(attention_rows(H100, workload="other")) == ""


def test_ours_is_the_middle_one_of_its_turns() -> None:
    """Alone it is none of them; nor are those of an older commit."""
    facts = {"benchmark": "attention", "workload": "w", "provider": "windowed_attn", "mode": "forward"}
    times = ((9.0, "a", "old"), (2.0, "a", "new"), (1.0, "b", "new"), (1.1, "c", "new"))
    rows = [
        made(H100, **facts, p50_ms=ms, beside=beside) | {"commit": commit} for ms, beside, commit in times
    ]
    alone = made(H100, **facts, p50_ms=0.9, alone=True) | {"commit": "new"}
    assert report_gpu.chosen([rows[0], alone, *rows[1:]])["w"]["windowed_attn"]["forward"]["p50_ms"] == 1.1
    assert report_gpu.chosen([alone])["w"]["windowed_attn"]["forward"]["p50_ms"] == 0.9


def test_an_error_above_its_budget_is_said() -> None:
    check = {"benchmark": "attention", "check": "parity", "provider": "windowed_attn", "table": "frozen"}
    rows = [made(H100, **check, workload=name, shares={"out": 0.4, "dq": 1.34}) for name in ("a", "b")]
    text = report_gpu.checks(rows)
    assert "Errors of `a` are above their budget, in shares of it: dq 1.34." in text
    assert "Errors of `b`" in text


@pytest.mark.parametrize("machine", ["rehearsal (no GPU)", "AMD EPYC, 2 threads", ""])
def test_rehearsals_and_cpus_are_never_recorded(
    machine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [*all_rows(H100), *attention_rows(machine)]
    source = written(rows, tmp_path / "rows.jsonl")
    with pytest.raises(ValueError, match="rows of a GPU are recorded"):
        report_gpu.record(source, tmp_path / "results")
    assert not (tmp_path / "results").exists()
    monkeypatch.setattr("sys.argv", ["report", "--record-gpu", str(source)])
    with pytest.raises(SystemExit):
        report.main()
    assert "rows of a GPU are recorded" in capsys.readouterr().err


def test_rows_are_recorded_once_and_left_out_ones_never(tmp_path: Path) -> None:
    left_out = made(H100, benchmark="attention", workload="b", table="frozen", failed="left out: time is up")
    source = written([*attention_rows(H100), left_out], tmp_path / "rows.jsonl")
    for _ in range(2):
        (path,) = report_gpu.record(source, tmp_path)
    assert len(path.read_text().splitlines()) == len(attention_rows(H100))
    with pytest.raises(ValueError, match="no row"):
        report_gpu.record(written([left_out], tmp_path / "rows.jsonl"), tmp_path)


def test_a_later_success_replaces_a_failure(tmp_path: Path) -> None:
    """A resumed run repeats what failed."""
    failed = made(
        H100, benchmark="attention", workload="w", table="frozen", provider="flex", failed="Error: x"
    )
    again = [row for row in attention_rows(H100, workload="w") if row["provider"] == "flex"]
    report_gpu.record(written([failed, *again], tmp_path / "rows.jsonl"), tmp_path)
    text = report_gpu.gpu(tmp_path)
    assert "Error: x" not in text
    assert "| flex | 0.900 (222) |" in text


@pytest.mark.parametrize(
    ("machine", "card", "tflops"),
    [
        (H100, "h100", 989),
        ("NVIDIA H200", "h200", 989),
        ("NVIDIA A100-SXM4-80GB", "a100", 312.0),
        (MI300X, "mi300x", 1307),
        ("NVIDIA H100 PCIe", "nvidia-h100-pcie", None),
        ("NVIDIA GeForce RTX 4090", "nvidia-geforce-rtx-4090", None),
    ],
)
def test_peaks_are_those_of_the_board(machine: str, card: str, tflops: float | None) -> None:
    found = card_of(machine)
    assert report_gpu._file_name(machine) == card
    assert (found and found.tflops) == tflops


def test_a_card_without_a_known_peak_is_drawn_too(tmp_path: Path) -> None:
    report_gpu.record(written(attention_rows("NVIDIA L4"), tmp_path / "rows.jsonl"), tmp_path)
    (path,) = report_gpu.draw(tmp_path)
    assert path.name == "gpu-nvidia-l4.png"


def test_lines_of_fine_tuned_models() -> None:
    """Older rows have some facts in the first of their run only; a run with equal settings replaces the one before; settings keep lines apart."""
    facts = {
        "benchmark": "finetune",
        "model": "m",
        "k": 50,
        "targets": 10,
        "log_loss": 0.5,
        "gauc": 0.7,
        "item_user_auc": 0.6,
    }
    start = {**facts, "part": "start", "data": "d", "token_budget": 4096, "train_targets": 1000, "epochs": 2}
    rows = [
        start,
        {**facts, "part": "test", "test_k": 50, "auc": 0.71},
        {**facts, "part": "training", "seconds": 12.3},
        {**facts, "part": "test", "test_k": 1, "auc": 0.72},
        {**start, "token_budget": 8192},
        {**facts, "part": "test", "test_k": 50, "auc": 0.73},
        {**facts, "part": "test", "test_k": 50, "auc": 0.74},
        start,
        {**facts, "part": "test", "test_k": 50, "auc": 0.75},
        {
            **start,
            "part": "test",
            "test_k": 50,
            "auc": 0.76,
            "token_budget": 2048,
            "template": "{item}|`{label}\n",
        },
    ]
    lines = finetuned(rows).splitlines()[4:]
    assert [line.split(" | ")[2:4] + line.split(" | ")[6:10] for line in lines] == [
        ["50", "4,096", "", "50", "10", "0.7500"],
        ["50", "8,192", "", "50", "10", "0.7400"],
        ["50", "2,048", "", "50", "10", "0.7600"],
    ]
    assert lines[2].startswith(r"| m | `{item}\|'{label}\n` | 50")
    assert finetuned([]) == ""
