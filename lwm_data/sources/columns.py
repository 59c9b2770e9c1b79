"""Rows of Parquet and Arrow files, one at a time, each value read when it is asked for.

a.parquet    url | caption | jpg          for row in read_rows(file):
b.arrow      image {bytes, path} | text       row.fields["caption"], row.value("jpg")
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lwm_data.sources.fields import Fields, UnreadableField
from lwm_data.sources.files import InputFile, open_unpacked
from lwm_data.sources.record import UNREAD, Rejection

UNREADABLE = (pa.ArrowException, OSError, UnicodeDecodeError)  # what a damaged file raises, the last by its names
PICTURES_BATCH = 16  # rows of a Parquet that are held together; a picture can have megabytes
BATCH_BYTES = 32 << 20  # of a Parquet that are held together; fewer rows are, where their mean would take more


@dataclass(frozen=True)
class Row:
    """Row number `number` of a file, from 0; `at` in its batch."""

    number: int
    batch: pa.RecordBatch
    at: int

    @cached_property
    def fields(self) -> Fields:
        return Fields({}, lambda name: field_value(self.batch, name, self.at))

    def value(self, name: str) -> Any:
        """The value of a column, as pyarrow's scalar: large bytes need not be copied to be looked at."""
        return self.batch.column(name)[self.at]

    def num_bytes(self) -> int:
        """Of all its values, from their offsets."""
        return int(self.batch.slice(self.at, 1).nbytes)


def field_value(table: pa.RecordBatch | pa.Table, name: str, at: int) -> Any:
    """The value of column `name` in row `at`; None where there is no such column. UnreadableField."""
    column = table.schema.get_field_index(name)
    if column < 0:
        if name in table.schema.names:
            raise UnreadableField("wrong field", f"{name}: two columns of this name")
        return None
    try:
        return table.column(column)[at].as_py()
    except UnicodeDecodeError as error:
        raise UnreadableField("not UTF-8", f"{name}: {error}") from None
    # A date that Python has none of, a time zone that nobody knows, a decimal of too many digits.
    except (ValueError, ArithmeticError, LookupError, pa.ArrowException) as error:
        raise UnreadableField("wrong field", f"{name}: {type(error).__name__}: {error}") from None


def read_rows(
    file: InputFile, batch_rows: int = PICTURES_BATCH, columns: Collection[str] | None = None
) -> Iterator[Row | Rejection]:
    """The rows of `file`; a last rejection where it is damaged. columns: those that are wanted, else all."""
    number = 0
    try:
        for batch in _batches(file, batch_rows, columns):
            _ = batch.schema.names  # that they are UTF-8, nobody has checked
            for at in range(len(batch)):
                yield Row(number, batch, at)
                number += 1
    except UNREADABLE as error:
        yield damaged(f"{file.key}:{number}", error)


def damaged(key: str, error: Exception) -> Rejection:
    """The rejection of what pyarrow cannot read; what the system cannot read is raised again, it may be passing."""
    if isinstance(error, OSError) and error.errno is not None:
        raise error
    return Rejection(key, UNREAD, f"{' '.join(str(error).split())[:300]}; the rest is not read")


def _batches(file: InputFile, batch_rows: int, columns: Collection[str] | None) -> Iterator[pa.RecordBatch]:
    with open_unpacked(file.path) as raw:
        if file.path.lower().endswith(".parquet"):
            # Pages are read as they are needed, not whole row groups ahead: those of pictures have gigabytes.
            parquet = pq.ParquetFile(raw, pre_buffer=False, buffer_size=1 << 20)
            wanted = None if columns is None else [name for name in parquet.schema_arrow.names if name in columns]
            yield from parquet.iter_batches(min(batch_rows, _rows_of_a_batch(parquet.metadata)), columns=wanted)
            return
        start = raw.read(6)
        raw.seek(0)
        # A map, so that a batch is not read before its rows are; one can be as large as the file.
        mapped = raw if "://" in file.path else pa.memory_map(file.path)
        if start == b"ARROW1":
            reader = pa.ipc.open_file(mapped)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:  # what `datasets` writes
            batches = iter(pa.ipc.open_stream(mapped))
        for batch in batches:
            if columns is not None:
                batch = batch.select([i for i, name in enumerate(batch.schema.names) if name in columns])
            for column in batch.columns:
                # Damaged offsets would be followed to anywhere. That a text is UTF-8 is asked row by row.
                is_text = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
                (column.view(_bytes_type(column.type)) if is_text else column).validate(full=True)
            yield batch


def _rows_of_a_batch(metadata: pq.FileMetaData) -> int:
    """How many rows of the row group with the largest have BATCH_BYTES."""
    groups = map(metadata.row_group, range(metadata.num_row_groups))
    row_bytes = max((group.total_byte_size // max(1, group.num_rows) for group in groups), default=0)
    return max(1, BATCH_BYTES // max(1, row_bytes))


def _bytes_type(kind: pa.DataType) -> pa.DataType:
    return pa.binary() if pa.types.is_string(kind) else pa.large_binary()
