"""Steps of `benchmarks.gpu_suite`, each a command of its own, and the folder that they leave. This face loads no PyTorch."""

from benchmarks.gpu.child import how_it_ended, run_child
from benchmarks.gpu.results import (
    log,
    mend_rows,
    note_origin,
    num_rows,
    origin_of,
    pack,
    read_summary,
    remove_packed,
    same_origin,
    set_aside_tiles,
    table,
    unpack,
    write_summary,
)
from benchmarks.gpu.steps import SLOTS, Places, Step, steps_of
