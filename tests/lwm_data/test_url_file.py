"""Files and folders behind URLs: what is read and written, whatever breaks on the way, and what is tried again."""

from __future__ import annotations

import errno
import http.server
import io
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from aiohttp import ClientPayloadError
from botocore.exceptions import EndpointConnectionError, NoCredentialsError
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given
from hypothesis import strategies as st

from lwm_data import scratch
from lwm_data.folder import DiskFolder, UrlFolder, folder_beside, open_folder
from lwm_data.format import retry
from lwm_data.format.retry import passes, refusal, retried
from lwm_data.url_file import open_url

DATA = bytes(range(251)) * 400


@pytest.fixture
def flaky(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Every second request of the memory file system fails; the list names them."""
    monkeypatch.setattr(retry, "WAITS", (0.0,) * 3)
    requests: list[str] = []

    def fails_first(name: str) -> None:
        real: Callable[..., Any] = getattr(MemoryFileSystem, name)

        def request(self: MemoryFileSystem, *args: Any, **kwargs: Any) -> Any:
            requests.append(name)
            if len(requests) % 2:
                raise ConnectionResetError(errno.ECONNRESET, "reset")
            return real(self, *args, **kwargs)

        monkeypatch.setattr(MemoryFileSystem, name, request)

    for name in ("cat_file", "put_file", "ls"):
        fails_first(name)
    yield requests


@given(st.lists(st.tuples(st.integers(0, len(DATA) + 10), st.integers(0, 5000)), max_size=20), st.integers(1, 3000))
def test_a_file_behind_a_url_reads_as_one_on_a_disk(reads: list[tuple[int, int]], buffer: int) -> None:
    fsspec.filesystem("memory").pipe_file("/file", DATA)
    with open_url("memory://file", buffer) as file:
        for at, count in reads:
            file.seek(at)
            assert file.read(count) == DATA[at : at + count] and file.tell() == at + len(DATA[at : at + count])
        file.seek(-100, io.SEEK_END)
        assert file.read() == DATA[-100:] and file.read(1) == b""


def test_reads_and_uploads_are_tried_again(flaky: list[str], tmp_path: Path) -> None:
    folder = UrlFolder("memory://flaky")
    with folder.writing() as written:
        (written / "a").write_bytes(DATA)
    assert folder.read("a") == DATA and folder.sizes() == {"a": len(DATA)}
    with open_url("memory://flaky/a", 1000) as file:
        assert file.read() == DATA
    assert {"cat_file", "put_file", "ls"} <= set(flaky)


def test_an_error_in_the_block_uploads_nothing() -> None:
    folder = UrlFolder("memory://stopped")
    with pytest.raises(KeyboardInterrupt), folder.writing() as written:
        (written / "a").write_bytes(DATA)
        raise KeyboardInterrupt
    assert folder.sizes() == {} and not written.exists()


def test_an_object_is_created_once() -> None:
    folder = UrlFolder("memory://once")
    assert folder.create("lock", b"first") and not folder.create("lock", b"second")
    assert folder.read("lock") == b"first"


class _Answer(Exception):
    def __init__(self, status: int) -> None:
        super().__init__(f"answered {status}")
        self.status = status


@pytest.mark.parametrize(
    "error",
    [
        TimeoutError(),
        ConnectionRefusedError(errno.ECONNREFUSED, "refused"),
        OSError(errno.EBUSY, "SlowDown"),
        OSError(errno.EREMOTEIO, "InternalError"),
        EndpointConnectionError(endpoint_url="http://a"),
        ClientPayloadError("cut off"),
        _Answer(503),
        _Answer(429),
    ],
    ids=repr,
)
def test_errors_that_pass_are_waited_for(error: Exception) -> None:
    left = [error, error]

    def operation() -> str:
        if left:
            raise left.pop()
        return "done"

    assert passes(error) and retried(operation, (0.0, 0.0)) == "done"


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError("no bucket"),
        PermissionError("denied"),
        NoCredentialsError(),
        OSError(errno.EINVAL, "BadDigest"),
        OSError(errno.ENOSPC, "full"),
        _Answer(404),
        ValueError("ours"),
        ImportError("s3fs"),
        NotImplementedError(),
    ],
    ids=repr,
)
def test_errors_that_stay_are_told_at_once(error: Exception) -> None:
    tried = []

    def operation() -> None:
        tried.append(1)
        raise error

    with pytest.raises(type(error)):
        retried(operation, (100.0,))
    assert len(tried) == 1
    assert str(refusal(error, "s3://bucket/folder")).startswith("s3://bucket/folder: ")


def test_urls_and_paths_name_folders() -> None:
    assert open_folder("/a/b") == DiskFolder(Path("/a/b")) == open_folder("file:///a/b")
    assert open_folder("s3://bucket/a/") == UrlFolder("s3://bucket/a")
    assert folder_beside(open_folder("s3://bucket/a"), "b") == UrlFolder("s3://bucket/b")
    assert folder_beside(open_folder("/a/b"), "c") == DiskFolder(Path("/a/c"))


def test_a_file_is_fetched_once_and_the_oldest_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "scratch_root", lambda: tmp_path)
    monkeypatch.setattr(scratch, "IN_USE", 0.0)
    fetches: list[str] = []

    def fetch(name: str) -> Path:
        def download(path: Path) -> None:
            fetches.append(name)
            path.write_bytes(name.encode() * 100)

        return scratch.fetched(name, f"{name}.arrow", 100 * len(name), download)

    threads = [threading.Thread(target=fetch, args=("a",)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert fetches == ["a"], "one download for all who ask at the same time"
    monkeypatch.setattr(scratch, "SHARE_OF_DISK", 0.0)
    fetch("b")
    assert [path.name for path in sorted(tmp_path.rglob("*.arrow"))] == ["b.arrow"]
    assert not list(tmp_path.rglob(".*.tmp"))


def test_a_download_that_breaks_off_leaves_nothing_that_is_taken_for_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scratch, "scratch_root", lambda: tmp_path)
    with pytest.raises(OSError, match="3 of 5 bytes came"):
        scratch.fetched("x", "x.arrow", 5, lambda path: [None, path.write_bytes(b"abc")][0])
    assert (
        scratch.fetched("x", "x.arrow", 5, lambda path: [None, path.write_bytes(b"abcde")][0]).read_bytes() == b"abcde"
    )
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["x.arrow"]


def test_the_next_download_removes_what_a_killed_one_left_and_not_what_is_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scratch, "scratch_root", lambda: tmp_path)
    dead = tmp_path / "fetched" / "dead" / ".novels.arrow.tmp"
    dead.parent.mkdir(parents=True)
    dead.write_bytes(b"half of a killed download")

    def inner(path: Path) -> None:
        path.write_bytes(b"inner")

    def outer(path: Path) -> None:
        path.write_bytes(b"ou")
        scratch.fetched("inner", "inner.arrow", 5, inner)
        with open(path, "ab") as file:
            file.write(b"ter")

    assert scratch.fetched("outer", "outer.arrow", 5, outer).read_bytes() == b"outer"
    left = [path for path in (tmp_path / "fetched").rglob("*") if path.is_file()]
    assert sorted(path.name for path in left) == ["inner.arrow", "outer.arrow"] and not dead.parent.exists()


class _OldServer(http.server.BaseHTTPRequestHandler):
    """Knows no ranges; says how long its answer is as `ending` tells, and breaks off when half of it is sent."""

    protocol_version = "HTTP/1.1"
    ending = ""
    breaks = True

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.end_headers()

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Connection", "close")
        chunk = len(DATA) // 2
        if self.ending == "length":
            self.send_header("Content-Length", str(len(DATA)))
        if self.ending == "chunks":
            self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for at in range(0, len(DATA), chunk):
            if at and self.breaks:
                type(self).breaks = False
                break
            body = DATA[at : at + chunk]
            self.wfile.write(b"%x\r\n%b\r\n" % (len(body), body) if self.ending == "chunks" else body)
        else:
            self.wfile.write(b"0\r\n\r\n" if self.ending == "chunks" else b"")
        self.close_connection = True

    def log_message(self, *args: object) -> None: ...


@pytest.mark.parametrize("ending", ["length", "chunks", "closes"])
def test_half_an_answer_is_never_taken_for_the_file(ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "WAITS", (0.0,) * 3)
    handler = type("Handler", (_OldServer,), {"ending": ending})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with open_url(f"http://127.0.0.1:{server.server_address[1]}/books.jsonl") as file:
            if ending == "closes":
                with pytest.raises(ValueError, match=r"books\.jsonl: the server says neither how long the file is"):
                    file.read()
            else:
                assert file.read() == DATA
        server.shutdown()


def test_what_a_killed_process_was_writing_goes_and_what_is_written_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scratch, "scratch_root", lambda: tmp_path)
    (tmp_path / "writing-dead").mkdir()
    (tmp_path / "writing-dead" / "shard.tar").write_bytes(b"half")
    with scratch.writing_folder() as alive:
        scratch.remove_dead_writing()
        assert [path.name for path in tmp_path.iterdir()] == [alive.name]
    assert list(tmp_path.iterdir()) == []
