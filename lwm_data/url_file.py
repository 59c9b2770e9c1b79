"""A file behind a URL, read in order or here and there, by ranged requests that are tried again where errors pass.

    read(1 MB)     from a buffer of some MB: one request fills it
    seek           costs nothing; the next read is one request

A server that knows no ranges (some of http://) sends the file from its beginning; where that breaks, it is asked again,
and what was read before is skipped. One that does not say where the file ends is refused.
"""

from __future__ import annotations

import contextlib
import io
from typing import Any, BinaryIO, cast

import fsspec

from lwm_data.format.ranges import RemoteRanges
from lwm_data.format.retry import passes, retried

BUFFER = 8 << 20  # bytes of a request when a file is read in order
WHOLE = 1 << 16  # skipped at a time


def open_url(url: str, buffer: int = BUFFER) -> BinaryIO:
    """The file at `url` to read; one request takes about `buffer` bytes."""
    fs, path = fsspec.core.url_to_fs(url)
    info = retried(lambda: fs.info(path))
    if info.get("size") is None or (path.startswith("http") and not info.get("partial")):
        return io.BufferedReader(_Stream(fs, path), WHOLE)
    ranges = RemoteRanges(url)
    return io.BufferedReader(_RangedFile(ranges), min(buffer, max(1, ranges.num_bytes)))


class _RangedFile(io.RawIOBase):
    def __init__(self, ranges: RemoteRanges) -> None:
        self._ranges, self._at = ranges, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._ranges.num_bytes}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        count = max(0, min(len(buffer), self._ranges.num_bytes - self._at))
        if count:
            buffer[:count] = self._ranges.read(self._at, self._at + count)
        self._at += count
        return count


class _Stream(io.RawIOBase):
    def __init__(self, fs: Any, path: str) -> None:
        self._fs, self._path, self._at = fs, path, 0
        self._file: BinaryIO | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        data = retried(lambda: self._read(len(buffer)))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        super().close()

    def _read(self, size: int) -> bytes:
        """The next bytes, from a file that is opened anew after an error."""
        try:
            if self._file is None:
                self._file = cast(BinaryIO, self._fs.open(self._path, "rb", block_size=0))
                _refuse_without_end(self._file, self._path)
                left = self._at
                while left:
                    skipped = len(self._file.read(min(left, WHOLE)))
                    if not skipped:
                        raise ValueError(f"{self._path}: became shorter while it was read")
                    left -= skipped
            return bytes(self._file.read(size))
        except Exception as error:
            if passes(error) and self._file is not None:
                with contextlib.suppress(Exception):
                    self._file.close()
                self._file = None
            raise


def _refuse_without_end(file: object, path: str) -> None:
    """ValueError where an HTTP answer ends with its connection: one that broke would look like the file's end."""
    headers = getattr(getattr(file, "r", None), "headers", None)
    if headers is not None and "Content-Length" not in headers and "Transfer-Encoding" not in headers:
        raise ValueError(
            f"{path}: the server says neither how long the file is nor where it ends, so that half of it could pass "
            "for all; download it, and name the file on the disk"
        )
