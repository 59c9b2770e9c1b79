"""The S3 server that builds from and to URLs are tested against."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from tests.s3_server import BUCKET, S3Server, remove_from_s3, s3_server


@pytest.fixture(scope="module")
def running_s3() -> Iterator[S3Server]:
    with s3_server() as server:
        fsspec.filesystem("s3").mkdir(BUCKET)
        yield server


@pytest.fixture
def s3(running_s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The server, empty and at work, and scratch of the test's own."""
    (tmp_path / "scratch").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    running_s3.fail()
    remove_from_s3(BUCKET)
    running_s3.seen()
    return running_s3
