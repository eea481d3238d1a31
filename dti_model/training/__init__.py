"""Training: one run, a search over runs, their checkpoints and results, and what training costs."""

from __future__ import annotations

from dti_model.training.compare import Kind, measure_training, packed_epoch, small_steps, timed_step
from dti_model.training.driver import train
from dti_model.training.flops import PEAK_TFLOPS, StepCost, peak_flops
from dti_model.training.graphed_steps import NO_LABEL, StepGraphs, padded_batch
from dti_model.training.grid_search import search
from dti_model.training.setup import trainer_of, training_arguments
from dti_model.training.trainer import RunLog, StreamTrainer
