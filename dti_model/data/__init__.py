"""Data for click models: raw files in, memory-mapped histories with labels, splits and token ids out."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dti_model.data.errors import DataError
from dti_model.data.split import CONTEXT, TEST, TRAIN, VAL
from dti_model.data.store import PreparedData

if TYPE_CHECKING:
    from dti_model.data.build import prepare
    from dti_model.data.sources.amazon import AmazonFiles
    from dti_model.data.sources.custom import CustomFiles

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

# Prepared folders are made with polars and msgspec, and read without them: these names are imported when they are asked for.
_MAKERS = {"AmazonFiles": "sources.amazon", "CustomFiles": "sources.custom", "prepare": "build"}


def __getattr__(name: str) -> Any:
    if name not in _MAKERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f"{__name__}.{_MAKERS[name]}"), name)
    except ModuleNotFoundError as error:
        if error.name not in ("polars", "msgspec"):
            raise
        raise ModuleNotFoundError(
            f"making prepared data needs {error.name}, which is not installed: pip install {error.name}",
            name=error.name,
        ) from error
