"""Units of work of pictures and videos: which files are read together, all of them named before any is read.

    photos/00000.tar, 00000.parquet        (00000.tar, 00000.parquet)          a tar and the metadata beside it
    photos/a.parquet, b.arrow              (a.parquet,) (b.arrow,)
    photos/cat.jpg, cat.txt, dog.png ...   (cat.jpg, cat.txt, dog.png, ...)    some hundred files at a time
    clips.csv naming v/1.mp4, v/2.mp4      (clips.csv,)                        its rows without a video
                                           (clips.csv, v/1.mp4, v/2.mp4)       the rows of some videos

A block of loose files ends where the hash of a name says so, not after so many: a new file changes one block.
"""

from __future__ import annotations

import hashlib
import math
import os
import posixpath
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache

import fsspec

from lwm_data.manifest_sources import Images, Videos
from lwm_data.sources.files import InputFile
from lwm_data.sources.record import Rejection
from lwm_data.sources.video_lists import LISTS, listed_video, read_list

PICTURES = frozenset({"jpg", "jpeg", "png", "webp", "avif", "gif", "bmp", "tif", "tiff"})
VIDEOS = frozenset({"mp4", "m4v", "webm", "mkv", "avi", "mov"})
COLUMNS = frozenset({"parquet", "arrow"})  # files of rows that hold pictures
SIDECARS = ("txt", "json")
PACKED = (".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")
NOT_RECORDS = ("dataset_info.json", "state.json", "dataset_dict.json")  # of `datasets`, about a whole folder
STATS = re.compile(r"\d+_stats\.json")  # of img2dataset, about a tar
LOOSE_PICTURES = 256  # records of a block, on average
LOOSE_VIDEOS = 16
HELD_FOLDERS = 64  # listings that are held; each has as many names as its folder


def group_files(source: Images | Videos, files: list[InputFile]) -> list[tuple[InputFile, ...]]:
    """The input of each unit. The first file says how it is read; all that is read is there.

    ValueError where a file is a packed tar.
    """
    folders = _Folders()
    units: list[tuple[InputFile, ...]] = []
    loose = []
    stems = {posixpath.splitext(file.path)[0] for file in files if suffix(file.path) == "tar"}
    for file in files:
        kind = suffix(file.path)
        if file.path.endswith(PACKED):
            raise ValueError(f"{file.path}: got a packed tar; wanted .tar; unpack it, pictures do not shrink")
        if kind == "tar":
            metadata = folders.beside(file, "parquet")
            units.append((file, metadata) if metadata is not None else (file,))
        elif kind == "parquet" and posixpath.splitext(file.path)[0] in stems:
            continue
        elif isinstance(source, Images) and kind in COLUMNS:
            units.append((file,))
        elif isinstance(source, Videos) and kind in LISTS:
            units += _list_units(file, folders)
        elif not is_about_a_folder(file.path):
            loose.append(file)
    media, average = (PICTURES, LOOSE_PICTURES) if isinstance(source, Images) else (VIDEOS, LOOSE_VIDEOS)
    groups = _loose_groups(loose, media, folders)
    units += [tuple(file for group in block for file in group) for block in blocks(groups, average)]
    return units


def suffix(name: str) -> str:
    """What follows the last dot of a file's name, in small letters."""
    return posixpath.splitext(name)[1][1:].lower()


def is_about_a_folder(path: str) -> bool:
    """Whether a file only tells of what stands beside it."""
    name = posixpath.basename(path)
    return name in NOT_RECORDS or STATS.fullmatch(name) is not None


def _loose_groups(
    files: Iterable[InputFile], media: frozenset[str], folders: _Folders
) -> Iterator[tuple[InputFile, ...]]:
    """The files of one stem together, media first, with the text and the fields beside them."""
    stems: dict[str, list[InputFile]] = {}
    for file in files:
        is_known = suffix(file.path) in media or suffix(file.path) in SIDECARS
        stems.setdefault(posixpath.splitext(file.path)[0] if is_known else file.path, []).append(file)
    for stem in sorted(stems):
        group = sorted(stems[stem], key=lambda file: file.path)
        pictures = [file for file in group if suffix(file.path) in media]
        if pictures:
            sidecars = (folders.beside(pictures[0], kind) for kind in SIDECARS)
            yield (*pictures, *(file for file in sidecars if file is not None))
        else:
            yield tuple(group)


def _list_units(file: InputFile, folders: _Folders) -> Iterator[tuple[InputFile, ...]]:
    """First the rows that name no video there is, then the videos' blocks.

    Rows are the same whether a missing video comes to be there or not, so the first unit's second key tells of them.
    """
    named: dict[str, InputFile] = {}
    for row in read_list(file):
        video = row if isinstance(row, Rejection) else listed_video(file, row)
        if isinstance(video, InputFile):
            named[video.path] = video
    in_order = [named[path] for path in sorted(named)]  # folder by folder
    there = [video for video in in_order if folders.holds(video.path)]
    if len(there) < len(in_order):
        missing = sorted(named.keys() - {video.path for video in there})
        keys = "\n".join(named[path].key for path in missing)
        digest = hashlib.sha256(keys.encode("utf-8", "backslashreplace")).hexdigest()[:16]
        yield file, InputFile(file.path, f"{file.key}, {len(missing)} videos missing ({digest})")
    else:
        yield (file,)
    # Each block reads the whole list, so blocks grow with it.
    for block in blocks(((video,) for video in there), max(LOOSE_VIDEOS, math.isqrt(len(there)))):
        yield (file, *(video for group in block for video in group))


def blocks(groups: Iterable[tuple[InputFile, ...]], average: int) -> Iterator[list[tuple[InputFile, ...]]]:
    block: list[tuple[InputFile, ...]] = []
    for group in groups:
        block.append(group)
        drawn = int.from_bytes(hashlib.sha256(group[0].key.encode()).digest()[:8], "big")
        if drawn % average == 0 or len(block) == 4 * average:
            yield block
            block = []
    if block:
        yield block


class _Folders:
    """Which files there are, by the listings of the folders last asked for."""

    def __init__(self) -> None:
        self._names = lru_cache(maxsize=HELD_FOLDERS)(_names)

    def holds(self, path: str) -> bool:
        folder, name = posixpath.split(path)
        return self._names(folder).get(name) == name

    def beside(self, file: InputFile, kind: str) -> InputFile | None:
        """The file that has the name of `file` and the ending `kind`, in small letters if there is such a one."""
        folder, name = posixpath.split(posixpath.splitext(file.path)[0])
        found = self._names(folder).get(f"{name}.{kind}")
        if found is None:
            return None
        ending = posixpath.splitext(found)[1]
        return InputFile(posixpath.join(folder, found), posixpath.splitext(file.key)[0] + ending)


def file_exists(path: str) -> bool:
    """Whether there is such a file: a plain one, or a link to one."""
    if "://" not in path:
        return os.path.isfile(path)
    fs, inner = fsspec.core.url_to_fs(path)
    return bool(fs.isfile(inner))


def with_small_ending(name: str) -> str:
    """A file's name or path with the letters after its last dot made small."""
    stem, ending = posixpath.splitext(name)
    return stem + ending.lower()


def _names(folder: str) -> dict[str, str]:
    """Of the files in `folder`, by themselves and, where that is no other's, by their name with a small ending."""
    names = sorted(_listed(folder))
    return {with_small_ending(name): name for name in names} | {name: name for name in names}


def _listed(folder: str) -> list[str]:
    if "://" not in folder:
        try:
            with os.scandir(folder or ".") as entries:
                return [entry.name for entry in entries if entry.is_file()]
        except (FileNotFoundError, NotADirectoryError):
            return []
    fs, inner = fsspec.core.url_to_fs(folder)
    entries = fs.ls(inner, detail=True) if fs.isdir(inner) else []
    return [posixpath.basename(entry["name"]) for entry in entries if entry["type"] == "file"]
