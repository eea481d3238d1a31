"""The README's part about GPUs, from rows of the GPU suite: `benchmarks/results/gpu-CARD.jsonl`, one file for each card.

    python -m benchmarks.report --record-gpu DIR/rows.jsonl      put a suite's rows there
    python -m benchmarks.report                                  make the README's part and the plots

Without a file the part says that nothing has been measured. Providers that failed stand in the tables with what they said.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.attention import MODES, OURS
from benchmarks.cards import card_of
from benchmarks.recording import RESULTS, Rows, read_rows
from benchmarks.report.finetuning import finetuned
from benchmarks.report.plots import roofline
from benchmarks.report.tables import markdown_table, scoring_lines
from dti_model.files import whole_file

NOTHING = "**Nothing has been timed on a GPU yet.**"
# The machine of a rehearsal's rows begins with this; a row of a CPU counts its threads.
_IMAGINARY, _CPU = "rehearsal", re.compile(r", \d+ threads$")
_LEFT_OUT = "left out: "
HEADLINE = "llama8b_k50_16k"
_TIMES = "forward ms (TFLOP/s) | backward ms (TFLOP/s) | both ms (TFLOP/s)"
# Below this share of repeats with the host ahead, a time may have the host in it.
_AHEAD = 0.9


def _file_name(machine: str) -> str:
    """A card's name in file names: `h100` of "NVIDIA H100 80GB HBM3"; another board's whole name."""
    card = card_of(machine)
    return card.name.lower() if card else re.sub(r"[^a-z0-9]+", "-", machine.lower()).strip("-")


def record(source: Path, results: Path | None = None) -> list[Path]:
    """Append a suite's rows to the files of their cards, each row once.

    Args:
        source: JSON lines of the suite.
        results: folder of the files; default: the project's.

    Returns:
        The files that were written.

    Raises:
        ValueError: a row is a rehearsal's or a CPU's, or there is none that measures something.
    """
    by_card: dict[str, list[str]] = {}
    for number, line in enumerate(source.read_text().splitlines(), 1):
        row = json.loads(line)
        machine = row.get("machine", "")
        if not machine or machine.startswith(_IMAGINARY) or _CPU.search(machine):
            raise ValueError(
                f"{source}, line {number}: rows of a GPU are recorded, and this one is of {machine!r}"
            )
        if not str(row.get("failed", "")).startswith(_LEFT_OUT):
            by_card.setdefault(_file_name(machine), []).append(json.dumps(row))
    if not by_card:
        raise ValueError(f"{source} has no row that measures something")
    written = []
    for card, lines in by_card.items():
        path = (RESULTS if results is None else results) / f"gpu-{card}.jsonl"
        before = path.read_text().splitlines() if path.exists() else []
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in dict.fromkeys([*before, *lines])))
        written.append(path)
    return written


def recorded(results: Path | None = None) -> dict[str, Rows]:
    """Rows by card, as they were appended."""
    folder = RESULTS if results is None else results
    return {path.stem.removeprefix("gpu-"): read_rows(path) for path in sorted(folder.glob("gpu-*.jsonl"))}


def latest(rows: Iterable[dict[str, Any]], *key: str) -> Rows:
    """The last row for each value of these fields, in the order in which the values first came."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        found[tuple(str(row.get(name)) for name in key)] = row
    return list(found.values())


def _of(rows: Rows, benchmark: str, **fields: Any) -> Rows:
    wanted = {"benchmark": benchmark, **fields}
    return [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]


def chosen(rows: Rows) -> dict[str, dict[str, dict[str, dict[str, Any]]]]:
    """Attention rows by workload, then provider, then mode; "failed" is the mode of one that did not run.

    A later row replaces an earlier one; a later success replaces a failure and the other way round. Of one commit's rows those with the
    tiles that won on the card are the later ones. Ours took turns with each baseline: of those rows it is the one in the middle.
    """
    commits = {row.get("commit"): place for place, row in reversed(list(enumerate(rows)))}
    found: dict[str, dict[str, dict[str, dict[str, Any]]]] = {}
    for row in sorted(
        _of(rows, "attention"), key=lambda row: (commits[row.get("commit")], row.get("table") != "frozen")
    ):
        if "check" in row or "provider" not in row:
            continue
        modes = found.setdefault(row["workload"], {}).setdefault(row["provider"], {})
        if "failed" in row and "mode" not in row:
            modes.clear()
            modes["failed"] = row
        else:
            modes.pop("failed", None)
            modes[row["mode"]] = row
    for providers in found.values():
        for mode, last in providers.get(OURS, {}).items():
            providers[OURS][mode] = _in_the_middle(last, rows)
    return found


def _in_the_middle(last: dict[str, Any], rows: Rows) -> dict[str, Any]:
    """Of the turns of ours with baselines that are like the last of them in all but the baseline, the one whose time is the median."""
    if "p50_ms" not in last or "beside" not in last:
        return last
    like = {name: last.get(name) for name in ("workload", "provider", "mode", "commit", "table")}
    turns = [row for row in _of(rows, "attention", **like) if "p50_ms" in row and "beside" in row]
    return sorted(turns, key=lambda row: float(row["p50_ms"]))[(len(turns) - 1) // 2]


def attention(rows: Rows) -> str:
    """A table for each workload that others were timed on, and one of ours on all the rest."""
    parts, alone = [], []
    for workload, providers in chosen(rows).items():
        facts = next(row for row in _of(rows, "attention", workload=workload) if "provider" in row)
        own = providers.get(OURS, {})
        if providers.keys() == {OURS} and "failed" not in own:
            size = f"{facts['rows']:,} | {facts['mean_span']:,.0f}"
            alone.append(f"| `{workload}` | {size} | {' | '.join(_cells(own))} | {_mib(own)} |")
            continue
        both = own.get("forward+backward", {})
        # Timed alone, ours is no denominator: nothing took turns with it.
        ours = None if both.get("alone") else both.get("p50_ms")
        title = f"`{workload}`"
        if "rows" in facts:
            title += f": {facts['rows']:,} rows that see {facts['mean_span']:,.0f} keys each on average"
        lines = [_provider_line(provider, modes, ours) for provider, modes in providers.items()]
        parts += [title, markdown_table(f"| | {_TIMES} | both, over ours | MiB |", lines)]
    if alone:
        head = f"| {OURS} | rows | keys a row | {_TIMES} | MiB |"
        parts.append(markdown_table(head, alone, "Other workloads, ours alone:"))
    notes = (
        "P50 of the device's time; useful TFLOP/s count visible pairs only. No baseline has ALiBi or keys of [SUM] rows' own; those "
        "with a scalar window compute a cheaper, wrong mask: a lower bound on time."
    )
    if any(_host_in(row) for row in _of(rows, "attention")):
        notes += " \\*: the host was not ahead of the device in every repeat, so its time may be in it."
    return "\n\n".join([*parts, notes])


def headline(rows: Rows) -> str:
    """Forward and backward of the first workload, beside the strongest baseline with its mask and beside that mask as a dense tensor."""
    found = chosen(rows).get(HEADLINE, {})
    own = found.get(OURS, {}).get("forward+backward", {})
    if "p50_ms" not in own:
        return ""
    said = f"Forward and backward with Llama-3.1-8B's heads, 50 targets a prompt, {own['rows']:,} rows: {own['useful_tflops']:.0f} TFLOP/s"
    heads = [row for row in _of(rows, "flex_options", heads=32, head_dim=128) if "failed" not in row]
    tried = sum("p50_ms" in row.get("forward+backward", {}) for row in latest(heads, "options"))
    names = {
        "flex_tuned": f"FlexAttention with the best of {tried} settings",
        "sdpa_dense_mask": "SDPA with a dense mask",
    }
    for provider, name in names.items():
        row = found.get(provider, {}).get("forward+backward", {})
        if "ours_p50_ms" in row and "p50_ms" in row:
            said += f", {row['p50_ms'] / row['ours_p50_ms']:.1f} times as fast as {name}"
    return f"{said}."


def _host_in(row: dict[str, Any]) -> bool:
    return bool(row.get("host_ahead", 1.0) < _AHEAD)


def _cells(modes: dict[str, dict[str, Any]]) -> list[str]:
    """Milliseconds and TFLOP/s of each mode."""
    cells = []
    for mode in MODES:
        row = modes.get(mode, {})
        if "p50_ms" in row:
            cells.append(f"{row['p50_ms']:.3f}{'*' if _host_in(row) else ''} ({row['useful_tflops']:.0f})")
        else:
            cells.append(_failed(row) if "failed" in row else "")
    return cells


def _mib(modes: dict[str, dict[str, Any]]) -> str:
    both = modes.get("forward+backward", {})
    return f"{both['peak_mib']:,.0f}" if "peak_mib" in both else ""


def _provider_line(label: str, modes: dict[str, dict[str, Any]], ours: float | None) -> str:
    if "failed" in modes:
        return f"| {label} | {_failed(modes['failed'])} | | | | |"
    both = modes.get("forward+backward", {})
    ours = both.get("ours_p50_ms", ours)  # of the same turns, where the row has it
    over = f"{both['p50_ms'] / ours:.2f}" if ours and "p50_ms" in both else ""
    return f"| {label} | {' | '.join(_cells(modes))} | {over} | {_mib(modes)} |"


def _failed(row: dict[str, Any]) -> str:
    text = str(row["failed"]).replace("|", "\\|").replace("\n", " ")
    return f"failed: {text[:120]}{'…' if len(text) > 120 else ''}"


def checks(rows: Rows) -> str:
    """Errors above their budget, equal runs and memory, as sentences."""
    said = []
    parity_rows = latest(_of(rows, "attention", check="parity"), "workload")
    for row in parity_rows:
        above = ", ".join(f"{name} {share:.2f}" for name, share in row["shares"].items() if share > 1)
        said.append(f"Errors of `{row['workload']}` are above their budget, in shares of it: {above}.")
    others = (row for row in _of(rows, "attention") if row.get("check", "parity") != "parity")
    for row in latest(others, "check"):
        if "failed" in row:
            said.append(f"{row['check']}, {row['workload']}: {_failed(row)}.")
        elif row["check"] == "equal runs":
            said.append(
                f"{row['runs']} runs of `{row['workload']}`, output and gradients: equal bit for bit."
            )
        elif row["memory_ratio"] is not None:
            short, long = row["peak_mib"]
            said.append(
                f"Memory of forward and backward: {short:,.0f} MiB, and {long:,.0f} MiB at {row['rows_ratio']:.1f} times the rows "
                f"({row['memory_ratio']:.1f} times)."
            )
    return " ".join(said)


def parity(rows: Rows) -> str:
    """How many tests of kernels and graphs passed, which failed, and the largest share of an error budget."""
    tests = latest(
        (row for row in _of(rows, "gpu_tests") if row.get("outcome") in ("passed", "failed")), "test"
    )
    if not tests:
        return ""
    passed = sum(row["outcome"] == "passed" for row in tests)
    said = [f"{passed} of {len(tests)} tests passed on this card."]
    said += [f"`{row['test']}`: {_failed(row)}." for row in tests if row["outcome"] == "failed"]
    shares = [share for row in tests for share in row.get("shares", {}).values()]
    if shares:
        said.append(f"The largest error against the float64 reference is {max(shares):.2f} of its budget.")
    return " ".join(said)


def tile_table(rows: Rows) -> str:
    """Winners beside the table's tiles, where a sweep found faster ones."""
    lines = []
    found = latest(_of(rows, "tiles"), "workload", "kernel", "tile")
    for kernel, workload in dict.fromkeys((row["kernel"], row["workload"]) for row in found):
        of = [row for row in found if (row["kernel"], row["workload"]) == (kernel, workload)]
        won = next((row for row in of if row.get("won")), None)
        own = next((row for row in of if row.get("in_table")), None)
        if won is not None and own is not None and won is not own:
            before = f"{own['p50_ms']:.3f}" if "p50_ms" in own else _failed(own)
            lines.append(
                f"| {kernel} | {workload} | {_tile(own)} | {before} | {_tile(won)} | {won['p50_ms']:.3f} |"
            )
    if not lines:
        return ""
    title = "Tiles (rows x keys, warps, stages; `ahead`: the next scores are computed ahead) that beat those that the table had in the sweep:"
    return markdown_table(
        "| kernel | workload | tile of the table then | ms | faster tile | ms |", lines, title
    )


def _tile(row: dict[str, Any]) -> str:
    rows, keys, warps, stages, _, *ahead = row["tile"]
    return f"{rows} x {keys}, {warps}, {stages}{', ahead' if any(ahead) else ''}"


def training(rows: Rows) -> str:
    """Targets/s of both kinds of prompts, and the ratio beside that of FLOPs."""
    # Rows before there were graphs are of steps that were launched kernel by kernel; in those of the first commit with graphs the peak has
    # the graphs' buffers in it, so it has another name since.
    newer = [
        row if "way" in row else {**row, "way": "eager", "eager_peak_mib": row.get("peak_mib")}
        for row in _of(rows, "training")
    ]
    found = latest(newer, "model", "kind", "way")
    if not found:
        return ""
    head = "| model | prompts | targets/s | tokens/s | MFU | MiB | times sliding windows | by FLOPs |"
    lines = []
    for row in found:
        if "failed" in row:
            lines.append(f"| {row['model']} | {_failed(row)} | | | | | | |")
            continue
        mfu = "" if row.get("mfu") is None else f"{row['mfu']:.1%}"
        memory = "" if row.get("eager_peak_mib") is None else f"{row['eager_peak_mib']:,}"
        ratio = f"{row['speedup']:.1f} | {row['flops_ratio']:.1f}" if "speedup" in row else " | "
        lines.append(
            f"| {row['model']} | {row['kind'].replace('_', ' ')}{', as a graph' if row['way'] == 'graph' else ''} | {row['targets_per_s']:,.0f} | {row['tokens_per_s']:,.0f} | "
            f"{mfu} | {memory} | {ratio} |"
        )
    return markdown_table(head, lines, "Training steps in bfloat16, random weights:")


def scoring(rows: Rows) -> str:
    """Milliseconds of requests."""
    found = latest(_of(rows, "score", part="shape"), "model", "candidates", "provider")
    if not found:
        return ""
    first = found[0]
    title = (
        f"Scoring with {first['model']}'s shape in bfloat16, a history of {first['history']} interactions:"
    )
    return markdown_table("| candidates | | p50 / p99 ms | candidates/s | |", scoring_lines(found, 1), title)


def host(rows: Rows) -> str:
    """Microseconds of the host per call."""
    found = latest(_of(rows, "host"), "provider", "reset", "way", "mode")
    if not found:
        return ""
    lines = []
    for provider, reset, way in dict.fromkeys((row["provider"], row["reset"], row["way"]) for row in found):
        cells = []
        for mode in ("forward", "forward+backward"):
            row = next(iter(_of(found, "host", provider=provider, reset=reset, way=way, mode=mode)), {})
            cells.append(f"{row['p50_us']:.0f}" if "p50_us" in row else _failed(row) if row else "")
        lines.append(f"| {provider}{', reset' if reset else ''} | {way} | {' | '.join(cells)} |")
    head = "| | way | forward us | forward and backward us |"
    return markdown_table(head, lines, "Host time of a call (P50, a tiny batch):")


def _points(rows: Rows) -> Rows:
    """Attention rows of the roofline."""
    return [
        row
        for providers in chosen(rows).values()
        for modes in providers.values()
        for row in modes.values()
        if "useful_tflops" in row
    ]


def draw(results: Path | None = None) -> list[Path]:
    """A roofline for every card that has attention rows; of one whose peak is not known, the points alone."""
    drawn = []
    for name, rows in recorded(results).items():
        points = _points(rows)
        if points:
            path = (RESULTS if results is None else results) / f"gpu-{name}.png"
            roofline(points, path, card_of(points[-1]["machine"]))
            drawn.append(path)
    return drawn


def gpu(results: Path | None = None) -> str:
    """The README's part: a section for every card, or that nothing has been measured."""
    sections = []
    for card, rows in recorded(results).items():
        made, commits = rows[-1], ", ".join(dict.fromkeys(row["commit"] for row in rows))
        title = f"**{made['machine']}** (torch {made['torch']}, triton {made.get('triton')}, commit {commits}, {made['date']})"
        parts = [title, parity(rows)]
        if _of(rows, "attention"):
            parts += [headline(rows), attention(rows), checks(rows)]
        if _points(rows):
            parts.append(f"![roofline of {card}](benchmarks/results/gpu-{card}.png)")
        parts += [tile_table(rows), training(rows), finetuned(rows), scoring(rows), host(rows)]
        sections.append("\n\n".join(part for part in parts if part))
    return "\n\n".join(sections) or NOTHING
