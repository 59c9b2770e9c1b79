"""The members of a tar, one after the other: nothing is unpacked to disk, and no size is believed before it is checked.

    [header 512][data, padded to 512] [header][data] ... [512 zeros][512 zeros]
        |
        name, type, size; a long name comes in a member of its own before it (GNU `L`, pax `x`)

The standard library's reader keeps every member that it has passed, and takes as much memory for a long name as the
archive asks for. This one keeps one member, and bounds both. A packed tar (.tar.gz, .tar.zst) is read as a stream.
"""

from __future__ import annotations

import os
import posixpath
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

from lwm_data.sources.files import DAMAGED

BLOCK = 512
MAX_NAME = 1024  # characters
MAX_NAME_HEADER = 64 << 10  # bytes of a GNU long name or of pax records
MAX_DIGITS = 20  # of a size in a pax header: more than any file has
UNKNOWN = 1 << 62  # of a stream: its bytes
MAX_PADDING = 1 << 20  # bytes after the end of the archive that are looked at
ZEROS = bytes(BLOCK)
WITHOUT_DATA = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)


@dataclass(frozen=True)
class Member:
    """name: without `./`. data: None where it was not asked for. problem: (reason, detail) where it is not taken."""

    name: str
    data: bytes | None
    problem: tuple[str, str] | None = None


class DamagedTar(Exception):
    """Nothing after here can be read. name: of the member that is cut off, where it is known."""

    def __init__(self, detail: str, name: str | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        self.name = name


class _Stream:
    """Packed bytes as they come, of which only what lies ahead can be asked for."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._at = 0

    def seek(self, at: int) -> None:
        while self._at < at and self.read(min(at - self._at, MAX_PADDING)):
            pass

    def read(self, size: int) -> bytes:
        try:
            data = self._raw.read(size)
        except DAMAGED as error:
            raise DamagedTar(f"cannot be unpacked: {error}") from None
        self._at += len(data)
        return data


_Bytes = BinaryIO | _Stream


def read_members(raw: BinaryIO, max_bytes: Callable[[str], int | None]) -> Iterator[Member]:
    """The members of `raw` but its folders. DamagedTar where it is cut off or no tar, after whole members.

    max_bytes: of the member of a name; None: its data is not wanted.
    """
    total = raw.seek(0, os.SEEK_END) if raw.seekable() else UNKNOWN
    yield from _members(raw if raw.seekable() else _Stream(raw), total, max_bytes)


def _members(raw: _Bytes, total: int, max_bytes: Callable[[str], int | None]) -> Iterator[Member]:
    at = 0
    long_name: str | None = None
    pax: dict[str, str] = {}
    while True:
        found = _header(raw, at, total)
        if found is None:
            return
        info, block = found
        name = pax.get("path") or long_name or info.name
        digits = pax.get("size", "")
        if len(digits) > MAX_DIGITS:
            raise DamagedTar(f"a pax header with a size of {len(digits):,} digits")
        size = int(digits) if digits.isdecimal() else info.size
        kind = info.type
        at += BLOCK
        if kind == tarfile.GNUTYPE_SPARSE:
            at = _skip_sparse_map(raw, at, total, block[482])
        if kind in WITHOUT_DATA:
            size = 0
        if size < 0 or at + size > total:
            raise DamagedTar(f"cut within {name[:MAX_NAME]}: {total - at:,} of {size:,} bytes", _normal(name))
        is_name = kind in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
        if is_name:
            if size > MAX_NAME_HEADER:
                raise DamagedTar(f"a name of {size:,} bytes; wanted {MAX_NAME_HEADER:,} or fewer")
            data = _read(raw, at, size)
            if kind == tarfile.GNUTYPE_LONGNAME:
                long_name = data.split(b"\0", 1)[0].decode("utf-8", "backslashreplace")
            else:
                pax = _pax(data)
        elif kind not in (tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE):
            if kind != tarfile.DIRTYPE:
                is_sparse = any(key.startswith("GNU.sparse") for key in pax)
                yield _member(raw, at, size, name, info.isreg() and not info.issparse() and not is_sparse, max_bytes)
            long_name, pax = None, {}
        at += -(-size // BLOCK) * BLOCK


def _header(raw: _Bytes, at: int, total: int) -> tuple[tarfile.TarInfo, bytes] | None:
    """The header at `at` and its block; None at the end of the archive."""
    if at >= total:
        raise DamagedTar("it ends without the blocks that end a tar; what follows may be cut off")
    block = _read(raw, at, min(BLOCK, total - at))
    if block == ZEROS:
        raw.seek(at + BLOCK)
        if raw.read(MAX_PADDING).strip(b"\0"):
            raise DamagedTar("more follows the end of the archive, as where two were joined; it is not read")
        return None
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "backslashreplace"), block
    except tarfile.HeaderError as error:
        raise DamagedTar(f"no header of a member at byte {at:,}: {error}") from None


def _skip_sparse_map(raw: _Bytes, at: int, total: int, more: int) -> int:
    """Where the data begins of a sparse file whose header ends at `at`: its map may go on in blocks of its own."""
    while more:
        if at + BLOCK > total:
            raise DamagedTar("cut within the map of a sparse file")
        more = _read(raw, at, BLOCK)[504]
        at += BLOCK
    return at


def _pax(data: bytes) -> dict[str, str]:
    """The records `length key=value\\n` of a pax header."""
    records = {}
    while data:
        digits, space, _ = data[:20].partition(b" ")
        length = int(digits) if digits.isdigit() else 0
        record = data[:length]
        key, equals, value = record[len(digits) + 1 : -1].partition(b"=")
        if not (space and equals and len(record) == length and record.endswith(b"\n")):
            raise DamagedTar("a pax header that is none")
        records[key.decode("utf-8", "backslashreplace")] = value.decode("utf-8", "backslashreplace")
        data = data[length:]
    return records


def _member(
    raw: _Bytes, at: int, size: int, name: str, is_plain: bool, max_bytes: Callable[[str], int | None]
) -> Member:
    if len(name) > MAX_NAME:
        return Member(name[:MAX_NAME], None, ("unsafe name", f"{len(name):,} characters"))
    if name.startswith("/") or "\0" in name or ".." in name.split("/"):
        return Member(name, None, ("unsafe name", "wanted a name within the archive"))
    name = _normal(name)
    if not is_plain:
        return Member(name, None, ("not a plain file", f"{name} is a link, a device or a sparse file"))
    limit = max_bytes(name)
    if limit is None:
        return Member(name, None)
    if size > limit:
        return Member(name, None, ("too large", f"{name}: {size:,} bytes; wanted {limit:,} or fewer"))
    return Member(name, _read(raw, at, size, name))


def _normal(name: str) -> str:
    return posixpath.normpath(name)


def _read(raw: _Bytes, at: int, size: int, name: str | None = None) -> bytes:
    raw.seek(at)
    data = raw.read(size)
    if len(data) != size:
        raise DamagedTar(f"{len(data):,} of {size:,} bytes at byte {at:,}; it was cut, or became shorter", name)
    return data
