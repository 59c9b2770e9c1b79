"""Builds from and to an S3 server on loopback have the bytes of a build on a disk, and are read by ranges."""

from __future__ import annotations

import functools
import http.server
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from lwm_data import build_lock
from lwm_data.build import build
from lwm_data.check import check_dataset
from lwm_data.cli import app
from lwm_data.folder import UrlFolder
from lwm_data.format import retry
from lwm_data.format.dataset import open_dataset
from lwm_data.format.example import Run
from lwm_data.sources.record import Record
from lwm_data.terminal import run_app
from lwm_data.token_store import StoreFile, write_store
from lwm_data.work_folder import WorkFolder
from lwm_train.loader import Loader
from lwm_train.mesh import MeshSpec, make_mesh
from tests.s3_server import BUCKET, S3Server, local_bytes, s3_bytes, to_s3

SAME = ("manifest", "build_fingerprint")  # of the index: where the input was


pytestmark = pytest.mark.usefixtures("s3")


def left_in_scratch() -> list[str]:
    found = Path(tempfile.gettempdir()).rglob("*")
    return [path.name for path in found if path.name.startswith("writing-") or path.name.endswith(".tmp")]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_build_to_s3_has_the_bytes_of_one_on_a_disk(
    project: Callable[..., Path], tmp_path: Path, workers: int
) -> None:
    there = build(project(), [f"out={BUCKET}/run/out"], workers=workers)
    here = build(project())
    assert s3_bytes(f"{BUCKET}/run/out") == local_bytes(here.out)
    assert s3_bytes(f"{BUCKET}/run/token-store") == local_bytes(here.out.parent / "token-store")
    assert there.built and there.info == here.info and left_in_scratch() == []
    again = build(project(), [f"out={BUCKET}/run/out"], workers=workers)
    assert not again.built and again.info == here.info
    assert len(s3_bytes(f"{BUCKET}/run/out")) == len(local_bytes(here.out)), "no .work is left"


def test_rows_do_not_depend_on_where_the_input_is(
    project: Callable[..., Path], tmp_path: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = project()
    here = build(manifest)
    folder = manifest.parent
    to_s3(folder / "books", f"{BUCKET}/in/books")
    memory = fsspec.filesystem("memory")
    for name, data in local_bytes(folder / "books").items():
        memory.pipe_file(f"/in/books/{name}", data)
    monkeypatch.setattr(retry, "WAITS", (0.01,) * 20)
    s3.fail(share=0.1)
    with web_server(folder) as address:
        overrides = [
            f"out={BUCKET}/run/out",
            f"sources.0.path={BUCKET}/in/books/*.txt",
            f"sources.1.path={address}/chats.jsonl",
            "sources.2.haystack=memory://in/books/*.txt",
        ]
        build(manifest, overrides)
    s3.fail()
    wanted, got = local_bytes(here.out), s3_bytes(f"{BUCKET}/run/out")
    infos = [json.loads(files.pop("index.json")) for files in (wanted, got)]
    assert got == wanted
    assert all(infos[0][key] == infos[1][key] for key in infos[0].keys() - set(SAME))


def web_server(folder: Path) -> Any:
    """A web server that knows no ranges, and breaks off the first answer with a body."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        broken = False

        def copyfile(self, source: Any, outputfile: Any) -> None:
            if not Handler.broken:
                Handler.broken = True
                outputfile.write(source.read(100))
                self.close_connection = True
            else:
                super().copyfile(source, outputfile)

        def log_message(self, *args: object) -> None: ...

    class Server(http.server.ThreadingHTTPServer):
        def __enter__(self) -> Any:
            threading.Thread(target=self.serve_forever, daemon=True).start()
            return f"http://127.0.0.1:{self.server_address[1]}"

        def __exit__(self, *args: object) -> None:
            self.shutdown()
            self.server_close()

    return Server(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))


def test_a_store_on_s3_is_reused_at_another_row_length(project: Callable[..., Path], s3: S3Server) -> None:
    store = f"token_store={BUCKET}/store"
    build(project(), [store])
    tokenized = s3_bytes(f"{BUCKET}/store")
    s3.seen()
    on_s3 = build(project("other"), [store, "row_length=300"])
    assert not [of for of in s3.seen() if of["method"] == "PUT" and of["path"].endswith(".arrow")]
    assert s3_bytes(f"{BUCKET}/store") == tokenized
    on_disk = build(project("third"), ["row_length=300"])
    assert local_bytes(on_s3.out) == local_bytes(on_disk.out)


def test_a_plan_moves_no_tokens(s3: S3Server, tmp_path: Path) -> None:
    run = Run(np.arange(500_000, dtype=np.int32), False, True)
    write_store(tmp_path / "a.arrow", [Record(f"book {i}", (run,)) for i in range(6)])
    size = (tmp_path / "a.arrow").stat().st_size
    fsspec.filesystem("s3").put_file(str(tmp_path / "a.arrow"), f"{BUCKET}/store/a.arrow")
    s3.seen()
    store = StoreFile.without_tokens(UrlFolder(f"{BUCKET}/store"), "a.arrow")
    assert store.lengths().tolist() == [500_000] * 6 and store.key(5) == "book 5" and store.rejections() == []
    ranges = [of["range"].removeprefix("bytes=").split("-") for of in s3.seen() if of["method"] == "GET"]
    assert sum(int(last) - int(first) + 1 for first, last in ranges) < size / 20


def test_what_cannot_be_used_is_told_before_any_work(
    project: Callable[..., Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*overrides: str) -> str:
        sets = [word for override in overrides for word in ("--set", override)]
        assert run_app(app, ["build", str(project()), *sets]) == 2
        error = capsys.readouterr().err
        assert "read input" not in error and "Traceback" not in error
        return error

    assert "s3://no-such-bucket/out: The specified bucket does not exist" in refused("out=s3://no-such-bucket/out")
    assert "no such bucket" in refused(f"out={BUCKET}/out", "token_store=s3://no-such-bucket/store")
    assert f"{BUCKET}: wanted a folder in the bucket" in refused(f"out={BUCKET}")
    assert "http://127.0.0.1:1/out: cannot be reached" in refused("out=http://127.0.0.1:1/out")
    assert "wrong://x/out" in refused("out=wrong://x/out")
    fsspec.filesystem("s3").pipe_file(f"{BUCKET}/full/letter.txt", b"Dear all")
    assert "not empty and no dataset" in refused(f"out={BUCKET}/full")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "another-key")
    type(fsspec.filesystem("s3")).clear_instance_cache()
    said = refused(f"sources.0.path={BUCKET}/in/*.txt")
    assert f"sources.0.path: {BUCKET}/in/*.txt: " in said and "AWS_ACCESS_KEY_ID" in said
    assert run_app(app, ["show", f"{BUCKET}/out"]) == 2 and "right to read there" in capsys.readouterr().err
    said = refused(f"out={BUCKET}/out")
    assert "Access Denied; access is refused: wanted credentials" in said and "AWS_ACCESS_KEY_ID" in said
    monkeypatch.undo()
    type(fsspec.filesystem("s3")).clear_instance_cache()


def test_two_builds_do_not_write_to_one_folder(project: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_lock, "BEAT", 0.2)
    monkeypatch.setattr(build_lock, "PATIENCE", 0.8)
    monkeypatch.setattr(build_lock, "SETTLE", 0.1)
    url = f"{BUCKET}/run/out"
    with WorkFolder(UrlFolder(url)):
        with pytest.raises(ValueError, match=rf"got {url}: another build is writing there \(process {os.getpid()} on"):
            build(project(), [f"out={url}"])
        assert "index.json" not in s3_bytes(url)
    here = build(project())
    dead = {"id": "of a dead one", "host": "another machine", "process": 1, "beat": 7}
    fsspec.filesystem("s3").pipe_file(f"{url}/.work/lock", json.dumps(dead).encode())
    build(project(), [f"out={url}"])
    assert s3_bytes(url) == local_bytes(here.out)


def test_a_build_that_was_taken_for_dead_writes_no_index(
    project: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_lock, "BEAT", 0.1)
    url = f"{BUCKET}/run/out"
    with pytest.raises(ValueError, match="another build took over"), WorkFolder(UrlFolder(url)) as work:
        with work.planned_rejected() as file:
            file.write(b"")
        fsspec.filesystem("s3").pipe_file(f"{url}/.work/lock", b'{"id": "of the other"}')
        while work._lock._heart.is_alive():  # type: ignore[union-attr]
            time.sleep(0.05)
        work.begin("fingerprint")
    assert set(s3_bytes(url)) == {".work/lock", ".work/rejected.jsonl"}


def test_a_dataset_on_s3_is_read_by_ranges(
    project: Callable[..., Path], s3: S3Server, capsys: pytest.CaptureFixture[str]
) -> None:
    here = build(project(row_length=2048))
    url = f"{BUCKET}/data"
    to_s3(here.out, url)
    near, far = open_dataset(here.out), open_dataset(url)
    assert check_dataset(far, lambda rows: None) == []
    assert (
        run_app(app, ["check", url]) == 0 and run_app(app, ["show", url]) == 0 and run_app(app, ["show", url, "0"]) == 0
    )
    assert "segment 1" in capsys.readouterr().out

    far = open_dataset(url)
    far[0]  # opens the shard
    s3.seen()
    for row in (0, 1):
        for name, array in far.read(row, 100, 164).items():
            np.testing.assert_array_equal(array, near.read(row, 100, 164)[name])
    tokens, *tables = [of["range"] for of in s3.seen()]
    first, last = map(int, tokens.removeprefix("bytes=").split("-"))
    assert last - first + 1 == 64 * 2, "one request of the slice's bytes"
    assert len(tables) <= 3, "and one of the page's run tables, where it is another page"

    batches = []
    for dataset in (near, far):
        loader = Loader([dataset], [1.0], 0, 4, make_mesh(MeshSpec()), "contiguous")
        batches.append(loader.batch(3))
    np.testing.assert_array_equal(np.asarray(batches[0].tokens), np.asarray(batches[1].tokens))


def test_damage_behind_a_url_is_told_alike_by_one_worker_and_by_two(
    project: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    here, url = build(project()), f"{BUCKET}/data"
    first, second = (here.out / here.info.shards[number].name for number in (0, 1))
    data = bytearray(first.read_bytes())
    data[len(data) // 3] ^= 1
    first.write_bytes(data)
    second.write_bytes(second.read_bytes()[:-1])
    to_s3(here.out, url)
    told = []
    for workers in (1, 2):
        assert run_app(app, ["check", url, "--workers", str(workers), "--json"]) == 2
        told.append(json.loads(capsys.readouterr().out)["problems"])
    assert told[0] == told[1]
    assert f"{first.name}: sha256 is" in told[0][0] and any(f"{second.name}: " in problem for problem in told[0])
