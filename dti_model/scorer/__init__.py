from __future__ import annotations

from dti_model.scorer.scorer import History, HistoryState, Request, Scorer
from dti_model.scorer.state_cache import StateCache

__all__ = ["History", "HistoryState", "Request", "Scorer", "StateCache"]
