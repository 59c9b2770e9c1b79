"""Input files: found by glob, read through compression, named the same on every machine.

path: /data/books/*/*.txt.zst
      |---------|             the folder before the first wildcard
                 en/dune.txt.zst   what is left is the file's key

path: /data/corpus            a folder that `datasets` saved: the Arrow files that its state.json names

`[[]`, `[*]` and `[?]` stand for these characters themselves, so that a folder may be called `my[corpus]`.
"""

from __future__ import annotations

import contextlib
import glob
import gzip
import hashlib
import io
import json
import os
import posixpath
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import fsspec
import zstandard

from lwm_data.format.retry import refusal, retried
from lwm_data.url_file import open_url

MAX_TEXT_BYTES = 64 << 20  # of one book once unpacked; encoding takes about 58 bytes of memory for each of them
BLOCK = 1 << 20
ZSTD_BLOCK = 1 << 10  # packed bytes taken at a time; each can stand for 32 kB, and what they stand for is in memory
GZIP_BLOCK = 1 << 13  # the same; each can stand for 1 kB
MAX_STATE = 64 << 20  # bytes of a saved dataset's state.json
DAMAGED = (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError)  # what reading a damaged archive raises
SAVED = "state.json"  # of a folder that `datasets` saved
QUOTED = re.compile(r"\[([*?[])\]")  # how glob.escape writes a character that is meant as it is


@dataclass(frozen=True, slots=True)  # slots: there can be ten million
class InputFile:
    """path: local or URL. key: the path below the glob's fixed folder. sha256 of the file as it lies there."""

    path: str
    key: str
    num_bytes: int = 0
    sha256: str = ""


def find_files(pattern: str, manifest_key: str) -> list[InputFile]:
    """The files that `pattern` names, by name. ValueError with `manifest_key` where there are none."""
    is_pattern = glob.has_magic(QUOTED.sub("", pattern))
    if "://" in pattern:
        paths = _remote(pattern, is_pattern, manifest_key)
    elif not is_pattern:
        path = QUOTED.sub(r"\1", pattern)
        paths = _saved_files(path) if os.path.isdir(path) else [path] if os.path.isfile(path) else []
    else:
        # `**/**` names a file once for every way to it.
        paths = [path for path in set(glob.glob(pattern, recursive=True)) if os.path.isfile(path)]
    if not paths:
        what = "matches no file" if is_pattern else "no such file"
        raise ValueError(
            f"{manifest_key}: got {pattern}: {what}; wanted the path of input files, relative to the manifest"
        )
    base = posixpath.dirname(pattern)
    while glob.has_magic(QUOTED.sub("", base)):
        base = posixpath.dirname(base)
    base = base if "://" in pattern else QUOTED.sub(r"\1", base)
    paths.sort()
    return [InputFile(path, _below(path, base)) for path in paths]


def _remote(pattern: str, is_pattern: bool, manifest_key: str) -> list[str]:
    """The URLs of the files that the URL `pattern` names."""
    protocol = pattern.partition("://")[0]
    try:
        fs, inner = fsspec.core.url_to_fs(pattern)
        if not is_pattern and fs.isdir(inner):
            return _saved_files(pattern)
        found = retried(lambda: fs.glob(inner, detail=True))
        return [str(fs.unstrip_protocol(path)) for path, info in found.items() if info["type"] == "file"]
    except ImportError as error:
        package = "huggingface_hub" if protocol == "hf" else f"a package that reads {protocol}://"
        raise ValueError(f"{manifest_key}: got {pattern}: wanted {package} to be installed ({error})") from error
    except (ConnectionError, TimeoutError) as error:
        raise ValueError(
            f"{manifest_key}: got {pattern}: it cannot be listed ({str(error).strip()[:200]}); check the network, or "
            "copy the files to a disk and name them there"
        ) from error
    except Exception as error:
        if isinstance(error, ValueError) and protocol in fsspec.available_protocols():
            raise
        raise ValueError(f"{manifest_key}: {refusal(error, pattern, 'list and read')}") from error


def _saved_files(folder: str) -> list[str]:
    """The Arrow files of a folder that `datasets` saved; none where it is no such folder."""
    state = posixpath.join(folder, SAVED)
    try:
        with _open(state) as file:
            names = [of["filename"] for of in json.loads(file.read(MAX_STATE))["_data_files"]]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{state}: not what `datasets` writes ({error}); name the Arrow files themselves") from error
    if not all(isinstance(name, str) and name == posixpath.basename(name) != "" for name in names):
        raise ValueError(f"{state}: _data_files: wanted names of files beside it")
    return [posixpath.join(folder, name) for name in names]


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
        if path.endswith((".gz", ".tgz")):
            yield io.BufferedReader(_GzipMembers(raw), BLOCK)
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


class _GzipMembers(io.RawIOBase):
    """The bytes of all members of a .gz, to the last one before any damage, which gzip's own reader loses a block of.

    zlib.error or EOFError where it is damaged, or ends within a member.
    """

    def __init__(self, packed: BinaryIO) -> None:
        self._packed = packed
        self._member: Any = None  # the one that is not at its end
        self._input = b""
        self._output = memoryview(b"")
        self._damage: Exception | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        while not self._output:
            if self._damage is not None:
                raise self._damage
            self._input = self._input or self._packed.read(GZIP_BLOCK)
            if not self._input:
                if self._member is not None:
                    raise EOFError("the file is truncated: it ends within a member")
                return 0
            if self._member is None:
                self._input = self._input.lstrip(b"\0")  # members may be padded
                if not self._input:
                    continue
            self._output = memoryview(self._unpack())
        count = min(len(buffer), len(self._output))
        buffer[:count] = self._output[:count]
        self._output = self._output[count:]
        return count

    def _unpack(self) -> bytes:
        member = self._member or zlib.decompressobj(wbits=31)
        before = member.copy()
        try:
            output = member.decompress(self._input)
        except zlib.error as error:
            self._damage = error
            return _unpack_to_damage(before, self._input)
        self._member, self._input = (None, member.unused_data) if member.eof else (member, b"")
        return bytes(output)


def _unpack_to_damage(member: Any, packed: bytes) -> bytes:
    """What the bytes before the first wrong one stand for."""
    parts = []
    with contextlib.suppress(zlib.error):
        for at in range(len(packed)):
            parts.append(member.decompress(packed[at : at + 1]))
    return b"".join(parts)


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
    return open_url(path) if "://" in path else open(path, "rb")
