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
from typing import BinaryIO

import fsspec
import zstandard

MAX_TEXT_BYTES = 1 << 30  # of one book once unpacked; a small .zst can hold far more than memory
BLOCK = 1 << 20


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
        paths = [path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path)]
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
    return path[len(base) :].lstrip("/") if path.startswith(base) else posixpath.basename(path)


def hash_file(_: None, file: InputFile) -> InputFile:
    """`file` with its size and sha256."""
    digest = hashlib.sha256()
    num_bytes = 0
    with _open(file.path) as raw:
        while block := raw.read(BLOCK):
            digest.update(block)
            num_bytes += len(block)
    return InputFile(file.path, file.key, num_bytes, digest.hexdigest())


@contextlib.contextmanager
def open_unpacked(path: str) -> Iterator[BinaryIO]:
    """The file's bytes, unpacked by its name's ending (.gz, .zst)."""
    with _open(path) as raw:
        if path.endswith(".gz"):
            yield io.BufferedReader(gzip.GzipFile(fileobj=raw, mode="rb"), BLOCK)
        elif path.endswith(".zst"):
            yield io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True), BLOCK)
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
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
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


def _open(path: str) -> BinaryIO:
    return fsspec.open(path, "rb").open() if "://" in path else open(path, "rb")
