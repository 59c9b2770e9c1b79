"""One shard: a WebDataset tar whose samples are pages of consecutive rows.

    00000000.tokens.npy      uint16 or uint32 [P, L]   rows of the page, raw, so that a slice of a row is one range
    00000000.runs.npy        uint32 [n, 3]             length, segment, vision of the rows' runs in turn
    00000000.weights.npy     float32 [n]               loss weight of each run
    00000000.row_starts.npy  uint32 [P + 1]            row r owns runs[row_starts[r] : row_starts[r + 1]]
    00000001.tokens.npy      ...
    __offsets__              uint64 [pages, 4], little-endian, raw: where each member's data begin in this file

A page holds about 1 MiB of tokens (one row where a row is longer): a tar member costs 512 to 1,536 bytes, which
at a member per short row would be 19% of the file. Every page but the shard's last has P rows, so row r of the
shard is row r % P of page r // P. Shards are not compressed, and their bytes are a function of their rows alone.
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from pathlib import Path
from types import TracebackType
from typing import Protocol
from uuid import uuid4

import numpy as np

from lwm_data.format.packed import Arrays, PackedSequence, derive

PAGE_BYTES = 1 << 20  # of tokens
MEMBERS = ("tokens", "runs", "weights", "row_starts")
OFFSETS = "__offsets__"  # WebDataset readers skip names that begin and end with two underscores


def rows_per_page(row_length: int, dtype: np.dtype) -> int:
    """P: the rows of `row_length` tokens whose tokens fill about PAGE_BYTES."""
    return max(1, PAGE_BYTES // (row_length * dtype.itemsize))


class ShardWriter:
    """Writes rows to `path`: under a temporary name, renamed when closed, removed when an error ends the block.

    After the block: `sha256`, `num_bytes`, `num_rows`, `offsets_at` (where the data of `__offsets__` begin).
    """

    def __init__(self, path: Path, row_length: int, dtype: np.dtype) -> None:
        self.path, self.row_length, self.dtype = path, row_length, dtype
        self.num_rows = self.num_bytes = self.offsets_at = 0
        self.sha256 = ""
        self._page_rows = rows_per_page(row_length, dtype)
        self._page: list[PackedSequence] = []
        self._offsets: list[list[int]] = []
        self._hash = hashlib.sha256()
        self._temporary = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
        self._file = open(self._temporary, "wb")  # noqa: SIM115 (closed by __exit__)

    def __enter__(self) -> ShardWriter:
        return self

    def add(self, row: PackedSequence) -> None:
        """Append one row. ValueError where an id does not fit the shard's dtype."""
        assert len(row.tokens) == self.row_length, f"a row of {len(row.tokens)} in a shard of {self.row_length}"
        if int(row.tokens.max()) > np.iinfo(self.dtype).max:
            raise ValueError(f"{self.path.name}: id {int(row.tokens.max())} does not fit {self.dtype}")
        self._page.append(row)
        self.num_rows += 1
        if len(self._page) == self._page_rows:
            self._write_page()

    def __exit__(self, kind: type[BaseException] | None, value: object, traceback: TracebackType | None) -> None:
        try:
            if kind is None:
                if self._page:
                    self._write_page()
                self.offsets_at = self._write_member(OFFSETS, np.array(self._offsets, "<u8").tobytes())
                self._write(bytes(2 * tarfile.BLOCKSIZE))
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()
                os.replace(self._temporary, self.path)
                self.sha256 = self._hash.hexdigest()
        finally:
            self._file.close()
            self._temporary.unlink(missing_ok=True)

    def _write_page(self) -> None:
        name = f"{len(self._offsets):08d}"
        num_runs = [len(row.runs) for row in self._page]
        page = {
            "tokens": np.stack([row.tokens.astype(self.dtype) for row in self._page]),
            "runs": np.concatenate([row.runs for row in self._page]).astype("<u4"),
            "weights": np.concatenate([row.weights for row in self._page]).astype("<f4"),
            "row_starts": np.cumsum([0, *num_runs]).astype("<u4"),
        }
        self._offsets.append([self._write_array(f"{name}.{member}.npy", page[member]) for member in MEMBERS])
        self._page = []

    def _write_array(self, name: str, array: np.ndarray) -> int:
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
        return self._write_member(name, array.data.cast("B"), header.getvalue())

    def _write_member(self, name: str, data: bytes | memoryview, header: bytes = b"") -> int:
        """Write a tar member of header + data; returns where the data begin."""
        info = tarfile.TarInfo(name)
        info.size = len(header) + len(data)
        self._write(info.tobuf(tarfile.USTAR_FORMAT) + header)
        data_at = self.num_bytes
        self._write(data)
        self._write(bytes(-info.size % tarfile.BLOCKSIZE))
        return data_at

    def _write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._hash.update(data)
        self.num_bytes += len(data)


class RangeReader(Protocol):
    """Bytes start..stop of a file, local or remote."""

    def __call__(self, start: int, stop: int) -> bytes: ...


class Shard:
    """Reads single rows, and slices of rows, of a shard by exact ranges.

    page_rows: P above. at: where the data of `__offsets__` begin; both stand in the dataset's index.
    Ranges, not a memory map: with a disk's read-ahead of some MiB a mapped cold slice reads 232 times its bytes.
    """

    def __init__(self, read: RangeReader, row_length: int, dtype: np.dtype, page_rows: int, num_rows: int, at: int):
        self._read, self._row_length, self._dtype, self._page_rows = read, row_length, dtype, page_rows
        num_pages = -(-num_rows // page_rows)
        self._offsets = np.frombuffer(read(at, at + 32 * num_pages), "<u8").reshape(-1, 4).tolist()

    def row(self, row: int, start: int = 0, stop: int | None = None) -> PackedSequence:
        """Row `row` with its whole run table, but only tokens start..stop of it (all of them by default)."""
        page, r = divmod(row, self._page_rows)
        tokens_at, runs_at, weights_at, row_starts_at = self._offsets[page]
        stop = self._row_length if stop is None else stop
        size = self._dtype.itemsize
        row_at = tokens_at + r * self._row_length * size
        tokens = np.frombuffer(self._read(row_at + start * size, row_at + stop * size), self._dtype)
        first, last = np.frombuffer(self._read(row_starts_at + 4 * r, row_starts_at + 4 * r + 8), "<u4").tolist()
        runs = np.frombuffer(self._read(runs_at + 12 * first, runs_at + 12 * last), "<u4").reshape(-1, 3)
        weights = np.frombuffer(self._read(weights_at + 4 * first, weights_at + 4 * last), "<f4")
        return PackedSequence(tokens, runs, weights)

    def arrays(self, row: int, start: int, stop: int) -> Arrays:
        """The five arrays of tokens start..stop of `row`."""
        packed = self.row(row, start, stop)
        return derive(packed.tokens, packed.runs, packed.weights, start)
