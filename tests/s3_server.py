"""An S3 server on loopback in a process of its own: moto's, behind a door that counts requests and can refuse them.

test -> http://127.0.0.1:PORT/bucket/key -> door -> moto, in memory
                             /door          what the door has seen, and what it shall do
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode

import fsspec
import pytest
import s3fs

BUCKET = "s3://lwm-test"
KEY = "a-test-key"
DENIED = b'<?xml version="1.0"?><Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>'
BUSY = b'<?xml version="1.0"?><Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>'


class S3Server:
    """The server as a test sees it. url: of the endpoint."""

    def __init__(self, url: str) -> None:
        self.url = url

    def seen(self) -> list[dict[str, str]]:
        """method, path and range of each request since this was last asked."""
        found: list[dict[str, str]] = self._door()
        return found

    def fail(self, share: float = 0.0, next_requests: int = 0) -> None:
        """Answer a share of all requests, drawn at random, and the next ones with 503; nothing given: none."""
        self._door(share=share, next=next_requests)

    def _door(self, **asked: float) -> Any:
        with urllib.request.urlopen(f"{self.url}/door?{urlencode(asked)}") as answer:
            return json.loads(answer.read())


@contextlib.contextmanager
def s3_server() -> Iterator[S3Server]:
    """A running server; the environment names it, and keys that it takes."""
    command = [sys.executable, str(Path(__file__))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        with pytest.MonkeyPatch.context() as patch:
            server = S3Server(f"http://127.0.0.1:{port}")
            patch.setenv("AWS_ENDPOINT_URL", server.url)
            patch.setenv("AWS_ACCESS_KEY_ID", KEY)
            patch.setenv("AWS_SECRET_ACCESS_KEY", "a-test-secret")
            patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
            patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
            patch.setenv("AWS_MAX_ATTEMPTS", "1")  # the tests are about our own
            s3fs.S3FileSystem.clear_instance_cache()  # one of an earlier server knows its address
            try:
                yield server
            finally:
                process.kill()
                s3fs.S3FileSystem.clear_instance_cache()


def s3_bytes(url: str) -> dict[str, bytes]:
    """name -> bytes of all objects below `url`."""
    fs = fsspec.filesystem("s3")
    fs.invalidate_cache()
    root = url.removeprefix("s3://") + "/"
    return {path.removeprefix(root): fs.cat_file(path) for path in fs.find(url)}


def local_bytes(folder: Path) -> dict[str, bytes]:
    """The same of a folder on a disk."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def to_s3(folder: Path, url: str) -> None:
    """Copy a folder."""
    fs = fsspec.filesystem("s3")
    for name, data in local_bytes(folder).items():
        fs.pipe_file(f"{url}/{name}", data)


def remove_from_s3(url: str) -> None:
    """Remove all objects below `url`."""
    fs = fsspec.filesystem("s3")
    fs.invalidate_cache()
    for path in fs.find(url):
        fs.rm_file(path)


class _Door:
    def __init__(self, inside: Callable[..., Iterable[bytes]]) -> None:
        self._inside, self._lock = inside, threading.Lock()
        self._seen: list[dict[str, str]] = []
        self._share, self._next = 0.0, 0
        self._rng = random.Random(0)

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        with self._lock:
            if environ["PATH_INFO"] == "/door":
                asked = parse_qs(environ["QUERY_STRING"])
                if asked:
                    self._share, self._next = float(asked["share"][0]), int(asked["next"][0])
                seen, self._seen = self._seen, []
                return _answer(start_response, "200 OK", json.dumps(seen).encode())
            names = {"method": "REQUEST_METHOD", "path": "PATH_INFO", "range": "HTTP_RANGE"}
            self._seen.append({name: environ.get(key, "") for name, key in names.items()})
            fails = self._next > 0 or self._rng.random() < self._share
            self._next = max(0, self._next - 1)
        of_head = environ["REQUEST_METHOD"] == "HEAD"  # has no body
        if fails:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            return _answer(start_response, "503 Service Unavailable", b"" if of_head else BUSY)
        if f"Credential={KEY}/" not in environ.get("HTTP_AUTHORIZATION", ""):
            return _answer(start_response, "403 Forbidden", b"" if of_head else DENIED)
        return self._inside(environ, start_response)


def _answer(start_response: Callable[..., Any], status: str, body: bytes) -> list[bytes]:
    start_response(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
    return [body]


def _serve() -> None:
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Handler(WSGIRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_request(self, *args: object) -> None: ...

    os.environ["AWS_ACCESS_KEY_ID"] = os.environ["AWS_SECRET_ACCESS_KEY"] = "of moto"
    server = make_server(
        "127.0.0.1", 0, _Door(DomainDispatcherApplication(create_backend_app)), threaded=True, request_handler=Handler
    )
    print(server.server_address[1], flush=True)
    server.serve_forever()


if __name__ == "__main__":
    _serve()
