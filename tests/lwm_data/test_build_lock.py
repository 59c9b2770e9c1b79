"""Whoever lost a folder behind a URL to another build changes nothing in it any more, and the living are not robbed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest

from lwm_data import build_lock
from lwm_data.build_lock import UrlLock
from lwm_data.folder import DiskFolder, UrlFolder
from lwm_data.format.dataset import DatasetInfo
from lwm_data.format.example import text_runs
from lwm_data.format.vocab import TextTokenizer
from lwm_data.shard_rows import RowFormat, ShardRows, StoreRef, write_shard_rows
from lwm_data.sources.record import Record
from lwm_data.token_store import write_store
from lwm_data.work_folder import WorkFolder

URL = "memory://lock/out"
LOST = "another build took over"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, seconds in (("BEAT", 0.1), ("PATIENCE", 0.5), ("SETTLE", 0.1), ("LOOK_AGAIN", 0.0)):
        monkeypatch.setattr(build_lock, name, seconds, raising=False)
    yield
    fsspec.filesystem("memory").store.clear()


def _objects() -> dict[str, bytes]:
    memory = fsspec.filesystem("memory")
    return {name: memory.cat_file(name) for name in memory.find("/lock/out")}


def _take_over() -> dict[str, bytes]:
    """Another build's lock, record and shards stand in the folder, and nobody has told."""
    folder = UrlFolder(URL)
    other = {"id": "other", "host": "another machine", "process": 1, "beat": 3}
    folder.child(".work").write("lock", json.dumps(other).encode())
    folder.child(".work").write("shard-000000.json", b"its record")
    for i in range(3):
        folder.write(f"shard-{i:06d}.tar", b"its rows")
    return _objects()


@pytest.fixture
def asleep(monkeypatch: pytest.MonkeyPatch) -> WorkFolder:
    """A build that holds the folder and whose heart does not beat."""
    monkeypatch.setattr(UrlLock, "_beat", lambda self: None)
    return WorkFolder(UrlFolder(URL))


def test_a_build_that_lost_its_folder_removes_and_writes_nothing(asleep: WorkFolder, built: DatasetInfo) -> None:
    def plan() -> None:
        with asleep.planned_rejected() as file:
            file.write(b"its rejected")

    def add() -> None:
        with asleep.adding() as folder:
            (folder / "README.md").write_bytes(b"its card")

    with asleep:
        there = _take_over()
        for act in (plan, add, lambda: asleep.begin("a fingerprint"), lambda: asleep.finish(built)):
            with pytest.raises(ValueError, match=LOST):
                act()
            assert _objects() == there
        UrlFolder(URL).write("index.json", b"of the other, which is done")  # now `release` would clear .work
        there = _objects()
    assert _objects() == there


@pytest.fixture
def built(dataset_of: Callable[..., object], demo_tokenizer: TextTokenizer, tmp_path: Path) -> DatasetInfo:
    """The index of a dataset of one shard."""
    dataset_of(tmp_path, [_record(demo_tokenizer)], row_length=64)
    return DatasetInfo.model_validate_json((tmp_path / "out" / "index.json").read_bytes())


def _record(tokenizer: TextTokenizer) -> Record:
    return Record("a", text_runs(tokenizer, [(np.arange(3, 30, dtype=np.int32), True)], eos=True))


def test_a_worker_of_such_a_build_uploads_neither_shard_nor_record(
    asleep: WorkFolder, demo_tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    write_store(tmp_path / "a.arrow", [_record(demo_tokenizer)])
    stores = (StoreRef("a.arrow", "made", "error"),)
    form = RowFormat(UrlFolder(URL), DiskFolder(tmp_path), stores, 64, "uint16", "masked", "example", lock=asleep.lock)
    shard = ShardRows("shard-000000.tar", np.array([(0, 0, 0, 0, 28)]), np.array([0, 1]))
    with asleep:
        written = write_shard_rows(form, shard)
        assert len(_objects()["/lock/out/shard-000000.tar"]) == written.shard.num_bytes, "while the folder is its own"
        there = _take_over()
        with pytest.raises(ValueError, match=LOST):
            write_shard_rows(form, shard)
        assert _objects() == there


def test_an_upload_that_is_tried_again_looks_again(asleep: WorkFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lwm_data.format.retry.WAITS", (0.0,) * 3)
    memory = type(fsspec.filesystem("memory"))
    left: list[dict[str, bytes]] = []

    def put_file(self: object, local: str, path: str, **options: object) -> None:
        left.append(_take_over())  # while the first try slept
        raise ConnectionResetError(104, "reset")

    with asleep:
        monkeypatch.setattr(memory, "put_file", put_file)
        with pytest.raises(ValueError, match=LOST), asleep.adding() as folder:
            (folder / "shard-000000.tar").write_bytes(b"late rows")
        assert len(left) == 1 and _objects() == left[0]


def test_a_living_build_whose_process_is_hidden_keeps_its_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under hidepid, where /proc shows no process of another user, and a signal to it is not permitted."""

    def kill(process: int, number: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    with WorkFolder(UrlFolder(URL)):
        monkeypatch.setattr(Path, "exists", lambda self, **options: False)
        monkeypatch.setattr(os, "kill", kill)
        with pytest.raises(ValueError, match="another build is writing there"):
            UrlLock(UrlFolder(URL).child(".work")).acquire()
        monkeypatch.undo()
