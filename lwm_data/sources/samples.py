"""Records of tars and of loose files: what has one name but for the ending belongs together.

00000.tar      000000007.jpg  000000007.txt  000000007.json | 000000008.jpg ...     one after the other
               |------------- Sample 000000007 -----------|
photos/        cat.jpg  cat.txt  cat.json                                          in one folder
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from lwm_data.sources.fields import MAX_JSON, Fields, sidecar_fields
from lwm_data.sources.files import InputFile, open_unpacked
from lwm_data.sources.key_index import KeyedRows, SeenKeys
from lwm_data.sources.media_units import SIDECARS, suffix, with_small_ending
from lwm_data.sources.record import UNREAD, Rejection
from lwm_data.sources.tar_members import DamagedTar, Member, read_members

MAX_TEXT = 64 << 10  # bytes of a caption's file


@dataclass(frozen=True)
class Kind:
    """What a source takes: files with these endings, called `name`, of at most max_bytes each.

    is_streamed: a local file is decoded from its path, and may be of any size.
    """

    name: str
    suffixes: frozenset[str]
    max_bytes: int
    is_streamed: bool = False


@dataclass(frozen=True)
class Sample:
    """key: unique in the source. name: its part within the tar or folder. data: the media's bytes or local path."""

    key: str
    name: str
    data: bytes | str
    fields: Fields


@dataclass
class Group:
    """The members of a tar with one name, so far. parts: their data by their ending."""

    name: str
    parts: dict[str, bytes] = field(default_factory=dict)
    problem: tuple[str, str] | None = None

    def add(self, ending: str, member: Member, kind: Kind) -> None:
        problem = member.problem
        if problem is not None and ending == "txt" and ending not in kind.suffixes and problem[0] == "too large":
            problem = ("caption too long", problem[1])
        if member.data is not None:
            is_second = ending in kind.suffixes and not kind.suffixes.isdisjoint(self.parts)
            if ending in self.parts or is_second:
                problem = ("duplicate key", f"a second {kind.name if is_second else ending}: {member.name}")
            else:
                self.parts[ending] = member.data
        self.problem = self.problem or problem


def tar_samples(files: tuple[InputFile, ...], kind: Kind) -> Iterator[Sample | Rejection]:
    """The records of a tar, and of the Parquet beside it what their JSON files lack."""
    tar, *beside = files
    rows = KeyedRows(beside[0]) if beside else None
    for group in tar_groups(tar, kind, {"txt": MAX_TEXT, "json": MAX_JSON}):
        yield group if isinstance(group, Rejection) else _tar_sample(tar, group, kind, rows)
    if rows is not None and rows.rejection is not None:
        yield rows.rejection


def tar_groups(tar: InputFile, kind: Kind, sidecars: Mapping[str, int]) -> Iterator[Group | Rejection]:
    """The members of a tar by their names, each name once. sidecars: endings besides `kind`'s, and their most bytes.

    A member without a name, or without an ending, is none of a record, as in WebDataset; so are folders. Among texts
    one without an ending is told of, unless its name begins with a dot. A group of
    which the tar's cut may have taken something is left out, since its fields may be in what is lost.
    """
    seen = SeenKeys()
    group: Group | None = None

    def max_bytes(name: str) -> int | None:
        ending = _split(name)[1]
        return kind.max_bytes if ending in kind.suffixes else sidecars.get(ending)

    def checked(group: Group) -> Group | Rejection:
        key = f"{tar.key}/{group.name}"
        if not seen.add(group.name):
            return Rejection(key, "duplicate key", "an earlier record of this tar has it; its files must be together")
        return group if group.problem is None else Rejection(key, *group.problem)

    with open_unpacked(tar.path) as raw:
        try:
            for member in read_members(raw, max_bytes):
                name, ending = _split(member.name)
                if not ending and member.problem is None:
                    if kind.name == "text" and name and not posixpath.basename(name).startswith("."):
                        detail = "a name without an ending; wanted a .txt or .json"
                        yield Rejection(f"{tar.key}/{name}", "no text", detail)
                    continue
                if group is None or group.name != name:
                    if group is not None:
                        yield checked(group)
                    group = Group(name)
                group.add(ending, member, kind)
        except DamagedTar as error:
            if group is not None and (error.name is None or _split(error.name)[0] != group.name):
                yield checked(group)
            yield Rejection(tar.key, UNREAD, f"{error.detail}; the rest is not read")
        else:
            if group is not None:
                yield checked(group)


def _split(name: str) -> tuple[str, str]:
    """A member's name up to the first dot of its last part; what follows, in small letters, or "" where it has none."""
    folder, last = posixpath.split(name)
    stem, dot, ending = last.partition(".")
    return (posixpath.join(folder, stem), ending.lower()) if stem and dot else (name, "")


def _tar_sample(tar: InputFile, group: Group, kind: Kind, rows: KeyedRows | None) -> Sample | Rejection:
    key = f"{tar.key}/{group.name}"
    data = next((group.parts[ending] for ending in group.parts if ending in kind.suffixes), b"")
    if not data:
        return Rejection(key, f"no {kind.name}", f"no bytes of one; wanted {', '.join(sorted(kind.suffixes))}")
    name = posixpath.basename(group.name)
    more = (lambda field: rows.value(name, field)) if rows is not None else (lambda field: None)
    fields = sidecar_fields(key, group.parts.get("txt"), group.parts.get("json"), more)
    return fields if isinstance(fields, Rejection) else Sample(key, group.name, data, fields)


def loose_samples(files: tuple[InputFile, ...], kind: Kind) -> Iterator[Sample | Rejection]:
    """The records of files that lie in folders; pictures with one name but for the ending share what lies beside."""
    sidecars = {with_small_ending(file.path): file for file in files if suffix(file.path) in SIDECARS}
    used = set()
    for file in files:
        if suffix(file.path) not in kind.suffixes:
            continue
        stem = posixpath.splitext(file.path)[0]
        parts: dict[str, bytes] = {}
        problem = None
        for ending, limit in (("txt", MAX_TEXT), ("json", MAX_JSON)):
            beside = sidecars.get(f"{stem}.{ending}")
            if beside is not None:
                used.add(beside.path)
                data = _read(beside.path, limit)
                if data is None:
                    reason = "caption too long" if ending == "txt" else "too large"
                    problem = problem or Rejection(file.key, reason, f"{beside.key}: more than {limit:,} bytes")
                else:
                    parts[ending] = data
        fields = sidecar_fields(file.key, parts.get("txt"), parts.get("json"))
        if problem is not None:
            yield problem
            continue
        if isinstance(fields, Rejection):
            yield fields
            continue
        media = load_media(file, kind)
        yield media if isinstance(media, Rejection) else Sample(file.key, file.key, media, fields)
    for file in files:
        stem = posixpath.splitext(file.path)[0]
        if suffix(file.path) not in kind.suffixes and file.path not in used and stem not in used:
            used.add(stem)  # a text and its fields are one record
            yield Rejection(file.key, f"no {kind.name}", f"wanted {', '.join(sorted(kind.suffixes))} of this name")


def load_media(file: InputFile, kind: Kind) -> bytes | str | Rejection:
    """The path of a local file, the bytes of a remote one."""
    if "://" not in file.path and (kind.is_streamed or os.path.getsize(file.path) <= kind.max_bytes):
        return file.path
    data = _read(file.path, kind.max_bytes) if "://" in file.path else None
    return data if data is not None else Rejection(file.key, "too large", f"more than {kind.max_bytes:,} bytes")


def _read(path: str, limit: int) -> bytes | None:
    """The file's bytes; None where they are more than `limit`."""
    with open_unpacked(path) as file:
        data = file.read(limit + 1)
    return None if len(data) > limit else data
