"""Data for click models: raw files in, memory-mapped histories with labels, splits and token ids out."""

from typing import TYPE_CHECKING, Any

from dti_model.data.affinities import CLICK_UNITS, affinity_text, expected_rates
from dti_model.data.arrow_file import write_table
from dti_model.data.categories import ItemCategories, categories_of, counted_categories
from dti_model.data.contexts import FIRST, gap_text, is_value, moment_texts
from dti_model.data.errors import DataError, OneLineError
from dti_model.data.folder import STATS_FILE, write_stats
from dti_model.data.ranges import ranges
from dti_model.data.rates import ctr_text, rate_text
from dti_model.data.sources import SOURCES, loaded, named_source
from dti_model.data.split import CONTEXT, SPLIT_CODES, TEST, TRAIN, VAL
from dti_model.data.store import COLUMNS, PreparedData
from dti_model.data.text_encoder import ENCODING_VERSION, TextEncoder, TokenIds
from dti_model.data.texts import FINISHED, MAX_CHARS, TEMPLATE, Template, field_text, template_text
from dti_model.data.times import UNITS, Clock
from dti_model.data.tokens import LABEL_TEXTS, SUM, label_tokens, plain_backend

if TYPE_CHECKING:
    from dti_model.data.build import prepare
    from dti_model.data.extension import extend, files_like
    from dti_model.data.sources import AmazonFiles, CustomFiles

__all__ = [
    "CLICK_UNITS",
    "COLUMNS",
    "CONTEXT",
    "ENCODING_VERSION",
    "FINISHED",
    "FIRST",
    "LABEL_TEXTS",
    "MAX_CHARS",
    "SOURCES",
    "SPLIT_CODES",
    "STATS_FILE",
    "SUM",
    "TEMPLATE",
    "TEST",
    "TRAIN",
    "UNITS",
    "VAL",
    "AmazonFiles",
    "Clock",
    "CustomFiles",
    "DataError",
    "ItemCategories",
    "OneLineError",
    "PreparedData",
    "Template",
    "TextEncoder",
    "TokenIds",
    "affinity_text",
    "categories_of",
    "counted_categories",
    "ctr_text",
    "expected_rates",
    "extend",
    "field_text",
    "files_like",
    "gap_text",
    "is_value",
    "label_tokens",
    "moment_texts",
    "named_source",
    "plain_backend",
    "prepare",
    "ranges",
    "rate_text",
    "template_text",
    "write_stats",
    "write_table",
]

# Prepared folders are made with polars and msgspec, and read without them: these names are imported when they are asked for.
_MAKERS = {"AmazonFiles": "sources", "CustomFiles": "sources", "prepare": "build"}
_MAKERS |= dict.fromkeys(("extend", "files_like"), "extension")


def __getattr__(name: str) -> Any:
    if name not in _MAKERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return loaded(f"{__name__}.{_MAKERS[name]}.{name}")
