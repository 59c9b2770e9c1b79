"""A run that is killed at random moments against the same run undisturbed: rows, losses and parameters must be equal.

    python benchmarks/kill_training.py manifests/demo/train-short.yaml --steps 200 --kills 10 --set model.preset=tiny

Kills are SIGKILL and SIGTERM in turn, each a few steps after a start. With --meshes '{sp: 2}' '{fsdp: 2}' the killed
run changes its mesh at each start; losses then differ by rounding, and parameters too.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from lwm_train.checkpoint import restore_params
from lwm_train.config import MeshSpec
from lwm_train.mesh import make_mesh


def logged(run: Path) -> dict[int, float]:
    """Loss by step of the whole lines of the run's metrics."""
    path = run / "metrics.jsonl"
    lines = [line for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []
    return {line["step"]: line["loss"] for line in map(json.loads, lines)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--meshes", nargs="*", default=[])
    parser.add_argument("--set", action="append", default=[])
    args = parser.parse_args()
    draws = random.Random(args.seed)
    folder = Path(tempfile.mkdtemp(prefix="kill-training-"))
    env = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(folder / "xla"), "JAX_PLATFORMS": "cpu"}
    sets = [*args.set, f"steps={args.steps}", "checkpoint={every: 10, keep: 2}"]

    def start(out: str, *more: str) -> subprocess.Popen[str]:
        options = [part for each in (*sets, f"out={folder / out}", *more) for part in ("--set", each)]
        command = [sys.executable, "-m", "lwm_train.cli", "run", args.manifest, *options]
        return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def finish(process: subprocess.Popen[str]) -> int:
        told, _ = process.communicate()
        if process.returncode not in (0, -signal.SIGKILL):
            sys.exit(told)
        return process.returncode

    finish(start("straight"))
    killed, starts = folder / "killed", 0
    for kill in range(args.kills):
        process = start("killed", *([f"mesh={args.meshes[starts % len(args.meshes)]}"] if args.meshes else []))
        starts += 1
        until = max(logged(killed), default=0) + draws.randint(1, max(2, 2 * args.steps // args.kills - 2))
        while process.poll() is None and max(logged(killed), default=0) < min(until, args.steps - 1):
            time.sleep(0.01)
        time.sleep(draws.random() * 0.2)
        process.send_signal((signal.SIGKILL, signal.SIGTERM)[kill % 2])
        finish(process)
        print(f"kill {kill + 1}: at step {max(logged(killed), default=0)}", flush=True)
    finish(start("killed", *([f"mesh={args.meshes[starts % len(args.meshes)]}"] if args.meshes else [])))
    a, b = logged(folder / "straight"), logged(killed)
    error = max(abs(a[step] - b[step]) / abs(a[step]) for step in a)
    print(f"steps {len(a)} and {len(b)}, largest relative error of a loss {error:.2g}")
    mesh = make_mesh(MeshSpec(), jax.devices()[:1])
    params = [jax.tree.leaves(restore_params(folder / run, mesh)[0]) for run in ("straight", "killed")]
    equal = all(np.array_equal(np.asarray(x), np.asarray(y)) for x, y in zip(*params, strict=True))
    print(f"parameters {'equal bit for bit' if equal else 'not equal'}; {folder}")


if __name__ == "__main__":
    main()
