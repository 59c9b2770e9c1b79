"""The file of pairs, written whole: JSON lines, the same compressed, or Parquet, by the name's ending.

.outputs     names under which a run wrote pairs here, so that one whose manifest names another removes the stale file
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from lwm_data.manifest_qa import OUTPUT
from lwm_data.whole_file import whole_file

OUTPUTS = ".outputs"
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
    "parameters": pa.string(),  # JSON: their types are whatever the manifest has
    "time": pa.string(),
    "usage": pa.struct({"prompt_tokens": pa.int64(), "completion_tokens": pa.int64(), "estimated": pa.bool_()}),
}

Write = Callable[[dict[str, Any]], None]


@contextlib.contextmanager
def only_output(out: Path, name: str) -> Iterator[None]:
    """Once the block, which writes out/name, has ended well, what earlier runs wrote under other names is gone."""
    noted = out / OUTPUTS
    names = {*noted.read_text(encoding="utf-8").split(), name} if noted.is_file() else {name}
    with whole_file(noted) as file:
        file.write("\n".join(sorted(names)).encode())
    yield
    for old in names - {name}:
        if OUTPUT.fullmatch(old):
            (out / old).unlink(missing_ok=True)
    with whole_file(noted) as file:
        file.write(name.encode())


@contextlib.contextmanager
def pair_file(path: Path) -> Iterator[Write]:
    """A function that writes one pair, of the keys FIELDS, to `path`; it stands there only once the block ends well."""
    with whole_file(path) as file:
        if path.suffix == ".parquet":
            with _parquet(file) as write:
                yield write
        elif path.suffix == ".zst":
            with zstandard.ZstdCompressor(level=10).stream_writer(file, closefd=False) as packed:
                yield lambda row: _line(packed, row)
        else:
            yield lambda row: _line(file, row)


def _line(file: BinaryIO | zstandard.ZstdCompressionWriter, row: dict[str, Any]) -> None:
    file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")


@contextlib.contextmanager
def _parquet(file: BinaryIO) -> Iterator[Write]:
    schema = pa.schema(list(FIELDS.items()))
    rows: list[dict[str, Any]] = []
    with pq.ParquetWriter(file, schema, compression="zstd") as writer:

        def write(row: dict[str, Any]) -> None:
            rows.append(row | {"parameters": json.dumps(row["parameters"], ensure_ascii=False)})
            if len(rows) >= GROUP:
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))
                rows.clear()

        yield write
        writer.write_table(pa.Table.from_pylist(rows, schema=schema))
