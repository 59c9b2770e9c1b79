"""A dataset's folder while a build works on it.

    out/.work/lock               held by the one build that may write here
    out/.work/writers            shared by all who write a shard: a worker outlives a killed build for a moment
    out/.work/fingerprint        of the build that the records belong to
    out/.work/shard-000000.json  a record: this shard is finished; written after the shard is on disk
    out/.work/rejected.jsonl     of a plan that is not begun; stays where the build ended there, its message names it
    out/shard-000000.tar ...     finished shards
    out/index.json               not there until everything else is

A build first plans, and until the plan stands the dataset of an earlier build is not touched. One of another
fingerprint then removes the index, then shards and records, and only then writes its own fingerprint: at no moment
can old and new be mixed up. `.work` goes when the index stands.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from pydantic import BaseModel, ConfigDict

from lwm_data.engine import sync_folder, whole_file
from lwm_data.format.dataset import INDEX, DatasetInfo, ShardInfo, SourceCounts, open_dataset, write_index

WORK = ".work"
SHARD_FILE = re.compile(r"shard-([0-9]{6,})\.(?:tar|examples\.parquet)")  # all that a build may remove


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


def refuse_foreign(out: Path) -> None:
    """ValueError where `out` holds something that no build of ours put there."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"out: got {out}: a file; wanted a folder, new, empty or of an earlier build")
    if not out.is_dir() or (out / WORK / "lock").is_file() or _is_ours(out / INDEX):
        return
    if any(path.name != WORK for path in out.iterdir()):  # .work alone: killed before it had its lock
        raise ValueError(
            f"out: got {out}: not empty and no dataset; wanted a folder, new, empty or of an earlier build; name "
            "another, or empty this one if nothing in it is needed"
        )


def _is_ours(index: Path) -> bool:
    """Whether the file is the index of a build, of whatever version; others write an index.json, too."""
    try:
        raw = json.loads(index.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(raw, dict) and "format_version" in raw and "build_fingerprint" in raw


class WorkFolder:
    """The folder `out`, locked for one build; a context manager. ValueError where another build holds it."""

    def __init__(self, out: Path) -> None:
        self.out, self.work = out, out / WORK

    def __enter__(self) -> WorkFolder:
        refuse_foreign(self.out)
        while True:
            self.work.mkdir(parents=True, exist_ok=True)
            try:
                self._lock = os.open(self.work / "lock", os.O_RDWR | os.O_CREAT, 0o666)
            except FileNotFoundError:  # the build before us has just removed .work
                continue
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(self._lock).st_ino == os.stat(self.work / "lock").st_ino:
                    break
            except BlockingIOError:
                os.close(self._lock)
                raise ValueError(
                    f"out: got {self.out}: another build is writing there; wait for it or stop it"
                ) from None
            except FileNotFoundError:
                pass
            os.close(self._lock)
        with open(self.work / "writers", "ab") as writers:
            fcntl.flock(writers, fcntl.LOCK_EX)  # workers of a killed build end by themselves; wait for that
        self._remove_temporaries()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, traceback: TracebackType | None) -> None:
        if (self.out / INDEX).is_file() and (kind is None or not self.planned_rejected.is_file()):
            shutil.rmtree(self.work)
        os.close(self._lock)

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """While the block lasts, no other build begins here, even if this one is killed."""
        with open(self.work / "writers", "ab") as writers:
            fcntl.flock(writers, fcntl.LOCK_SH)
            yield

    @property
    def planned_rejected(self) -> Path:
        """Where the plan writes rejected.jsonl; `begin` moves it beside the index."""
        return self.work / "rejected.jsonl"

    def finished(self, fingerprint: str) -> DatasetInfo | None:
        """The index, where the dataset is whole and of this fingerprint.

        Small files by their hashes, shards by their sizes: to read them all is what `check` is for.
        """
        try:
            dataset = open_dataset(self.out)
            info = dataset.info
            if info.build_fingerprint != fingerprint:
                return None
            whole = all(
                (self.out / shard.name).stat().st_size == shard.num_bytes
                and _sha256(self.out / examples_name(shard.name)) == shard.examples_sha256
                for shard in info.shards
            )
            whole = whole and all((self.out / name).is_file() for name in ("rejected.jsonl", "README.md"))
            return info if whole and dataset.text_tokenizer.fingerprint == info.tokenizer_fingerprint else None
        except (ValueError, FileNotFoundError):
            return None

    def begin(self, fingerprint: str) -> None:
        """Make the folder ready for the build `fingerprint`: keep what is its own, remove what is not.

        The plan must stand: from here on there is no dataset until `finish`.
        """
        (self.out / INDEX).unlink(missing_ok=True)
        sync_folder(self.out)
        marker = self.work / "fingerprint"
        if not marker.is_file() or marker.read_text() != fingerprint:
            marker.unlink(missing_ok=True)
            self._keep_shards(0)
            for path in [*self.work.glob("shard-*.json"), *self.out.glob("*_tokenizer.*")]:
                path.unlink()
            sync_folder(self.out)
            with whole_file(marker) as file:
                file.write(fingerprint.encode())
        os.replace(self.planned_rejected, self.out / "rejected.jsonl")

    def record(self, shard: str) -> ShardRecord | None:
        """The record of a shard that is finished and still there."""
        try:
            record = ShardRecord.model_validate_json(self._record_path(shard).read_bytes())
            whole = (self.out / shard).stat().st_size == record.shard.num_bytes and (
                self.out / examples_name(shard)
            ).stat().st_size == record.examples_bytes
        except FileNotFoundError:
            return None
        return record if whole else None

    def write_record(self, record: ShardRecord) -> None:
        """Note that a shard is finished; its files must be on disk."""
        sync_folder(self.out)
        with whole_file(self._record_path(record.shard.name)) as file:
            file.write(record.model_dump_json().encode())

    def finish(self, info: DatasetInfo) -> None:
        """Remove what does not belong to the dataset and write the index: from here on it is one."""
        self._keep_shards(len(info.shards))
        sync_folder(self.out)
        write_index(self.out, info)
        sync_folder(self.out)

    def _remove_temporaries(self) -> None:
        for folder in (self.out, self.work):
            for path in folder.glob(".*.tmp"):
                path.unlink(missing_ok=True)

    def _record_path(self, shard: str) -> Path:
        return self.work / (shard.removesuffix(".tar") + ".json")

    def _keep_shards(self, num_shards: int) -> None:
        for path in self.out.glob("shard-*"):
            match = SHARD_FILE.fullmatch(path.name)
            if match is not None and int(match[1]) >= num_shards:
                path.unlink()


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
