"""Measuring: times of the host and of a GPU, precisions, clocks, the imaginary card of a rehearsal, and compiling without a GPU."""

from benchmarks.measuring.clocks import card_state
from benchmarks.measuring.device_time import DeviceLost, Timing, check_device, device_times
from benchmarks.measuring.launching import Door, launches_at_the_door
from benchmarks.measuring.precision import DTYPES, PRECISIONS, add_precision, precision_of, precisions_here
from benchmarks.measuring.rehearsal import DEVICE
from benchmarks.measuring.stand_in import (
    Key,
    compile_launch,
    distinct_launches,
    driver_of,
    recorded_launches,
    warm_up,
    why_not_compiled,
)
from benchmarks.measuring.timing import interleaved_ms, median_and_p99, percentiles_ms, slowest_ms
from benchmarks.recording import REHEARSING
