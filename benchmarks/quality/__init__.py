"""Runs of the quality benchmark: what is trained, how it is scored, and how two models are compared."""

from benchmarks.quality.full import commands
from benchmarks.quality.plans import PLANS, SIZES, Arm, Plan
from benchmarks.quality.runs import (
    CELL_FILE,
    Cell,
    restrict_targets,
    run_cell,
    score_cell,
    scores_of,
    started,
)
from benchmarks.quality.stats import Floats, auc_difference
