"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from benchmarks.measuring import median_and_p99
from benchmarks.recording import Rows


def markdown_table(head: str, lines: Iterable[str], title: str = "") -> str:
    """A table of written lines below a head, below a title."""
    titles = [title, ""] if title else []
    return "\n".join([*titles, head, "|---" * (head.count("|") - 1) + "|", *lines])


def scoring_lines(rows: Rows, digits: int) -> Iterator[str]:
    """Lines of scored candidates; milliseconds get so many digits."""
    for row in rows:
        cells = [str(row["candidates"]), row["provider"], median_and_p99(row, digits)]
        cells += [f"{row['candidates_per_s']:,.0f}", f"{row['speedup']:.1f} x"]
        yield f"| {' | '.join(cells)} |"
