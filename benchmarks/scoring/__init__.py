"""Measurements of scoring, on prepared data and at a pretrained model's shape with random weights."""

from benchmarks.scoring.data import REPEATS, SMOKE_REPEATS, measure_candidates, measure_evaluation, new_run
from benchmarks.scoring.rerun import CAPTURE, Rerun
from benchmarks.scoring.shape import measure_shape
