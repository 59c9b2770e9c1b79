"""A build that is killed at any moment, or stopped by Ctrl-C, and run again, gives the bytes of an undisturbed one."""

from __future__ import annotations

import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lwm_data.build import build

NUM_KILLS = 20
TOKENS = {"min": 150, "max": 200}
SOURCES = [
    {"name": "books", "type": "books", "path": "books/*.txt"},
    {"name": "chats", "type": "chats", "path": "chats.jsonl"},
    {"name": "needles", "type": "needles", "count": 100, "haystack": "books/*.txt", "tokens": TOKENS},
]


def _bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def _start(manifest: Path, workers: int) -> subprocess.Popen[bytes]:
    """A build in a process group of its own, as a shell starts it; returns once its work has begun."""
    # Bytecode is kept between the builds of a test: compiling it is most of what a short build does.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = str(manifest.parent.parent / "bytecode")
    process = subprocess.Popen(
        [sys.executable, "-m", "lwm_data.cli", "build", str(manifest), "--workers", str(workers)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
        cwd=Path(__file__).parents[2],
        env=environment,
    )
    assert process.stderr is not None
    assert process.stderr.readline().startswith(b"read input"), "the build says what it does"
    return process


def _wait_for(process: subprocess.Popen[bytes], line: bytes) -> None:
    assert process.stderr is not None
    for said in process.stderr:
        if said.startswith(line):
            return
    raise AssertionError(f"the build never said {line!r}")


def _wait_for_files(process: subprocess.Popen[bytes], folder: Path, pattern: str, num: int) -> None:
    while len(list(folder.glob(pattern))) < num and process.poll() is None:
        time.sleep(0.001)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Wait until the build and its workers are gone: these hold the other end of stderr."""
    assert process.stderr is not None
    process.wait(30)
    ready, _, _ = select.select([process.stderr], [], [], 30)
    assert ready
    process.stderr.read()
    process.stderr.close()


def test_killed_at_random_moments_and_run_again_gives_the_same_bytes(project: Callable[..., Path]) -> None:
    keys = {"shard_size": 2048, "row_length": 200, "sources": SOURCES}
    undisturbed = build(project("whole", **keys)).out
    wanted, wanted_store = _bytes(undisturbed), _bytes(undisturbed.parent / "token-store")
    assert len(wanted) > 60

    manifest = project("measured", **keys)
    started = _start(manifest, 1)
    _end(started)
    assert started.returncode == 0 and _bytes(manifest.parent / "out") == wanted
    num_shards = sum(name.endswith(".tar") for name in wanted)

    rng = random.Random(0)
    unfinished = halfway = 0
    for kill in range(NUM_KILLS):
        manifest = project(f"killed{kill}", **keys)
        out = manifest.parent / "out"
        process = _start(manifest, workers=2 if kill % 5 == 4 else 1)
        # Moments by how much is done, so that they are spread over the work on a busy machine too.
        if kill % 2:
            _wait_for_files(process, out, "*.tar", rng.randrange(num_shards))
            time.sleep(rng.random() * 0.01)
        else:
            _wait_for_files(process, manifest.parent / "token-store", "*.arrow", rng.randrange(len(wanted_store)))
            time.sleep(rng.random() * 0.1)
        process.send_signal(signal.SIGKILL)
        _end(process)
        if not (out / "index.json").exists():
            unfinished += 1
            halfway += any(out.glob("shard-*.tar")) or any((manifest.parent / "token-store").glob("*.arrow"))
        again = build(manifest)
        assert again.out == out
        assert _bytes(out) == wanted, f"kill {kill}"
        assert _bytes(manifest.parent / "token-store") == wanted_store, f"kill {kill}"
    assert unfinished >= NUM_KILLS // 2 and halfway >= NUM_KILLS // 4, "the kills hit builds at work"


def test_a_rebuild_killed_at_random_moments_keeps_the_old_dataset_or_gives_the_new(
    project: Callable[..., Path],
) -> None:
    """Never a mixture, and nothing left of either."""
    keys = {"shard_size": 2048, "sources": SOURCES}
    old = _bytes(build(project("old", row_length=220, **keys)).out)
    new = _bytes(build(project("new", row_length=200, seed=1, **keys)).out)
    rng = random.Random(1)
    for kill in range(6):
        manifest = project(f"rebuilt{kill}", row_length=220, **keys)
        out = build(manifest).out
        project(f"rebuilt{kill}", row_length=200, seed=1, **keys)
        process = _start(manifest, 1)
        _wait_for(process, b"write rows" if kill % 2 else b"tokenize")
        time.sleep(rng.random() * 0.1)
        process.send_signal(signal.SIGKILL)
        _end(process)
        if (out / "index.json").exists():
            left = {name: data for name, data in _bytes(out).items() if not name.startswith(".")}
            assert left in (old, new), f"kill {kill}"
        build(manifest)
        assert _bytes(out) == new, f"kill {kill}"


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("stage", [b"tokenize", b"write rows"])
def test_ctrl_c_exits_130_and_leaves_nothing_half_written(
    project: Callable[..., Path], workers: int, stage: bytes
) -> None:
    count = 20_000 if stage == b"tokenize" else 3_000
    sources = [{"name": "n", "type": "needles", "count": count, "haystack": "books/*.txt", "tokens": TOKENS}]
    manifest = project(shard_size=512 if stage == b"write rows" else 8192, sources=sources)
    process = _start(manifest, workers)
    _wait_for(process, stage)
    time.sleep(0.2 if stage == b"write rows" else 1.5)
    assert process.poll() is None, "the build is still at work"
    os.killpg(process.pid, signal.SIGINT)
    _end(process)
    assert process.returncode == 130
    assert not (manifest.parent / "out" / "index.json").exists()
    left = [path.name for path in manifest.parent.rglob("*.tmp")]
    assert left == [], "no temporaries"
