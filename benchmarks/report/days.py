"""The README part made from the rows of `bench_days`."""

from __future__ import annotations

from benchmarks.recording import RESULTS, Rows, last_run, read_rows
from benchmarks.report.tables import markdown_table

DAYS = RESULTS / "days.jsonl"
# What tells two runs of one day and commit apart.
_SETTINGS = (
    *("data", "model", "first", "period", "days", "seeds", "k", "window", "context_text", "title_tokens"),
    *("epochs", "rate", "token_budget", "continue_epochs", "continue_rate", "continue_budget"),
)


def days_table(rows: Rows) -> str:
    """Arms with their metrics over all days and what a day costs, beside training anew."""
    differences = {row["arm"]: row for row in rows if row["benchmark"] == "days-difference"}
    head = "| | AUC | log loss | GAUC | AUC less that of training anew (95 % interval) | targets a day | seconds a day | of training anew |"
    lines = []
    for row in (row for row in rows if row["benchmark"] == "days-total"):
        cells = [row["arm"], *(f"{row[name]:.4f}" for name in ("auc", "log_loss", "gauc"))]
        found = differences.get(row["arm"])
        cells.append(
            ""
            if found is None
            else f"{found['auc_difference']:+.4f} ({found['low']:+.4f} to {found['high']:+.4f})"
        )
        cells += [f"{row['trained_targets']:,.0f}", f"{row['seconds']:.1f}"]
        cells.append("" if found is None else f"{found['share_of_seconds']:.1%}")
        lines.append(f"| {' | '.join(cells)} |")
    made, scored = rows[-1], [row["day"] for row in rows if row["benchmark"] == "days"]
    total = next(row for row in rows if row["benchmark"] == "days-total")
    texts = "item texts" if made["context_text"] is None else f"item texts and `{made['context_text']}`"
    seeds = f"mean of {made['seeds']} seeds" if made["seeds"] > 1 else "one seed"
    if made["title_tokens"]:
        texts += f", titles of {made['title_tokens']:,} items as one token"
    return (
        f"{markdown_table(head, lines)}\n\n{made['model']} Llama from scratch on {made['data']} ({texts}), {seeds}, trained anew for "
        f"{made['epochs']} epochs at {made['rate']:g}, continued for {made['continue_epochs']} at {made['continue_rate']:g}; "
        f"{total['targets']:,} targets of {scored[0]} to {scored[-1]}, periods of {made['period']:g} days, k = {made['k']}, window "
        f"{made['window']}. (Commit {made['commit']}, {made['machine']}.)"
    )


def days() -> str:
    """The table of the last run."""
    rows = read_rows(DAYS)
    if not rows:
        return "(No run is recorded yet.)"
    last = {name: rows[-1].get(name) for name in _SETTINGS}
    return days_table([row for row in last_run(rows) if {name: row.get(name) for name in _SETTINGS} == last])
