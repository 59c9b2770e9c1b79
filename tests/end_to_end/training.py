"""What the tests of training share: a small dataset with its manifest, and runs in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lwm_data.build import build

ROOT = Path(__file__).parents[2]


def write_train_manifest(project: Callable[..., Path], name: str = "project", **keys: Any) -> Path:
    """Builds a dataset in rows of 128 tokens and writes `train.yaml` beside it: 12 steps of the tiny model."""
    dataset = project(name, row_length=128, sources=[{"name": "books", "type": "books", "path": "books/*.txt"}])
    build(dataset, (), 1)
    manifest = {
        "kind": "train",
        "name": "small",
        "out": "run",
        "model": {"preset": "tiny"},
        "precision": "fp32",
        "data": [{"dataset": "out"}],
        "batch_rows": 2,
        "steps": 12,
        "order": "contiguous",
        "optimizer": {"lr": 1e-3, "warmup": 2},
        "checkpoint": {"every": 4, "keep": 2},
    } | keys
    path = dataset.parent / "train.yaml"
    path.write_text(json.dumps(manifest), encoding="utf-8")
    return path


def start(*command: object, cache: Path) -> subprocess.Popen[str]:
    """A process of this Python; what XLA compiles is kept in `cache`, so that only the first has to."""
    env = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    env |= {"PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": str(cache)}
    env |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0"}
    args = [sys.executable, *map(str, command)]
    return subprocess.Popen(args, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def steps_logged(run: Path) -> list[int]:
    """The steps of metrics.jsonl's whole lines."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line)["step"] for line in path.read_text().splitlines() if line.endswith("}")]


def losses(run: Path) -> list[float]:
    """The losses of metrics.jsonl."""
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str], seconds: float = 200) -> None:
    """Returns when the run has logged the step, its process ended, or the time is over."""
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline and (steps_logged(run) or [0])[-1] < step:
        time.sleep(0.01)
