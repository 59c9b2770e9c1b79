"""The token store: tokenized input, one Arrow IPC file per unit of work, reused at every row length.

    novels-3f0c...arrow     the name holds a fingerprint of all that its tokens depend on

    key     tokens          run_lengths  run_vision  run_trained  reason       detail
    a.txt   [1 403 77 2]    [1 2 1]      [0 0 0]     [0 1 1]      null         null        a record
    b.txt   []              []           []          []           "not UTF-8"  "byte ..."  a rejection
    c.txt   [1 5 2]         [1 1 1]      [0 0 0]     [0 1 1]      "no mark"    "no END"    a record with a note

Files are written in batches of bounded size and read through a memory map, so that lengths cost no tokens and a
record costs its own bytes. Pages of the map that were read are given back now and then: the system would take them
when it needs room, but until then they look like a build that grows with its input.
"""

from __future__ import annotations

import bisect
import contextlib
import mmap
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Int64

from lwm_data.folder import DiskFolder, Folder
from lwm_data.format.example import Run
from lwm_data.sources.fit import RunShape
from lwm_data.sources.record import Record, Rejection
from lwm_data.whole_file import whole_file

BATCH_TOKENS = 1 << 22  # a batch is written once it has this many
BATCH_RECORDS = 1 << 14
OPEN_FILES = 128  # memory maps kept at a time
MAPPED_BYTES = 1 << 25  # about what of them is in memory at a time
TOUCHED_BYTES = 1 << 18  # of one record, or more: its columns lie apart, and the system maps pages around each

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
    told = [(record.reason, record.detail) if isinstance(record, Rejection) else record.note for record in records]
    return pa.record_batch(
        [
            pa.array([record.key for record in records], pa.string()),
            *lists,
            pa.array([of[0] if of else None for of in told], pa.string()),
            pa.array([of[1] if of else None for of in told], pa.string()),
        ],
        schema=SCHEMA,
    )


class StoreFile:
    """One file of the store, mapped. ValueError where it cannot be read."""

    def __init__(self, path: Path) -> None:
        with _damage(path), open(path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._open(pa.ipc.open_file(pa.py_buffer(self._map)))

    @classmethod
    def without_tokens(cls, folder: Folder, name: str) -> StoreFile:
        """A file of `folder`, for all but `record`: behind a URL, some kB of it are read and no token."""
        if isinstance(folder, DiskFolder):
            return cls(folder.path / name)
        store = cls.__new__(cls)
        with _damage(f"{folder}/{name}"), folder.open(name) as file:
            columns = [i for i, field in enumerate(SCHEMA) if field.name != "tokens"]
            options = pa.ipc.IpcReadOptions(included_fields=columns)
            store._open(pa.ipc.open_file(pa.PythonFile(file, mode="r"), options=options))
        return store

    def _open(self, reader: Any) -> None:
        self._batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        self._first = np.cumsum([0, *(batch.num_rows for batch in self._batches)]).tolist()

    def __len__(self) -> int:
        """Records and rejections."""
        return int(self._first[-1])

    def lengths(self) -> Int64[np.ndarray, " n"]:
        """The tokens of each record; 0 for a rejection. No token is read."""
        return np.concatenate([np.zeros(0, np.int64), *map(_lengths, self._batches)])

    def rejections(self) -> list[Rejection]:
        return self._told(of_records=False)

    def notes(self) -> list[Rejection]:
        """What is told of records that are taken all the same."""
        return self._told(of_records=True)

    def _told(self, of_records: bool) -> list[Rejection]:
        found = []
        for batch in self._batches:
            reasons = batch.column("reason")
            if reasons.null_count == len(reasons):
                continue
            keys, details = batch.column("key"), batch.column("detail")
            is_told = np.asarray(reasons.is_valid()) & ((_lengths(batch) > 0) == of_records)
            found += [
                Rejection(keys[i].as_py(), reasons[i].as_py(), details[i].as_py()) for i in np.flatnonzero(is_told)
            ]
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

    def give_back(self) -> None:
        """Let the system have the pages that were read; they are read again when they are needed."""
        self._map.madvise(mmap.MADV_DONTNEED)

    def _find(self, record: int) -> tuple[pa.RecordBatch, int]:
        batch = bisect.bisect_right(self._first, record) - 1
        return self._batches[batch], record - self._first[batch]


class StoreCache:
    """Opened files of a token store, the last OPEN_FILES of them."""

    def __init__(self, store: Folder) -> None:
        self._store = store
        self._open: OrderedDict[str, StoreFile] = OrderedDict()
        self._touched = 0

    def record(self, name: str, record: int) -> Record:
        """Record number `record` of the file `name`; its tokens are views of the map."""
        found = self._file(name).record(record)
        self._touched += TOUCHED_BYTES + 4 * sum(len(run.tokens) for run in found.runs)
        if self._touched > MAPPED_BYTES:
            for file in self._open.values():
                file.give_back()
            self._touched = 0
        return found

    def _file(self, name: str) -> StoreFile:
        if name in self._open:
            self._open.move_to_end(name)
        else:
            if len(self._open) >= OPEN_FILES:
                self._open.popitem(last=False)
            self._open[name] = StoreFile(self._store.fetch(name))
        return self._open[name]


@contextlib.contextmanager
def _damage(path: Path | str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowInvalid, OSError, ValueError) as error:  # ValueError: nothing to map
        raise ValueError(f"{path}: damaged token store file ({error}); delete it and build again") from error


def _lengths(batch: pa.RecordBatch) -> Int64[np.ndarray, " n"]:
    """The tokens of each record, from those of its runs."""
    runs = batch.column("run_lengths")
    ends = np.concatenate([[0], np.cumsum(np.asarray(runs.values), dtype=np.int64)])
    return np.diff(ends[np.asarray(runs.offsets)])


def _values(column: Any, i: int) -> np.ndarray:
    """List number `i` of a list column, as a view."""
    start, stop = column.offsets[i].as_py(), column.offsets[i + 1].as_py()
    return np.asarray(column.values[start:stop])
