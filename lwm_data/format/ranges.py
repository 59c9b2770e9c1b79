"""Exact ranges of bytes of a file, from a disk or over a URL.

    read, read_into    one request of just these bytes: right whether or not they are in the page cache
    mapped             the whole local file as memory: no system call for each range, for many short ones at a time
    will_need          starts to load a range that will be asked for

A plain memory map reads 232 times the bytes of a cold slice, and so would a plain descriptor, since a disk's
read-ahead can be 8 MiB; here both are told that access is random, so a disk reads the blocks of the range alone.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from functools import cached_property
from pathlib import PurePosixPath

import fsspec

from lwm_data.format.retry import retried


class LocalRanges:
    """A file on a disk, by `pread`. Descriptor and map are closed with the object."""

    def __init__(self, path: str) -> None:
        self._name = PurePosixPath(path).name
        self._descriptor = os.open(path, os.O_RDONLY)
        self.num_bytes = os.fstat(self._descriptor).st_size
        self._advise(0, 0, "RANDOM")

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # `os` may be gone when the program ends
        if hasattr(self, "_descriptor"):
            close(self._descriptor)

    def read(self, start: int, stop: int) -> bytes:
        """Bytes start..stop. ValueError where the file ends before."""
        data = os.pread(self._descriptor, stop - start, start)
        self._whole(len(data), stop - start, start)
        return data

    def read_into(self, start: int, out: memoryview) -> None:
        """Fill `out` (bytes) with what begins at `start`. ValueError where the file ends before."""
        self._whole(os.preadv(self._descriptor, (out,), start), len(out), start)

    def will_need(self, start: int, stop: int) -> None:
        """Have the disk load bytes start..stop; returns at once."""
        self._advise(start, stop - start, "WILLNEED")

    @cached_property
    def mapped(self) -> mmap.mmap:
        """The whole file as memory. It must not be cut while it is looked at: that would end the program."""
        mapped = mmap.mmap(self._descriptor, 0, prot=mmap.PROT_READ)
        if hasattr(mmap, "MADV_RANDOM"):
            mapped.madvise(mmap.MADV_RANDOM)
        return mapped

    def _advise(self, start: int, size: int, advice: str) -> None:
        if hasattr(os, "posix_fadvise"):  # not on a Mac
            os.posix_fadvise(self._descriptor, start, size, getattr(os, f"POSIX_FADV_{advice}"))

    def _whole(self, got: int, wanted: int, start: int) -> None:
        if got != wanted:
            raise ValueError(f"{self._name}: {got:,} of {wanted:,} bytes at {start:,}: truncated")


class RemoteRanges:
    """A file over an fsspec URL, by ranged requests; methods as those of LocalRanges.

    ValueError where the server does not tell the file's size, or sends more than the range: not every HTTP server has
    ranges, and whole shards for slices would look like a slow success.
    """

    def __init__(self, url: str) -> None:
        self._fs, self._path = fsspec.core.url_to_fs(url)
        size = retried(lambda: self._fs.size(self._path))
        if size is None:
            raise ValueError(f"{url}: the server does not tell its size; use one that does, or copy it to a disk")
        self.num_bytes = int(size)

    def read(self, start: int, stop: int) -> bytes:
        data = bytes(retried(lambda: self._fs.cat_file(self._path, start=start, end=stop)))
        if len(data) > stop - start:
            raise ValueError(
                f"{self._path}: got {len(data):,} bytes; wanted {stop - start:,} at {start:,}: the server does not "
                "serve ranges of a file; use one that does, or copy the dataset to a disk"
            )
        if len(data) != stop - start:
            raise ValueError(f"{self._path}: {len(data):,} of {stop - start:,} bytes at {start:,}: truncated")
        return data

    def read_into(self, start: int, out: memoryview) -> None:
        out[:] = self.read(start, start + len(out))


def open_ranges(path: str) -> LocalRanges | RemoteRanges:
    """The file `path`, local or any fsspec URL."""
    return RemoteRanges(path) if "://" in path else LocalRanges(path)
