"""Data for click models: raw files in, memory-mapped histories with labels, splits and token ids out."""

from dti_model.data.build import prepare
from dti_model.data.errors import DataError
from dti_model.data.split import CONTEXT, TEST, TRAIN, VAL
from dti_model.data.store import PreparedData

__all__ = ["CONTEXT", "TEST", "TRAIN", "VAL", "DataError", "PreparedData", "prepare"]
