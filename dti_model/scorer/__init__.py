"""Scores of a trained model: one user's candidates (`Scorer`), encoded histories of many (`StateCache`), files of requests
(`score_file`)."""

from __future__ import annotations

from dti_model.scorer.file import BadLineError, FileScores, score_file
from dti_model.scorer.items import ItemError
from dti_model.scorer.reader import History
from dti_model.scorer.requests import HistoryState, Request
from dti_model.scorer.scorer import BFLOAT16_BOUND, Scorer
from dti_model.scorer.state_cache import StateCache

__all__ = [
    "BFLOAT16_BOUND",
    "BadLineError",
    "FileScores",
    "History",
    "HistoryState",
    "ItemError",
    "Request",
    "Scorer",
    "StateCache",
    "score_file",
]
