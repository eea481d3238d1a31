"""The shared part of all benchmark commands: options, exit statuses, and rows with their provenance. PyTorch is loaded by the first row."""

from benchmarks.recording.command import (
    DOUBTFUL,
    INCOMPLETE,
    SKIPPED,
    STATUSES,
    add_record,
    make_parser,
    parse_measuring,
    refuse_record,
)
from benchmarks.recording.origin import REHEARSING, ROOT, commit_of, provenance, version_of
from benchmarks.recording.rows import (
    RESULTS,
    SCRATCH,
    TIME_IS_UP,
    RowFiles,
    Rows,
    failure,
    last_run,
    read_rows,
    replace_rows,
    row_lines,
)
