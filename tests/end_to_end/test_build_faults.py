"""On a disk that is full or fails, a build ends with an error, never with a wrong dataset, and goes on when it can."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from lwm_data.build import build

ROOT = Path(__file__).parents[2]
KEYS = {
    "shard_size": 4096,
    "sources": [
        {"name": "books", "type": "books", "path": "books/*.txt"},
        {"name": "chats", "type": "chats", "path": "chats.jsonl"},
    ],
}


def _bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def _build(manifest: Path, fault: str) -> tuple[int, str]:
    """Exit code and stderr of a build with the fault."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment |= {"PYTHONPYCACHEPREFIX": str(manifest.parent.parent / "bytecode"), "PYTHONPATH": str(ROOT)}
    environment |= {"LWM_FAULT": fault, "LWM_FAULT_UNDER": str(manifest.parent)}
    command = [sys.executable, str(Path(__file__).with_name("faulty_build.py")), "build", str(manifest)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    return done.returncode, done.stderr


def _same(manifest: Path, wanted: Path) -> bool:
    """Whether dataset and token store are those of the undisturbed build, with nothing left over."""
    return all(_bytes(manifest.parent / name) == _bytes(wanted.parent / name) for name in ("out", "token-store"))


def test_a_build_whose_disk_is_full_says_so_and_goes_on_when_there_is_room(project: Callable[..., Path]) -> None:
    wanted = build(project("whole", **KEYS)).out
    rng = random.Random(0)
    for full in range(3):
        manifest = project(f"full{full}", **KEYS)
        code, said = _build(manifest, f"full:{rng.randint(20, 260)}")
        assert code == 1 and "No space left on device; make room" in said and "Traceback" not in said, said
        assert not (manifest.parent / "out" / "index.json").exists()
        build(manifest, workers=1 + full // 2)
        assert _same(manifest, wanted), f"full disk {full}"


def test_failing_reads_and_writes_never_give_a_wrong_dataset(project: Callable[..., Path]) -> None:
    wanted = build(project("whole", **KEYS)).out
    rng = random.Random(1)
    failed = 0
    for disk in range(1, 2):
        manifest = project(f"failing{disk}", **KEYS)
        for _ in range(3):
            code, said = _build(manifest, f"io:0.004:{rng.randint(0, 1 << 20)}")
            assert code == 0 or "Input/output error" in said, said
            failed += code != 0
            if code == 0:
                assert _same(manifest, wanted), f"disk {disk}"
        build(manifest)
        assert _same(manifest, wanted), f"disk {disk}"
    assert failed >= 1
