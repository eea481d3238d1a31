"""Data sets to read: one file each, beside what they share, and the table of their names.

A new data set is one file here with a `Source` (source.py) and one row of `SOURCES` (names.py).
"""

from typing import TYPE_CHECKING, Any

from dti_model.data.sources.names import SOURCES, loaded, named_source, source_in_folder

if TYPE_CHECKING:
    from dti_model.data.sources.amazon import AmazonFiles
    from dti_model.data.sources.custom import DATES, CustomFiles
    from dti_model.data.sources.rows import IdTable
    from dti_model.data.sources.source import RawData, Source

# These need polars and msgspec, the table does not.
_READERS = {"AmazonFiles": "amazon", "CustomFiles": "custom", "RawData": "source", "Source": "source"}
_READERS |= {"IdTable": "rows", "DATES": "custom"}


def __getattr__(name: str) -> Any:
    if name not in _READERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return loaded(f"{__name__}.{_READERS[name]}.{name}")
