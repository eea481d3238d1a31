"""The README part made from the rows of `bench_days`."""

from __future__ import annotations

from benchmarks.recording import RESULTS, Rows, last_run, read_rows
from benchmarks.report.quality import difference_text
from benchmarks.report.tables import markdown_table

DAYS = RESULTS / "days.jsonl"


def days_table(rows: Rows) -> str:
    """Arms with their metrics over all days and what a day costs, beside training anew."""
    differences = {row["arm"]: row for row in rows if row["benchmark"] == "days-difference"}
    head = "| | AUC | log loss | GAUC | AUC less that of training anew (95 % interval) | targets a day | seconds a day | of training anew |"
    lines = []
    for row in (row for row in rows if row["benchmark"] == "days-total"):
        cells = [row["arm"], *(f"{row[name]:.4f}" for name in ("auc", "log_loss", "gauc"))]
        found = differences.get(row["arm"])
        cells.append("" if found is None else difference_text(found))
        cells += [f"{row['trained_targets']:,.0f}", f"{row['seconds']:.1f}"]
        cells.append("" if found is None else f"{found['share_of_seconds']:.1%}")
        lines.append(f"| {' | '.join(cells)} |")
    made, of = rows[-1], rows[-1]["settings"]
    scored = [row["day"] for row in rows if row["benchmark"] == "days"]
    total = next(row for row in rows if row["benchmark"] == "days-total")
    texts = "item texts" if of["context_text"] is None else f"item texts and `{of['context_text']}`"
    seeds = f"mean of {of['seeds']} seeds" if of["seeds"] > 1 else "one seed"
    if of["title_tokens"]:
        texts += f", titles of {of['title_tokens']:,} items as one token"
    return (
        f"{markdown_table(head, lines)}\n\n{of['layers']} x {of['width']} Llama from scratch on {of['data']} ({texts}), {seeds}, trained anew for "
        f"{of['epochs']} epochs at {of['rate']:g}, continued for {of['continue_epochs']} at {of['continue_rate']:g}; "
        f"{total['targets']:,} targets of {scored[0]} to {scored[-1]}, periods of {of['period']:g} days, k = {of['k']}, window "
        f"{of['window']}. (Commit {made['commit']}, {made['machine']}.)"
    )


def days() -> str:
    """The table of the last run."""
    rows = read_rows(DAYS)
    if not rows:
        return "(No run is recorded yet.)"
    return days_table([row for row in last_run(rows) if row["settings"] == rows[-1]["settings"]])
