"""The file of pairs, written whole: JSON lines, the same compressed, or Parquet, by the name's ending."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from lwm_data.whole_file import whole_file

GROUP = 1000  # pairs of a Parquet row group, which are in memory at a time
SPAN = pa.list_(pa.int64())
FIELDS = {
    "id": pa.string(),
    "question": pa.string(),
    "answer": pa.string(),
    "book": pa.string(),
    "book_sha256": pa.string(),
    "chunk": pa.int64(),
    "chars": SPAN,
    "tokens": SPAN,
    "chunk_sha256": pa.string(),
    "tokenizer": pa.string(),
    "language": pa.string(),
    "model": pa.string(),
    "prompt": pa.string(),
    "prompt_version": pa.int64(),
    "parameters": None,  # as the manifest has them
    "time": pa.string(),
    "usage": pa.struct({"prompt_tokens": pa.int64(), "completion_tokens": pa.int64(), "estimated": pa.bool_()}),
}

Write = Callable[[dict[str, Any]], None]


@contextlib.contextmanager
def pair_file(path: Path, parameters: dict[str, Any]) -> Iterator[Write]:
    """A function that writes one pair, of the keys FIELDS, to `path`; it stands there only once the block ends well."""
    with whole_file(path) as file:
        if path.suffix == ".parquet":
            with _parquet(file, parameters) as write:
                yield write
        elif path.suffix == ".zst":
            with zstandard.ZstdCompressor(level=10).stream_writer(file, closefd=False) as packed:
                yield lambda row: _line(packed, row)
        else:
            yield lambda row: _line(file, row)


def _line(file: BinaryIO | zstandard.ZstdCompressionWriter, row: dict[str, Any]) -> None:
    file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")


@contextlib.contextmanager
def _parquet(file: BinaryIO, parameters: dict[str, Any]) -> Iterator[Write]:
    fields = FIELDS | {"parameters": pa.infer_type([parameters])}
    schema = pa.schema(list(fields.items()))
    rows: list[dict[str, Any]] = []
    with pq.ParquetWriter(file, schema, compression="zstd") as writer:

        def write(row: dict[str, Any]) -> None:
            rows.append(row)
            if len(rows) >= GROUP:
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))
                rows.clear()

        yield write
        writer.write_table(pa.Table.from_pylist(rows, schema=schema))
