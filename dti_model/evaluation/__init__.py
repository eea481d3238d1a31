"""How good a model is: scores of prepared targets, metrics, baselines, tables and plots."""

from __future__ import annotations

from dti_model.evaluation.baselines import baseline_metrics, baselines_of_splits, item_user_auc
from dti_model.evaluation.calibration import fit_calibration
from dti_model.evaluation.metrics import click_metrics, grouped_auc
from dti_model.evaluation.plots import REPORT_MARK, plot_mask, plot_report
from dti_model.evaluation.report import metrics_table, sentence_about_baselines
from dti_model.evaluation.scoring import score_targets
from dti_model.evaluation.splits import (
    OLDER_PREDICTION_COLUMNS,
    PREDICTION_COLUMNS,
    calibration_facts,
    eval_targets,
    evaluate_run,
    score_split,
    split_metrics,
    write_predictions,
)
