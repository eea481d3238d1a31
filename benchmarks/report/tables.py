"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from benchmarks.measuring import PRECISIONS, median_and_p99, precision_of
from benchmarks.recording import Rows

Row = dict[str, Any]


def markdown_table(head: str, lines: Iterable[str], title: str = "") -> str:
    """A table of written lines below a head, below a title."""
    titles = [title, ""] if title else []
    return "\n".join([*titles, head, "|---" * (head.count("|") - 1) + "|", *lines])


def precisions_in(rows: Rows) -> list[str]:
    """Those that rows were measured in, float32 first."""
    there = {precision_of(row) for row in rows}
    return [precision for precision in PRECISIONS if precision in there]


def by_precision(rows: Rows, *key: str) -> list[dict[str, Row]]:
    """Rows that differ in their precision alone, together by precision; in the order in which they first came."""
    found: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in key), {})[precision_of(row)] = row
    return list(found.values())


def scoring_lines(rows: Rows, digits: int) -> Iterator[str]:
    """Lines of scored candidates; milliseconds get so many digits."""
    for row in rows:
        cells = [str(row["candidates"]), row["provider"], *scoring_cells(row, digits)]
        yield f"| {' | '.join(cells)} |"


def scoring_cells(row: Row, digits: int) -> list[str]:
    """Milliseconds, candidates/s, and the speed over one prompt each."""
    said = median_and_p99(row, digits), f"{row['candidates_per_s']:,.0f}", f"{row['speedup']:.1f} x"
    return list(said)


def scoring_table(rows: Rows, digits: int) -> str:
    """A table of scored candidates; rows in two precisions give two columns for one."""
    precisions = precisions_in(rows)
    if len(precisions) < 2:
        head = "| candidates | provider | p50 / p99 ms | candidates/s | |"
        return markdown_table(head, scoring_lines(rows, digits))
    lines = []
    for of in by_precision(rows, "candidates", "provider"):
        about = next(iter(of.values()))
        columns = [
            scoring_cells(of[precision], digits) if precision in of else 3 * [""] for precision in precisions
        ]
        cells = [cell for pair in zip(*columns) for cell in pair]
        lines.append(f"| {' | '.join([str(about['candidates']), about['provider'], *cells])} |")
    heads = ("p50 / p99 ms", "candidates/s", "times one prompt each")
    head = " | ".join(f"{name} | bfloat16" for name in heads)
    return markdown_table(f"| candidates | provider | {head} |", lines)
