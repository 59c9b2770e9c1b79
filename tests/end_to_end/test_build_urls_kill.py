"""A build to an S3 server that is killed, or whose server fails, and run again: the bytes of a build on a disk."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import s3fs

from lwm_data import build_lock
from lwm_data.build import build
from lwm_data.folder import UrlFolder
from lwm_data.format import retry
from tests.s3_server import BUCKET, S3Server, local_bytes, remove_from_s3, s3_bytes


def left_in_scratch() -> list[str]:
    found = Path(tempfile.gettempdir()).rglob("*")
    return [path.name for path in found if path.name.startswith("writing-") or path.name.endswith(".tmp")]


def test_a_build_that_is_killed_and_run_again_gives_the_same_bytes(
    project: Callable[..., Path], tmp_path: Path, s3: S3Server
) -> None:
    keys = {"shard_size": 4096}
    here = build(project(**keys))
    wanted, wanted_store = local_bytes(here.out), local_bytes(here.out.parent / "token-store")
    rng = random.Random(0)
    for kill, sign in enumerate((".arrow", "shard-", "index.json")):
        manifest = project(f"killed{kill}", **keys)
        url = f"{BUCKET}/killed{kill}"
        command = [sys.executable, "-m", "lwm_data.cli", "build", str(manifest), "--set", f"out={url}/out"]
        s3.seen()
        process = subprocess.Popen(
            [*command, "--workers", "2" if kill == 1 else "1"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=Path(__file__).parents[2],
            # Bytecode is kept between the builds: compiling it is most of what a short build does.
            env={name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
            | {"PYTHONPYCACHEPREFIX": str(tmp_path / "bytecode")},
        )
        num = rng.randrange(1, 8) if sign == "shard-" else 1
        while num > 0 and process.poll() is None:
            num -= sum(of["method"] == "PUT" and sign in of["path"] for of in s3.seen())
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait(30)
        build(manifest, [f"out={url}/out"])
        assert s3_bytes(f"{url}/out") == wanted and s3_bytes(f"{url}/token-store") == wanted_store, f"kill {kill}"
        assert left_in_scratch() == []


def test_an_outage_costs_no_more_than_the_work_of_its_time(
    project: Callable[..., Path], s3: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    here = build(project())
    monkeypatch.setattr(retry, "WAITS", (0.01,) * 20)
    s3.fail(share=0.15)
    build(project(), [f"out={BUCKET}/short/out"])
    s3.fail()
    assert s3_bytes(f"{BUCKET}/short/out") == local_bytes(here.out)

    monkeypatch.setattr(retry, "WAITS", (0.01,))
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    upload = UrlFolder._upload

    def upload_some(self: UrlFolder, file: Path, before: Callable[[], None]) -> None:
        if file.name == "shard-000001.tar":
            s3.fail(next_requests=1000)
        upload(self, file, before)

    with monkeypatch.context() as patch:
        patch.setattr(UrlFolder, "_upload", upload_some)
        patch.setattr(build_lock.UrlLock, "release", lambda self, clear: self._stop.set())  # as if cut off
        with pytest.raises(OSError, match="request rate"):
            build(project(), [f"out={BUCKET}/long/out"])
    s3.fail()
    assert not {"index.json", "shard-000001.tar"} & s3_bytes(f"{BUCKET}/long/out").keys()
    remove_from_s3(f"{BUCKET}/long/out/.work/lock")
    build(project(), [f"out={BUCKET}/long/out"])
    assert s3_bytes(f"{BUCKET}/long/out") == local_bytes(here.out) and left_in_scratch() == []
