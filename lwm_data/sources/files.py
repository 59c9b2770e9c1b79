"""Input files: found by glob, read through compression, named the same on every machine.

path: /data/books/*/*.txt.zst
      |---------|             the folder before the first wildcard
                 en/dune.txt.zst   what is left is the file's key
"""

from __future__ import annotations

import contextlib
import glob
import gzip
import hashlib
import io
import os
import posixpath
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import fsspec
import zstandard

MAX_TEXT_BYTES = 64 << 20  # of one book once unpacked; encoding takes about 58 bytes of memory for each of them
BLOCK = 1 << 20
ZSTD_BLOCK = 1 << 10  # packed bytes taken at a time; each can stand for 32 kB, and what they stand for is in memory
DAMAGED = (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError)  # what reading a damaged archive raises


@dataclass(frozen=True)
class InputFile:
    """path: local or URL. key: the path below the glob's fixed folder. sha256 of the file as it lies there."""

    path: str
    key: str
    num_bytes: int = 0
    sha256: str = ""


def find_files(pattern: str, manifest_key: str) -> list[InputFile]:
    """The files that `pattern` names, by name. ValueError with `manifest_key` where there are none."""
    if "://" in pattern:
        fs, inner = fsspec.core.url_to_fs(pattern)
        paths = [str(fs.unstrip_protocol(path)) for path in fs.glob(inner) if fs.isfile(path)]
    else:
        # `**/**` names a file once for every way to it.
        paths = [path for path in set(glob.glob(pattern, recursive=True)) if os.path.isfile(path)]
    if not paths:
        what = "matches no file" if glob.has_magic(pattern) else "no such file"
        raise ValueError(
            f"{manifest_key}: got {pattern}: {what}; wanted the path of input files, relative to the manifest"
        )
    base = pattern
    while glob.has_magic(base):
        base = posixpath.dirname(base)
    if base == pattern:
        base = posixpath.dirname(pattern)
    return [InputFile(path, _below(path, base)) for path in sorted(paths)]


def _below(path: str, base: str) -> str:
    key = path[len(base) :].lstrip("/") if path.startswith(base) else posixpath.basename(path)
    return key.encode("utf-8", "backslashreplace").decode()  # a file's name need not be UTF-8, a key must


def hash_file(_: None, file: InputFile) -> InputFile:
    """`file` with its size and sha256."""
    digest = hashlib.sha256()
    num_bytes = 0
    with _open(file.path) as raw:
        while block := raw.read(BLOCK):
            digest.update(block)
            num_bytes += len(block)
    return InputFile(file.path, file.key, num_bytes, digest.hexdigest())


def check_unchanged(file: InputFile) -> None:
    """ValueError where `file`, just read, is not what was hashed: its tokens would stand under its old name."""
    if hash_file(None, file) != file:
        raise ValueError(f"{file.path}: changed while it was read; build again once nothing writes to it")


@contextlib.contextmanager
def open_unpacked(path: str) -> Iterator[BinaryIO]:
    """The file's bytes, unpacked by its name's ending (.gz, .zst)."""
    with _open(path) as raw:
        if path.endswith(".gz"):
            yield io.BufferedReader(gzip.GzipFile(fileobj=raw, mode="rb"), BLOCK)
        elif path.endswith(".zst"):
            yield io.BufferedReader(_ZstdFrames(raw), BLOCK)
        else:
            yield raw


def read_text(path: str) -> str:
    """The whole file as text, without its byte order mark.

    ValueError where it is empty, not UTF-8, damaged or larger than MAX_TEXT_BYTES; its two arguments are the reason,
    one of few, and the detail.
    """
    try:
        with open_unpacked(path) as file:
            data = file.read(MAX_TEXT_BYTES + 1)
    except DAMAGED as error:
        raise ValueError("damaged", f"cannot be unpacked: {error}") from error
    if len(data) > MAX_TEXT_BYTES:
        raise ValueError("too large", f"more than {MAX_TEXT_BYTES:,} bytes; cut the file into books")
    try:
        text = data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(
            "not UTF-8", f"byte 0x{data[error.start]:02x} at offset {error.start:,}; convert the file to UTF-8"
        ) from error
    if not text.strip():
        raise ValueError("empty", f"{len(data):,} bytes without text")
    return text


class _ZstdFrames(io.RawIOBase):
    """The bytes of all frames of a .zst. ZstdError where it ends within one, which zstandard's own reader accepts."""

    def __init__(self, packed: BinaryIO) -> None:
        self._packed = packed
        self._frame: zstandard.ZstdDecompressionObj | None = None  # the one that is not at its end
        self._input = b""
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        while not self._output:
            self._input = self._input or self._packed.read(ZSTD_BLOCK)
            if not self._input:
                if self._frame is not None:
                    raise zstandard.ZstdError("the file is truncated: it ends within a frame")
                return 0
            frame = self._frame or zstandard.ZstdDecompressor().decompressobj()
            self._output = memoryview(frame.decompress(self._input))
            self._frame, self._input = (None, frame.unused_data) if frame.eof else (frame, b"")
        count = min(len(buffer), len(self._output))
        buffer[:count] = self._output[:count]
        self._output = self._output[count:]
        return count


def _open(path: str) -> BinaryIO:
    return fsspec.open(path, "rb").open() if "://" in path else open(path, "rb")
