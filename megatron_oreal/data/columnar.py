"""Rows of Parquet files and of Arrow streams, as the `datasets` library leaves them."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from pyarrow import parquet

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from pathlib import Path

_BATCH_ROWS = 1024


class NotColumnarError(ValueError):
    """A file is not what its name says; the text says how."""


@dataclass(frozen=True)
class ColumnarFile:
    """An open file: the names of its columns, and its rows in batches."""

    columns: tuple[str, ...]
    _batches: Iterator[pa.RecordBatch]

    def rows(self, wanted: Collection[str]) -> Iterator[dict[str, Any]]:
        """Yields the rows, in their order, with those columns that are `wanted`.

        Raises:
            NotColumnarError: The file is damaged.
        """
        with _named_errors():
            for batch in self._batches:
                present = [name for name in self.columns if name in wanted]
                yield from batch.select(present).to_pylist()


@contextlib.contextmanager
def open_columnar(path: Path) -> Iterator[ColumnarFile]:
    """Opens a `.parquet` file, or a `.arrow` stream; rows are read as they are asked for.

    Raises:
        NotColumnarError: The file is of another format.
        OSError: It cannot be read.
    """
    with contextlib.ExitStack() as stack, path.open("rb") as file:
        with _named_errors():
            if path.suffix == ".parquet":
                table = stack.enter_context(parquet.ParquetFile(file))
                names, batches = table.schema_arrow.names, table.iter_batches(_BATCH_ROWS)
            else:
                stream = stack.enter_context(pa.ipc.open_stream(file))
                names, batches = stream.schema.names, iter(stream)
        yield ColumnarFile(tuple(names), batches)


@contextlib.contextmanager
def _named_errors() -> Iterator[None]:
    try:
        yield
    except pa.ArrowException as error:
        raise NotColumnarError(" ".join(str(error).split())) from error
