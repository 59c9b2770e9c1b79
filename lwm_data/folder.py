"""A folder that a build writes to and reads from: on a disk, or behind any fsspec URL.

                DiskFolder                               UrlFolder
    writing     the folder itself: each file written     a scratch folder, whose files are uploaded when the block
                to a temporary name, synced, renamed     ends; an object appears whole or not at all
    fetch       the file                                 a copy of it in this machine's scratch (scratch.py)
    read, ...   of small files                           one request each, tried again where errors pass

Names are those of files directly in the folder; `child` is a folder in it.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

import fsspec

from lwm_data.format.retry import refusal, retried
from lwm_data.scratch import fetched, remove_dead_writing, writing_folder
from lwm_data.url_file import open_url
from lwm_data.whole_file import remove_leftovers, sync_folder

FIRST_WAITS = (1.0,)  # of the first request: a wrong endpoint should be told at once
PROBE = ".lwm-probe"  # one name, so that a killed build leaves no second one
REQUESTS = 16  # at a time, of many small ones


@dataclass(frozen=True)
class DiskFolder:
    """A folder on a disk."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def child(self, name: str) -> DiskFolder:
        return DiskFolder(self.path / name)

    def check(self) -> None:
        """A disk is tried by working on it."""

    def prepare(self) -> None:
        """Make the folder, and remove the temporaries in it that nobody writes any more."""
        self.path.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.path)

    def names(self) -> set[str]:
        """Of all that is there, folders too; none where there is no folder."""
        with contextlib.suppress(FileNotFoundError):
            return set(os.listdir(self.path))
        return set()

    def sizes(self) -> dict[str, int]:
        """name -> bytes of the files that are there."""
        with contextlib.suppress(FileNotFoundError), os.scandir(self.path) as entries:
            return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
        return {}

    def read(self, name: str) -> bytes:
        """A small file. FileNotFoundError where there is none."""
        return (self.path / name).read_bytes()

    @contextlib.contextmanager
    def writing(self, before: Callable[[], None] = lambda: None) -> Iterator[Path]:
        """A folder on a disk; the files that are put there, each whole, stand in this one when the block has ended.

        before: called before each upload, also one that is tried again; its error ends the block. On a disk never.
        """
        yield self.path
        sync_folder(self.path)

    def remove(self, names: Iterable[str], before: Callable[[], None] = lambda: None) -> None:
        """Remove files; none need be there. before: as in `writing`."""
        for name in names:
            (self.path / name).unlink(missing_ok=True)
        sync_folder(self.path)

    def move(self, name: str, to: Folder) -> None:
        """The file `name` becomes one of the folder `to`, which is of the same kind."""
        assert isinstance(to, DiskFolder)
        os.replace(self.path / name, to.path / name)

    def fetch(self, name: str) -> Path:
        """The file on this machine's disk."""
        return self.path / name

    def open(self, name: str) -> BinaryIO:
        """The file, of which little will be read."""
        return open(self.path / name, "rb")


@dataclass(frozen=True)
class UrlFolder:
    """A folder of an object store, or of whatever fsspec writes to. url: without a slash at its end."""

    url: str

    def __str__(self) -> str:
        return self.url

    def child(self, name: str) -> UrlFolder:
        return UrlFolder(f"{self.url}/{name}")

    def check(self) -> None:
        """Write, list and remove a small object. ValueError with the remedy where that fails."""
        remove_dead_writing()
        try:
            fs, path = self._at(PROBE)
            retried(lambda: fs.pipe_file(path, b"may be deleted"), FIRST_WAITS)
            self.names()
            self._remove(PROBE)
        except Exception as error:
            raise refusal(error, self.url) from error

    def prepare(self) -> None:
        remove_dead_writing()

    def names(self) -> set[str]:
        return {PurePosixPath(entry["name"]).name for entry in self._entries()} - {PROBE}

    def sizes(self) -> dict[str, int]:
        return {PurePosixPath(of["name"]).name: int(of["size"]) for of in self._entries() if of["type"] == "file"}

    def read(self, name: str) -> bytes:
        fs, path = self._at(name)
        return bytes(retried(lambda: fs.cat_file(path)))

    @contextlib.contextmanager
    def writing(self, before: Callable[[], None] = lambda: None) -> Iterator[Path]:
        with writing_folder() as folder:
            yield folder
            for file in sorted(folder.iterdir()):
                self._upload(file, before)

    def create(self, name: str, data: bytes) -> bool:
        """Write a small object unless there is one, as one step where the store can do that; whether it was written."""
        fs, path = self._at(name)
        try:
            retried(lambda: fs.pipe_file(path, data, mode="create"))
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno != errno.ENOSYS:  # an object store that knows no conditional writes
                raise
            if name in self.sizes():
                return False
            self.write(name, data)
        return True

    def write(self, name: str, data: bytes) -> None:
        """Write a small object."""
        fs, path = self._at(name)
        retried(lambda: fs.pipe_file(path, data))

    def remove(self, names: Iterable[str], before: Callable[[], None] = lambda: None) -> None:
        with ThreadPoolExecutor(REQUESTS) as threads:
            list(threads.map(lambda name: self._remove(name, before), names))

    def move(self, name: str, to: Folder) -> None:
        assert isinstance(to, UrlFolder)
        fs, path = self._at(name)
        _, target = to._at(name)
        retried(lambda: fs.cp_file(path, target))
        self._remove(name)

    def fetch(self, name: str) -> Path:
        fs, path = self._at(name)
        fs.invalidate_cache(path)
        info = retried(lambda: fs.info(path))

        def download(to: Path) -> None:
            retried(lambda: fs.get_file(path, str(to)))

        return fetched(f"{self.url}/{name} {sorted(map(str, info.items()))}", name, int(info["size"]), download)

    def open(self, name: str) -> BinaryIO:
        return open_url(f"{self.url}/{name}", io.DEFAULT_BUFFER_SIZE * 8)

    def _at(self, name: str) -> tuple[Any, str]:
        """The file system, and the object's path in it."""
        fs, root = fsspec.core.url_to_fs(self.url)
        return fs, f"{root.rstrip('/')}/{name}"

    def _entries(self) -> list[dict[str, Any]]:
        fs, root = fsspec.core.url_to_fs(self.url)

        def entries() -> list[dict[str, Any]]:
            fs.invalidate_cache()  # other processes write here, too
            return cast(list[dict[str, Any]], fs.ls(root, detail=True))

        try:
            listed = retried(entries)
        except FileNotFoundError:
            return []
        return [entry for entry in listed if entry["name"].strip("/") != root.strip("/")]  # a marker of the folder

    def _upload(self, file: Path, before: Callable[[], None]) -> None:
        fs, path = self._at(file.name)

        def upload() -> None:
            before()
            fs.put_file(str(file), path)

        retried(upload)

    def _remove(self, name: str, before: Callable[[], None] = lambda: None) -> None:
        fs, path = self._at(name)

        def remove() -> None:
            before()
            fs.rm_file(path)

        with contextlib.suppress(FileNotFoundError):
            retried(remove)


Folder = DiskFolder | UrlFolder


def open_folder(path_or_url: str) -> Folder:
    """The folder at a path or any fsspec URL. ValueError where a URL names no folder in its bucket."""
    if path_or_url.startswith("file://"):
        path_or_url = path_or_url.removeprefix("file://")
    if "://" not in path_or_url:
        return DiskFolder(Path(path_or_url))
    url = path_or_url.rstrip("/")
    if "/" not in url.partition("://")[2] and not url.startswith("memory://"):
        raise ValueError(f"{path_or_url}: wanted a folder in the bucket, such as {url}/demo")
    return UrlFolder(url)


def folder_beside(folder: Folder, name: str) -> Folder:
    """The folder `name` beside another."""
    if isinstance(folder, DiskFolder):
        return DiskFolder(folder.path.parent / name)
    return UrlFolder(f"{folder.url.rpartition('/')[0]}/{name}")
