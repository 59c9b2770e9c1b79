"""The token store: tokenized input, one Arrow IPC file per unit of work, reused at every row length.

    novels-3f0c...arrow     the name holds a fingerprint of all that its tokens depend on

    key     tokens          run_lengths  run_vision  run_trained  reason       detail
    a.txt   [1 403 77 2]    [1 2 1]      [0 0 0]     [0 1 1]      null         null        a record
    b.txt   []              []           []          []           "not UTF-8"  "byte ..."  a rejection

Files are written in batches of bounded size and read through a memory map, so that lengths cost no tokens and a
record costs its own bytes.
"""

from __future__ import annotations

import bisect
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Int64

from lwm_data.engine import whole_file
from lwm_data.format.example import Run
from lwm_data.sources.fit import RunShape
from lwm_data.sources.record import Record, Rejection

BATCH_TOKENS = 1 << 22  # a batch is written once it has this many
BATCH_RECORDS = 1 << 14
OPEN_FILES = 128  # memory maps kept at a time

SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("tokens", pa.large_list(pa.uint32()), nullable=False),
        pa.field("run_lengths", pa.list_(pa.uint32()), nullable=False),
        pa.field("run_vision", pa.list_(pa.uint8()), nullable=False),
        pa.field("run_trained", pa.list_(pa.uint8()), nullable=False),
        pa.field("reason", pa.string()),
        pa.field("detail", pa.string()),
    ]
)


def write_store(path: Path, records: Iterable[Record | Rejection]) -> None:
    """Write `records` to `path`: whole, or not at all."""
    with whole_file(path) as file, pa.ipc.new_file(file, SCHEMA) as writer:
        batch: list[Record | Rejection] = []
        num_tokens = 0
        for record in records:
            batch.append(record)
            if isinstance(record, Record):
                num_tokens += sum(len(run.tokens) for run in record.runs)
            if num_tokens >= BATCH_TOKENS or len(batch) >= BATCH_RECORDS:
                writer.write_batch(_batch(batch))
                batch, num_tokens = [], 0
        if batch:
            writer.write_batch(_batch(batch))


def _batch(records: list[Record | Rejection]) -> pa.RecordBatch:
    runs = [record.runs if isinstance(record, Record) else () for record in records]
    flat = [run for record_runs in runs for run in record_runs]
    tokens = np.concatenate([run.tokens for run in flat]) if flat else np.zeros(0, np.int32)
    run_ends = np.cumsum([0, *(len(record_runs) for record_runs in runs)])
    run_lengths = np.array([len(run.tokens) for run in flat], np.int64)
    token_ends = np.concatenate([[0], np.cumsum(run_lengths)])[run_ends]
    lists = [
        pa.LargeListArray.from_arrays(token_ends, pa.array(tokens.astype(np.uint32))),
        *(
            pa.ListArray.from_arrays(run_ends.astype(np.int32), pa.array(values))
            for values in (
                run_lengths.astype(np.uint32),
                np.array([run.is_vision for run in flat], np.uint8),
                np.array([run.trained for run in flat], np.uint8),
            )
        ),
    ]
    rejections = [record if isinstance(record, Rejection) else None for record in records]
    return pa.record_batch(
        [
            pa.array([record.key for record in records], pa.string()),
            *lists,
            pa.array([r.reason if r else None for r in rejections], pa.string()),
            pa.array([r.detail if r else None for r in rejections], pa.string()),
        ],
        schema=SCHEMA,
    )


class StoreFile:
    """One file of the store, mapped. ValueError where it cannot be read."""

    def __init__(self, path: Path) -> None:
        try:
            self._map = pa.memory_map(str(path))
            reader = pa.ipc.open_file(self._map)
            self._batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"{path}: damaged token store file ({error}); delete it and build again") from error
        self._first = np.cumsum([0, *(batch.num_rows for batch in self._batches)]).tolist()

    def __len__(self) -> int:
        """Records and rejections."""
        return int(self._first[-1])

    def lengths(self) -> Int64[np.ndarray, " n"]:
        """The tokens of each record; 0 for a rejection. No token is read."""
        return np.concatenate(
            [np.zeros(0, np.int64), *(np.diff(_offsets(batch.column("tokens"))) for batch in self._batches)]
        )

    def rejections(self) -> list[Rejection]:
        found = []
        for batch in self._batches:
            reasons = batch.column("reason")
            if reasons.null_count == len(reasons):
                continue
            rows = zip(batch.column("key"), reasons, batch.column("detail"), strict=True)
            found += [Rejection(key.as_py(), why.as_py(), detail.as_py()) for key, why, detail in rows if why.is_valid]
        return found

    def key(self, record: int) -> str:
        batch, i = self._find(record)
        return str(batch.column("key")[i].as_py())

    def shape(self, record: int) -> tuple[RunShape, ...]:
        """The runs of record number `record` without their tokens."""
        batch, i = self._find(record)
        lengths = _values(batch.column("run_lengths"), i).tolist()
        vision = _values(batch.column("run_vision"), i).tolist()
        trained = _values(batch.column("run_trained"), i).tolist()
        return tuple(RunShape(n, bool(v), bool(t)) for n, v, t in zip(lengths, vision, trained, strict=True))

    def record(self, record: int) -> Record:
        """Record number `record`; its tokens are views of the map."""
        batch, i = self._find(record)
        lengths = _values(batch.column("run_lengths"), i)
        vision = _values(batch.column("run_vision"), i)
        trained = _values(batch.column("run_trained"), i)
        tokens = _values(batch.column("tokens"), i).view(np.int32)
        ends = np.cumsum(lengths, dtype=np.int64).tolist()
        starts = [0, *ends[:-1]]
        return Record(
            str(batch.column("key")[i].as_py()),
            tuple(
                Run(tokens[start:end], bool(is_vision), bool(is_trained))
                for start, end, is_vision, is_trained in zip(starts, ends, vision, trained, strict=True)
            ),
        )

    def _find(self, record: int) -> tuple[pa.RecordBatch, int]:
        batch = bisect.bisect_right(self._first, record) - 1
        return self._batches[batch], record - self._first[batch]


class StoreCache:
    """Opened store files, the last OPEN_FILES of them."""

    def __init__(self) -> None:
        self._open: OrderedDict[Path, StoreFile] = OrderedDict()

    def __getitem__(self, path: Path) -> StoreFile:
        if path in self._open:
            self._open.move_to_end(path)
        else:
            if len(self._open) >= OPEN_FILES:
                self._open.popitem(last=False)
            self._open[path] = StoreFile(path)
        return self._open[path]


def _offsets(column: Any) -> np.ndarray:
    return np.asarray(column.offsets)


def _values(column: Any, i: int) -> np.ndarray:
    """List number `i` of a list column, as a view."""
    start, stop = column.offsets[i].as_py(), column.offsets[i + 1].as_py()
    return np.asarray(column.values[start:stop])
