"""One shard: a WebDataset tar whose samples are pages of consecutive rows.

    00000000.tokens.npy      uint16 or uint32 [P, L]   rows of the page, raw, so that a slice of a row is one range
    00000000.runs.npy        uint16 or uint32 [n, 3]   length, segment, vision of the rows' runs in turn
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
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from uuid import uuid4

import numpy as np

from lwm_data.format.index import FORMAT_VERSION
from lwm_data.format.packed import PackedSequence

PAGE_BYTES = 1 << 20  # of tokens
MEMBERS = ("tokens", "runs", "weights", "row_starts")
OFFSETS = "__offsets__"  # WebDataset readers skip names that begin and end with two underscores
PAGES_AHEAD = 2  # pages that may wait for their hash


def rows_per_page(row_length: int, dtype: np.dtype) -> int:
    """P: the rows of `row_length` tokens whose tokens fill about PAGE_BYTES."""
    return max(1, PAGE_BYTES // (row_length * dtype.itemsize))


def runs_dtype(row_length: int, format_version: int) -> np.dtype:
    """Of `runs`: since version 2 uint16 where a row's lengths and segments fit it, uint32 everywhere before."""
    return np.dtype("<u2" if format_version >= 2 and row_length < 1 << 16 else "<u4")


class ShardWriter:
    """Writes rows to `path`: under a temporary name, renamed when closed, removed when an error ends the block.

    After the block: `sha256`, `num_bytes`, `num_rows`, `offsets_at` (where the data of `__offsets__` begin).
    A thread hashes pages while they are written and the next is filled: SHA-256 takes as long as all the rest.
    """

    def __init__(self, path: Path, row_length: int, dtype: np.dtype) -> None:
        self.path, self.row_length, self.dtype = path, row_length, dtype
        self.num_rows = self.num_bytes = self.offsets_at = 0
        self.sha256 = ""
        self._page_rows = rows_per_page(row_length, dtype)
        self._runs_dtype = runs_dtype(row_length, FORMAT_VERSION)
        self._begin_page()
        self._offsets: list[list[int]] = []
        self._hash = hashlib.sha256()
        self._added: list[bytes | memoryview] = []
        self._hasher = ThreadPoolExecutor(1, "shard sha256")
        self._unhashed: deque[Future[None]] = deque()
        self._temporary = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
        self._file = open(self._temporary, "wb")  # noqa: SIM115 (closed by __exit__)

    def __enter__(self) -> ShardWriter:
        return self

    def add(self, row: PackedSequence) -> None:
        """Append one row. ValueError where an id does not fit the shard's dtype."""
        assert len(row.tokens) == self.row_length, f"a row of {len(row.tokens)} in a shard of {self.row_length}"
        if row.tokens.dtype != self.dtype and int(row.tokens.max()) > np.iinfo(self.dtype).max:
            raise ValueError(f"{self.path.name}: id {int(row.tokens.max())} does not fit {self.dtype}")
        self._tokens[len(self._runs)] = row.tokens
        self._runs.append(row.runs)
        self._weights.append(row.weights)
        self.num_rows += 1
        if len(self._runs) == self._page_rows:
            self._write_page()

    def __exit__(self, kind: type[BaseException] | None, value: object, traceback: TracebackType | None) -> None:
        try:
            if kind is None:
                if self._runs:
                    self._write_page()
                self.offsets_at = self._add_member(OFFSETS, np.array(self._offsets, "<u8").tobytes())
                self._add(bytes(2 * tarfile.BLOCKSIZE))
                self._flush()
                os.fsync(self._file.fileno())
                self._file.close()
                self._hasher.shutdown()
                self.sha256 = self._hash.hexdigest()
                os.replace(self._temporary, self.path)
        finally:
            self._hasher.shutdown()
            self._file.close()
            self._temporary.unlink(missing_ok=True)

    def _begin_page(self) -> None:
        self._tokens = np.empty((self._page_rows, self.row_length), self.dtype)
        self._runs: list[np.ndarray] = []
        self._weights: list[np.ndarray] = []

    def _write_page(self) -> None:
        name = f"{len(self._offsets):08d}"
        page = {
            "tokens": self._tokens[: len(self._runs)],
            "runs": np.concatenate(self._runs).astype(self._runs_dtype, copy=False),
            "weights": np.concatenate(self._weights).astype("<f4", copy=False),
            "row_starts": np.cumsum([0, *map(len, self._runs)]).astype("<u4"),
        }
        self._offsets.append([self._add_array(f"{name}.{member}.npy", page[member]) for member in MEMBERS])
        self._flush()
        self._begin_page()

    def _add_array(self, name: str, array: np.ndarray) -> int:
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
        return self._add_member(name, array.data.cast("B"), header.getvalue())

    def _add_member(self, name: str, data: bytes | memoryview, header: bytes = b"") -> int:
        """Add a tar member of header + data; returns where the data begin in the file."""
        info = tarfile.TarInfo(name)
        info.size = len(header) + len(data)
        self._add(info.tobuf(tarfile.USTAR_FORMAT) + header)
        data_at = self.num_bytes
        self._add(data)
        self._add(bytes(-info.size % tarfile.BLOCKSIZE))
        return data_at

    def _add(self, data: bytes | memoryview) -> None:
        self._added.append(data)
        self.num_bytes += len(data)

    def _flush(self) -> None:
        """Write what was added, and give it to the thread that hashes."""
        parts, self._added = self._added, []
        if len(self._unhashed) == PAGES_AHEAD:
            self._unhashed.popleft().result()
        self._unhashed.append(self._hasher.submit(self._update, parts))
        begin = self._file.tell()
        self._file.writelines(parts)
        self._file.flush()
        if hasattr(os, "posix_fadvise"):  # has the disk begin to write them, so that fsync finds little left
            os.posix_fadvise(self._file.fileno(), begin, self.num_bytes - begin, os.POSIX_FADV_DONTNEED)

    def _update(self, parts: list[bytes | memoryview]) -> None:
        for part in parts:
            self._hash.update(part)
