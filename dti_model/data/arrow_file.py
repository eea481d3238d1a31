"""Arrow files of one record batch: written from memory, read by mapping them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt
import pyarrow as pa

from dti_model.data.errors import DataError
from dti_model.data.folder import AGAIN


def write_table(table: pa.Table, target: Path | pa.NativeFile) -> None:
    """Write a table as one record batch, so that its columns can be mapped."""
    sink = str(target) if isinstance(target, Path) else target
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())


def read_table(path: Path, columns: Mapping[str, pa.DataType]) -> pa.Table:
    """Map a file.

    Args:
        path: the file.
        columns: what its columns must be.

    Raises:
        DataError: no Arrow file, or one of other columns.
    """
    try:
        with pa.memory_map(str(path)) as source:
            table = pa.ipc.open_file(source).read_all()
    except (OSError, pa.ArrowException) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(f"{path}: not a complete Arrow file ({reason}). {AGAIN}") from error
    if table.schema != pa.schema(list(columns.items())):
        found = {field.name: str(field.type) for field in table.schema}
        wanted = {name: str(kind) for name, kind in columns.items()}
        raise DataError(f"{path}: the columns are {found}, expected {wanted}. {AGAIN}")
    return table


def only_chunk(column: pa.ChunkedArray) -> Any:
    """The array of a column; a view where the column is one record batch."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def as_numpy(column: pa.ChunkedArray) -> npt.NDArray[Any]:
    """A column without nulls as a view."""
    array: npt.NDArray[Any] = only_chunk(column).to_numpy(zero_copy_only=True)
    return array
