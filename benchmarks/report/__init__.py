"""From recorded rows to README.md: tables, plots, and the command `python -m benchmarks.report`."""

from benchmarks.report.report import main
