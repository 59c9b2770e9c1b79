"""A dataset's folder, on a disk or behind a URL, while a build works on it.

    out/.work/lock               held by the one build that may write here (build_lock.py)
    out/.work/fingerprint        of the build that the records belong to; empty while those of another are removed
    out/.work/shard-000000.json  a record: this shard is finished; written after the shard stands
    out/.work/rejected.jsonl     of a plan that is not begun; stays where the build ended there, its message names it
    out/shard-000000.tar ...     finished shards
    out/index.json               not there until everything else is

A build first plans, and until the plan stands the dataset of an earlier build is not touched. One of another
fingerprint then removes the index, then shards and records, and only then writes its own fingerprint: at no moment
can old and new be mixed up. `.work` goes when the index stands.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from pydantic import BaseModel, ConfigDict

from lwm_data.build_lock import LOCK, DiskLock, UrlLock
from lwm_data.folder import REQUESTS, DiskFolder, Folder
from lwm_data.format.dataset import INDEX, DatasetInfo, ShardInfo, SourceCounts, open_dataset, write_index
from lwm_data.whole_file import sync_folder, whole_file

WORK = ".work"
FINGERPRINT = "fingerprint"
REJECTED = "rejected.jsonl"
SHARD_FILE = re.compile(r"shard-([0-9]{6,})\.(?:tar|examples\.parquet)")  # all that a build may remove
RECORD_FILE = re.compile(r"shard-[0-9]{6,}\.json")
TOKENIZER_FILE = re.compile(r"[^.].*_tokenizer\..*")


class ShardRecord(BaseModel):
    """Of a finished shard: its line of the index, the parquet's size, and what its rows hold."""

    model_config = ConfigDict(frozen=True)
    shard: ShardInfo
    examples_bytes: int
    num_tokens: int
    num_trained: int
    sources: dict[str, SourceCounts]


def examples_name(shard: str) -> str:
    """shard-000000.tar -> shard-000000.examples.parquet"""
    return shard.removesuffix(".tar") + ".examples.parquet"


def refuse_foreign(out: Folder | Path) -> None:
    """ValueError where `out` holds something that no build of ours put there."""
    folder = DiskFolder(out) if isinstance(out, Path) else out
    if isinstance(folder, DiskFolder) and folder.path.exists() and not folder.path.is_dir():
        raise ValueError(f"out: got {out}: a file; wanted a folder, new, empty or of an earlier build")
    names = folder.names()
    # .work alone: killed before it had its lock.
    if not names - {WORK} or (INDEX in names and _is_ours(folder)):
        return
    # On a disk the lock outlives its build, behind a URL it may not.
    if WORK not in names or not {LOCK, FINGERPRINT} & folder.child(WORK).sizes().keys():
        raise ValueError(
            f"out: got {out}: not empty and no dataset; wanted a folder, new, empty or of an earlier build; name "
            "another, or empty this one if nothing in it is needed"
        )


def _is_ours(folder: Folder) -> bool:
    """Whether the index there is that of a build, of whatever version; others write an index.json, too."""
    try:
        raw = json.loads(folder.read(INDEX))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(raw, dict) and "format_version" in raw and "build_fingerprint" in raw


class WorkFolder:
    """The folder `out`, locked for one build; a context manager. ValueError where another build holds it.

    lock: `self.lock` of the build, where a worker of it makes another object of this class.
    """

    def __init__(self, out: Folder | Path, lock: str = "") -> None:
        self.folder: Folder = DiskFolder(out) if isinstance(out, Path) else out
        self._work = self.folder.child(WORK)
        self._lock = DiskLock(self._work.path) if isinstance(self._work, DiskFolder) else UrlLock(self._work, lock)
        self._there: dict[str, int] = {}  # name -> bytes of what stood in `out` when this build began
        self._recorded: set[str] = set()  # and of the records

    @property
    def out(self) -> Path:
        """The folder's path, where it is on a disk."""
        assert isinstance(self.folder, DiskFolder), f"{self.folder} is not on a disk"
        return self.folder.path

    @property
    def lock(self) -> str:
        """By which its workers know whether this build still holds the folder."""
        return self._lock.key

    def __enter__(self) -> WorkFolder:
        refuse_foreign(self.folder)
        self._lock.acquire()
        self._remove_temporaries()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, traceback: TracebackType | None) -> None:
        clear = False
        try:
            clear = INDEX in self.folder.names() and (kind is None or REJECTED not in self._work.names())
        finally:
            self._lock.release(clear)

    def writing(self) -> contextlib.AbstractContextManager[None]:
        """While the block lasts, no other build begins here, even if this one is killed."""
        return self._lock.writing()

    def adding(self) -> contextlib.AbstractContextManager[Path]:
        """A folder for files that stand in `out` when the block has ended; ValueError where the lock is lost."""
        return self.folder.writing(self._lock.check)

    @contextlib.contextmanager
    def planned_rejected(self) -> Iterator[BinaryIO]:
        """Where the plan writes rejected.jsonl; `begin` moves it beside the index."""
        with self._work.writing(self._lock.check) as folder, whole_file(folder / REJECTED) as file:
            yield file

    @property
    def planned_rejected_name(self) -> str:
        """Where that file is, for a person."""
        return f"{self._work}/{REJECTED}"

    def finished(self, fingerprint: str) -> DatasetInfo | None:
        """The index, where the dataset is whole and of this fingerprint.

        Small files by their hashes, shards by their sizes: to read them all is what `check` is for.
        """
        try:
            dataset = open_dataset(str(self.folder))
            info = dataset.info
            if info.build_fingerprint != fingerprint:
                return None
            sizes = self.folder.sizes()
            whole = {REJECTED, "README.md"} <= sizes.keys() and all(
                sizes.get(shard.name) == shard.num_bytes for shard in info.shards
            )
            if not whole or dataset.text_tokenizer.fingerprint != info.tokenizer_fingerprint:
                return None
            with ThreadPoolExecutor(REQUESTS) as threads:
                tables = threads.map(lambda shard: self._sha256(examples_name(shard.name)), info.shards)
                whole = all(got == shard.examples_sha256 for got, shard in zip(tables, info.shards, strict=True))
            return info if whole else None
        except (ValueError, FileNotFoundError):
            return None

    def begin(self, fingerprint: str) -> None:
        """Make the folder ready for the build `fingerprint`: keep what is its own, remove what is not.

        The plan must stand: from here on there is no dataset until `finish`.
        """
        check = self._lock.check
        self.folder.remove([INDEX], check)
        work = self._work.sizes()
        if FINGERPRINT not in work or self._work.read(FINGERPRINT) != fingerprint.encode():
            self._write(FINGERPRINT, b"")
            self._keep_shards(0)
            self.folder.remove((name for name in self.folder.sizes() if TOKENIZER_FILE.fullmatch(name)), check)
            self._work.remove((name for name in work if RECORD_FILE.fullmatch(name)), check)
            self._write(FINGERPRINT, fingerprint.encode())
        check()
        self._work.move(REJECTED, self.folder)
        self._there = self.folder.sizes()
        self._recorded = set(self._work.sizes())

    def record(self, shard: str) -> ShardRecord | None:
        """The record of a shard that was finished, and still there, when this build began."""
        sizes = self._there.get(shard), self._there.get(examples_name(shard))
        if None in sizes or _record_name(shard) not in self._recorded:
            return None
        record = ShardRecord.model_validate_json(self._work.read(_record_name(shard)))
        return record if sizes == (record.shard.num_bytes, record.examples_bytes) else None

    def write_record(self, record: ShardRecord) -> None:
        """Note that a shard is finished; its files must stand."""
        if isinstance(self.folder, DiskFolder):
            sync_folder(self.folder.path)
        self._write(_record_name(record.shard.name), record.model_dump_json().encode())

    def finish(self, info: DatasetInfo) -> None:
        """Remove what does not belong to the dataset and write the index: from here on it is one."""
        self._keep_shards(len(info.shards))
        self._remove_temporaries()  # of workers that were killed, while others did their work again
        with self.adding() as folder:
            write_index(folder, info)

    def _write(self, name: str, data: bytes) -> None:
        with self._work.writing(self._lock.check) as folder, whole_file(folder / name) as file:
            file.write(data)

    def _remove_temporaries(self) -> None:
        if isinstance(self.folder, DiskFolder):
            for folder in (self.folder.path, self.folder.path / WORK):
                for path in folder.glob(".*.tmp"):
                    path.unlink(missing_ok=True)

    def _sha256(self, name: str) -> str:
        return hashlib.sha256(self.folder.read(name)).hexdigest()

    def _keep_shards(self, num_shards: int) -> None:
        matches = (SHARD_FILE.fullmatch(name) for name in self.folder.sizes())
        unwanted = [match[0] for match in matches if match is not None and int(match[1]) >= num_shards]
        self.folder.remove(unwanted, self._lock.check)


def _record_name(shard: str) -> str:
    return shard.removesuffix(".tar") + ".json"
