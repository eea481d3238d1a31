"""Data for click models: raw files in, memory-mapped histories with labels, splits and token ids out."""

from dti_model.data.amazon import AmazonFiles
from dti_model.data.build import prepare
from dti_model.data.custom import CustomFiles
from dti_model.data.errors import DataError
from dti_model.data.split import CONTEXT, TEST, TRAIN, VAL
from dti_model.data.store import PreparedData

__all__ = [
    "CONTEXT",
    "TEST",
    "TRAIN",
    "VAL",
    "AmazonFiles",
    "CustomFiles",
    "DataError",
    "PreparedData",
    "prepare",
]
