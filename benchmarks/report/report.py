"""From recorded results to the README: tables and pictures that cannot drift from their rows.

    python -m benchmarks.report                      rewrite the generated parts of README.md
    python -m benchmarks.report --check              fail if they differ from the recorded results
    python -m benchmarks.report --record-run RUN [--name quickstart] [--command "make quickstart"]
                                                     record a finished run: its metrics, its plot, and the command that made it
    python -m benchmarks.report --record-gpu DIR/rows.jsonl
                                                     record what `benchmarks.gpu_suite` measured on a GPU

A generated part of README.md stands between `<!-- begin NAME -->` and `<!-- end NAME -->`.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import benchmarks.report.gpu as report_gpu
from benchmarks.attention import ratios
from benchmarks.measuring import precision_of
from benchmarks.recording import RESULTS, last_run, make_parser, provenance, read_rows
from benchmarks.report.days import days
from benchmarks.report.movies import movies
from benchmarks.report.plots import attention_over_rows, auc_over_k, leak_by_layers, time_over_k
from benchmarks.report.quality import LEAK, leak, quality, quality_rows
from benchmarks.report.tables import Row, by_precision, markdown_table, precisions_in, scoring_table
from dti_kernels import StreamLayout
from dti_model.config import TrainConfig
from dti_model.data import PreparedData
from dti_model.evaluation import metrics_table, plot_mask, sentence_about_baselines
from dti_model.files import whole_file, write_json

README = Path(__file__).parents[2] / "README.md"
QUICKSTART = RESULTS / "quickstart.json"
ATTENTION_CPU = RESULTS / "attention-cpu.jsonl"
SCORE_CPU = RESULTS / "score-cpu.jsonl"
TRAIN_CPU = RESULTS / "train-cpu.jsonl"


def quickstart() -> str:
    """The output of the recorded quickstart run."""
    recorded = json.loads(QUICKSTART.read_text())
    metrics, made = recorded["metrics"], recorded["provenance"]
    output = metrics_table(metrics) + "\n"
    output += sentence_about_baselines(metrics["test"], metrics["baselines"]["test"])
    return f"```text\n{output}\n```\n\n({made['machine']}, torch {made['torch']}, commit {made['commit']}.)"


def attention_cpu() -> str:
    """Rows of the last CPU run of the attention benchmark, and the ratios inside that run."""
    last = last_run(read_rows(ATTENTION_CPU))
    lines = []
    for row in last:
        times = " / ".join(f"{row[f'p{p}_ms']:.0f}" for p in (20, 50, 80))
        cells = [row["workload"], row["provider"], row["mode"], times, str(row["useful_gflops"])]
        lines.append(f"| {' | '.join(cells)} |")
    found = ratios(last)
    made = markdown_table("| workload | provider | mode | p20 / p50 / p80 ms | useful GFLOP/s |", lines)
    said = (
        f"{made}\n\n{last[-1]['machine']}: {found['speedup_over_sdpa_dense_mask']:.1f} times as fast as SDPA under the equal dense "
        f"mask at T = 4096, forward and backward; {found['growth']:.1f} times the time for 4 times the rows."
    )
    if "bf16_over_fp32" in found:
        said += (
            f" In bfloat16 {found['bf16_over_fp32']:.1f} times as fast as in float32, and "
            f"{found['bf16_over_sdpa_dense_mask_fp32']:.1f} times as fast as SDPA in float32 "
            f"({found['bf16_over_sdpa_dense_mask_bf16']:.1f} times as SDPA in bfloat16)."
        )
    return said


def score_cpu() -> str:
    """Rows of the last CPU runs of both parts of the scoring benchmark."""
    rows = read_rows(SCORE_CPU)
    made = {row["part"]: (row["date"], row["commit"]) for row in rows}
    last = [row for row in rows if (row["date"], row["commit"]) == made[row["part"]]]
    candidates = [row for row in last if row["part"] == "candidates"]
    made_of = candidates[0]
    evaluation = [row for row in last if row["part"] == "evaluation"]
    packed, careful, plain = (row for row in evaluation if precision_of(row) == "fp32")
    said = (
        f"{scoring_table(candidates, 0)}\n\n{made_of['machine']}, {made_of['model']} model, a history of {made_of['history']} interactions.\n"
        f"Evaluation of {packed['targets']:,} targets of {packed['data']}'s test split ({packed['model']}), equal scores: "
        f"{packed['targets_per_s']:,.0f} targets/s, against {plain['targets_per_s']:,.0f} of left-padded batches in plain "
        f"Hugging Face ({packed['speedup']:.1f} x) and {careful['targets_per_s']:,.0f} where those compute the last position's "
        f"logits only ({packed['targets_per_s'] / careful['targets_per_s']:.1f} x)."
    )
    if in_bfloat16 := [row for row in evaluation if precision_of(row) == "bf16"]:
        packed, careful, plain = in_bfloat16
        said += (
            f" In bfloat16 {packed['targets_per_s']:,.0f} targets/s ({packed['over_fp32']:.1f} times float32), against "
            f"{plain['targets_per_s']:,.0f} and {careful['targets_per_s']:,.0f}."
        )
    return said


def training_rows() -> list[dict[str, Any]]:
    """Rows of every model's last run of the training benchmark."""
    rows = read_rows(TRAIN_CPU)
    models = dict.fromkeys(row["model"] for row in rows)
    return [row for model in models for row in last_run(row for row in rows if row["model"] == model)]


def train_cpu() -> str:
    """Training speed over k of every model in its last CPU run, beside what counting predicts."""
    last = training_rows()
    head = "| model | k | targets/s | times k = 1 | by rows | by FLOPs | by equation 3 | attention's share | peak MiB |"
    precisions = precisions_in(last)
    if len(precisions) > 1:
        head = head.replace("| times k = 1", "| times float32 | times k = 1")
    compiled = any("over_eager" in row for row in last)
    if compiled:
        head = head.replace("| times k = 1", "| compiled | times k = 1")
    lines = []
    for of in by_precision(last, "model", "k"):
        row = next(iter(of.values()))
        equation = "" if row["equation_3"] is None else f"{row['equation_3']:.1f}"
        cells = [row["model"], str(row["k"]), _each(of, precisions, "targets_per_s", ",.0f")]
        if len(precisions) > 1:
            cells.append(f"{of['bf16']['over_fp32']:.2f}" if "over_fp32" in of.get("bf16", {}) else "")
        if compiled:
            cells.append(_each(of, precisions, "over_eager", ".2f") if "over_eager" in row else "")
        cells += [_each(of, precisions, "speedup", ".1f"), f"{row['rows_ratio']:.1f}"]
        cells += [f"{row['flops_ratio']:.1f}", equation, _each(of, precisions, "attention_share", ".0%")]
        lines.append(f"| {' | '.join([*cells, _each(of, precisions, 'peak_mib', ',.0f')])} |")
    made = last[-1]
    commits = ", ".join(dict.fromkeys(row["commit"] for row in last))
    about = f"({made['machine']}, {made['data']}, mode {made['mode']}, commit {commits}.)"
    if compiled:
        about = f"Compiled: times as many targets/s with `--optim.compile true`. {about}"
    if len(precisions) > 1:
        about = f"Two figures are of float32 and of bfloat16. {about}"
    return f"{markdown_table(head, lines)}\n\n{about}"


def _each(of: dict[str, Row], precisions: list[str], field: str, form: str) -> str:
    """A field in each precision."""
    return " / ".join(format(of[name][field], form) if name in of else "?" for name in precisions)


PARTS: dict[str, Callable[[], str]] = {
    "quickstart": quickstart,
    "ml-1m": movies,
    "train-cpu": train_cpu,
    "attention-cpu": attention_cpu,
    "score-cpu": score_cpu,
    "gpu": report_gpu.gpu,
    "quality": quality,
    "days": days,
    "leak": leak,
}


def render(text: str) -> str:
    """README text with every generated part made anew.

    Raises:
        ValueError: a part has no place in the text.
    """
    for name, make in PARTS.items():
        pattern = re.compile(rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(
                f"README.md has no part between '<!-- begin {name} -->' and '<!-- end {name} -->'"
            )
        text = pattern.sub(partial(_filled, make()), text)
    return text


def _filled(made: str, match: re.Match[str]) -> str:
    return f"{match[1]}{made}\n{match[2]}"


def draw_mask() -> None:
    """The README's picture: two prompts, a window of two interactions, a prefix of one token."""
    layout = StreamLayout.build(
        item_lengths=[[3, 2, 4, 2, 3], [2, 3, 2]],
        label_lengths=[[1, 1, 1, 1, 0], [1, 1, 0]],
        num_targets=[3, 2],
        window=2,
        prefix_lengths=[1, 1],
    )
    plot_mask(layout, RESULTS / "mask.png")


def draw_plots() -> None:
    """Every picture whose rows are recorded."""
    draw_mask()
    attention_over_rows(last_run(read_rows(ATTENTION_CPU)), RESULTS / "attention-cpu.png")
    if rows := quality_rows("table1"):
        auc_over_k(rows, RESULTS / "auc-over-k.png")
    if rows := read_rows(LEAK):
        random_weights = [row for row in last_run(rows) if row["weights"] == "random weights"]
        leak_by_layers(random_weights, RESULTS / "leak.png")
    if rows := training_rows():
        time_over_k(rows, RESULTS / "train-cpu.png")
    report_gpu.draw()


def record_run(run: Path, name: str, command: str) -> None:
    """Keep a run's metrics and plot as `NAME.json` and `NAME.png` under results/, with the command that made it.

    Raises:
        FileNotFoundError: the run is not finished, or its data are gone.
    """
    metrics: dict[str, Any] = json.loads((run / "metrics.json").read_text())
    recorded = {
        "provenance": provenance(),
        "command": command,
        "settings": _settings(run),
        "metrics": metrics,
    }
    RESULTS.mkdir(exist_ok=True)
    write_json(RESULTS / f"{name}.json", recorded)
    with whole_file(RESULTS / f"{name}.png") as temporary:
        shutil.copyfile(run / "report.png", temporary)


def _settings(run: Path) -> dict[str, Any]:
    """The settings of a run, and the templates of its data's texts (null: the source's own, or none); without places."""
    config = TrainConfig.load(run)
    data = PreparedData.open(config.data)
    texts = {"text": data.text_rule.get("text"), "context": (data.context_rule or {}).get("text")}
    settings = asdict(config)
    return {name: value for name, value in settings.items() if name not in ("data", "out", "init")} | texts


def main() -> int:
    """Rewrite or check README.md."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--check", action="store_true")
    add("--record-run", type=Path, help="run folder of `dti train`")
    add("--name", default=QUICKSTART.stem, help="of the recorded run")
    add("--command", default="make quickstart", help="that made the recorded run")
    add("--record-gpu", type=Path, help="file of rows of the GPU suite")
    options = parser.parse_args()
    if options.record_gpu is not None:
        try:
            written = report_gpu.record(options.record_gpu)
        except ValueError as error:
            parser.error(str(error))
        print("rows:", *written)
    if options.record_run is not None:
        record_run(options.record_run, options.name, options.command)
    text = README.read_text()
    made = render(text)
    if options.check:
        if made != text:
            print(
                "README.md differs from benchmarks/results: run `python -m benchmarks.report`",
                file=sys.stderr,
            )
            return 1
        return 0
    draw_plots()
    with whole_file(README) as temporary:
        temporary.write_text(made)
    return 0
