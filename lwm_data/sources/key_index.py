"""Keys of a shard's records by their 64-bit hash: ten million of them take some hundred megabytes, not several GB.

    SeenKeys     was this key there before?        8 bytes a key
    KeyedRows    the row of a key in a Parquet     12 bytes a row, and the row group that was last asked for

Two keys of one shard with the same hash: among ten million, once in 370,000 shards; the second would count as seen.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int32, UInt64

from lwm_data.sources.columns import UNREADABLE, damaged, field_value
from lwm_data.sources.files import InputFile, open_unpacked
from lwm_data.sources.record import Rejection

RECENT = 1 << 16  # keys that are held as Python's integers before they are sorted into an array
BATCH = 1 << 16  # rows


class SeenKeys:
    """A set that only grows: sorted arrays, each at least twice as long as the next, and the newest keys."""

    def __init__(self) -> None:
        self._recent: set[int] = set()
        self._sorted: list[UInt64[np.ndarray, " n"]] = []

    def add(self, key: str) -> bool:
        """Whether `key` is new; it is not from now on."""
        value = _hash(key.encode("utf-8", "surrogatepass"))
        if value in self._recent or any(_place(array, value) is not None for array in self._sorted):
            return False
        self._recent.add(value)
        if len(self._recent) == RECENT:
            merged = np.sort(np.fromiter(self._recent, np.uint64, RECENT))
            while self._sorted and len(self._sorted[-1]) <= len(merged):
                merged = np.sort(np.concatenate([self._sorted.pop(), merged]))
            self._sorted.append(merged)
            self._recent = set()
        return True


class KeyedRows:
    """The rows of the Parquet beside a tar, by its column `key`; rows that follow the tar's order are read once.

    rejection: why the file cannot be read, once something was asked for.
    """

    def __init__(self, file: InputFile) -> None:
        self._file = file
        self._hashes: UInt64[np.ndarray, " n"] | None = None
        self._rows: Int32[np.ndarray, " n"] = np.zeros(0, np.int32)
        self._starts: list[int] = []  # the first row of each row group
        self._names: frozenset[str] = frozenset()
        self._group = -1
        self._table: pa.Table | None = None
        self.rejection: Rejection | None = None

    def value(self, key: str, name: str) -> Any:
        """The field `name` of the row `key`; None where there is none. UnreadableField."""
        if self.rejection is not None:
            return None
        try:
            if self._hashes is None:
                self._index()
            assert self._hashes is not None, "just made"
            place = _place(self._hashes, _hash(key.encode("utf-8", "surrogatepass"))) if name in self._names else None
            return None if place is None else self._at(int(self._rows[place]), name)
        except UNREADABLE as error:
            self.rejection = damaged(self._file.key, error)
            return None

    def _index(self) -> None:
        with open_unpacked(self._file.path) as raw:
            parquet = pq.ParquetFile(raw)
            self._names = frozenset(parquet.schema_arrow.names)
            sizes = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
            self._starts = [0, *np.cumsum(sizes).tolist()]
            hashes = np.zeros(self._starts[-1] if "key" in self._names else 0, np.uint64)
            if len(hashes):
                at = 0
                for batch in parquet.iter_batches(batch_size=BATCH, columns=["key"]):
                    for key in batch.column(0).cast(pa.string()).cast(pa.binary()).to_pylist():
                        hashes[at] = _hash(key or b"")
                        at += 1
        order = np.argsort(hashes, kind="stable")
        self._hashes, self._rows = hashes[order], order.astype(np.int32)

    def _at(self, row: int, name: str) -> Any:
        group = int(np.searchsorted(self._starts, row, side="right")) - 1
        if group != self._group or self._table is None:
            with open_unpacked(self._file.path) as raw:
                self._table = pq.ParquetFile(raw).read_row_group(group)
            self._group = group
        return field_value(self._table, name, row - self._starts[group])


def _hash(key: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big")


def _place(array: UInt64[np.ndarray, " n"], value: int) -> int | None:
    """Where the sorted `array` has `value`."""
    place = int(np.searchsorted(array, np.uint64(value)))
    return place if place < len(array) and int(array[place]) == value else None
