"""Writes the rows of one shard, and the table of what lies in them, from the token store.

rows     [cut cut cut] [cut cut] ...         a cut is a stretch of an example: all of it, unless a naive row cut it
example  unit 3, record 17, part 0           where its tokens lie in the store
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int64

from lwm_data.folder import Folder
from lwm_data.format.dataset import ShardInfo, SourceCounts
from lwm_data.format.example import Example
from lwm_data.format.packed import LossWeighting, Packing, Piece, pack_row
from lwm_data.format.shard import ShardWriter
from lwm_data.manifest_sources import Overflow
from lwm_data.sources.fit import fit
from lwm_data.token_store import StoreCache
from lwm_data.whole_file import whole_file
from lwm_data.work_folder import ShardRecord, WorkFolder, examples_name

EXAMPLES_SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),  # of the shard, from 0
        pa.field("segment", pa.int32(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("part", pa.int32(), nullable=False),
        pa.field("num_tokens", pa.int64(), nullable=False),
        pa.field("num_vision", pa.int64(), nullable=False),
        pa.field("num_trained", pa.int64(), nullable=False),
    ]
)


@dataclass(frozen=True)
class StoreRef:
    """A file of the token store and the source that it belongs to."""

    name: str
    source: str
    overflow: Overflow


@dataclass(frozen=True)
class RowFormat:
    """What all shards of a dataset have in common. stores: files of the folder `store`, by unit number.

    lock: of the build's WorkFolder.
    """

    out: Folder
    store: Folder
    stores: tuple[StoreRef, ...]
    row_length: int
    dtype: str
    packing: Packing
    weighting: LossWeighting
    lock: str = ""


@dataclass(frozen=True)
class ShardRows:
    """The rows of one shard.

    cuts: int64[n, 5]: unit, record, part, start, stop; row_starts: row r has cuts row_starts[r] to row_starts[r + 1].
    """

    name: str
    cuts: Int64[np.ndarray, "n 5"]
    row_starts: Int64[np.ndarray, " rows_and_1"]


def write_shard_rows(form: RowFormat, shard: ShardRows) -> ShardRecord:
    """Write the shard and its examples table, then their record. Their bytes are a function of the arguments."""
    work = WorkFolder(form.out, form.lock)
    with work.writing():
        with work.adding() as folder:
            record = _write(form, shard, folder)
        work.write_record(record)
    return record


def write_examples(
    writer: ShardWriter, table: pa.Table, num_tokens: int, num_trained: int, sources: dict[str, SourceCounts]
) -> ShardRecord:
    """Write the examples table beside the shard that was written; the record of both."""
    path = writer.path.with_name(examples_name(writer.path.name))
    with whole_file(path) as file:
        pq.write_table(table, file, compression="zstd")
    examples = path.read_bytes()
    return ShardRecord(
        shard=ShardInfo(
            name=writer.path.name,
            num_rows=writer.num_rows,
            num_bytes=writer.num_bytes,
            sha256=writer.sha256,
            offsets_at=writer.offsets_at,
            examples_sha256=hashlib.sha256(examples).hexdigest(),
        ),
        examples_bytes=len(examples),
        num_tokens=num_tokens,
        num_trained=num_trained,
        sources=sources,
    )


def _write(form: RowFormat, shard: ShardRows, folder: Path) -> ShardRecord:
    stores = StoreCache(form.store)
    columns: dict[str, list[object]] = {name: [] for name in EXAMPLES_SCHEMA.names}
    counts: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    num_tokens = num_trained = 0
    dtype = np.dtype(form.dtype)
    with ShardWriter(folder / shard.name, form.row_length, dtype) as writer:
        for row, (first, last) in enumerate(zip(shard.row_starts[:-1], shard.row_starts[1:], strict=True)):
            pieces = []
            for segment, cut in enumerate(shard.cuts[first:last].tolist(), start=1):
                piece = _piece(form, stores, *cut)
                pieces.append(piece)
                of = counts[piece.example.source]
                of["examples"] += piece.start == 0
                inside = _counts(piece)
                for name, count in inside.items():
                    of[name] += count
                example = piece.example
                line = (row, segment if form.packing == "masked" else 1, example.source, example.key, example.part)
                values = (*line, inside["tokens"], inside["vision_tokens"], inside["trained_tokens"])
                for column, value in zip(columns.values(), values, strict=True):
                    column.append(value)
            packed = pack_row(pieces, form.row_length, form.packing, form.weighting)
            num_tokens += sum(piece.stop - piece.start for piece in pieces)
            num_trained += int(packed.trained_lengths.sum())
            writer.add(packed)
    table = pa.table(columns, schema=EXAMPLES_SCHEMA)
    sources = {name: SourceCounts.model_validate(of) for name, of in counts.items()}
    return write_examples(writer, table, num_tokens, num_trained, sources)


def _piece(form: RowFormat, stores: StoreCache, unit: int, record: int, part: int, start: int, stop: int) -> Piece:
    ref = form.stores[unit]
    whole = stores.record(ref.name, record)
    if form.packing == "naive":  # rows cut where they end; nothing is fitted
        example = Example(ref.source, whole.key, part, whole.runs)
    else:
        example = fit(whole, ref.source, part, form.row_length, ref.overflow)
    return Piece(example, start, stop)


def _counts(piece: Piece) -> dict[str, int]:
    """The tokens of the piece, those of vision, and those that its example trains."""
    counts = {"tokens": piece.stop - piece.start, "vision_tokens": 0, "trained_tokens": 0}
    begin = 0
    for run in piece.example.runs:
        end = begin + len(run.tokens)
        inside = max(0, min(end, piece.stop) - max(begin, piece.start))
        counts["vision_tokens"] += inside if run.is_vision else 0
        counts["trained_tokens"] += inside if run.trained else 0
        begin = end
    return counts
