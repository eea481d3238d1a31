"""Exit statuses of a benchmark besides 0 and 1: what `benchmarks.gpu_suite` reads of how a step ended."""

from __future__ import annotations

# The machine cannot do it; automake's tests return this where they cannot run.
SKIPPED = 77
# Something was left out for want of time; the rows of the rest are there. "Try again", in sysexits.h.
INCOMPLETE = 75
# A result is not as it should be, and what comes after it still makes sense: a person must look.
DOUBTFUL = 76
STATUSES = {0: "ok", SKIPPED: "skipped", INCOMPLETE: "incomplete", DOUBTFUL: "doubtful"}
