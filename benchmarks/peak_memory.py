"""Peak memory of a build whose input grows tenfold: many novels, and one long file of chats.

Each build is a process of its own, and the largest resident size of it and its workers is taken. The text is the demo's,
its lines shuffled, so that no two files are equal.

    python benchmarks/peak_memory.py --megabytes 20
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "manifests" / "demo"
FILE_BYTES = 250_000
BUILD = (
    "import resource, sys; from lwm_data.build import build; "
    "build(sys.argv[1], workers=int(sys.argv[2])); "
    "print(max(resource.getrusage(of).ru_maxrss for of in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=5)
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args()
    lines = [line for file in sorted((DEMO / "novels").glob("*.txt")) for line in file.read_text().splitlines(True)]
    for what in ("books", "chats"):
        peaks = []
        for megabytes in (args.megabytes, 10 * args.megabytes):
            with tempfile.TemporaryDirectory() as folder:
                write(Path(folder), what, int(megabytes * 1e6), lines)
                peaks.append(peak(Path(folder), args.workers))
            print(f"{what}: {megabytes:,.0f} MB of text, peak {peaks[-1] / 1024:,.0f} MiB", flush=True)
        print(f"{what}: ten times the input, {peaks[1] / peaks[0]:.2f} times the memory")


def write(folder: Path, what: str, num_bytes: int, lines: list[str]) -> None:
    """A project: the manifest and its input."""
    rng = random.Random(num_bytes)
    (folder / "in").mkdir()
    if what == "books":
        for number in range(num_bytes // FILE_BYTES):
            (folder / "in" / f"{number:06d}.txt").write_text("".join(rng.choices(lines, k=FILE_BYTES // 55)))
    else:
        with open(folder / "in" / "0.jsonl", "w") as file:
            written = 0
            while written < num_bytes:
                turns = ["".join(rng.choices(lines, k=8)) for _ in range(4)]
                written += file.write(json.dumps({"id": str(written), "data": turns}) + "\n")
    source = {"name": what, "type": what, "path": "in/*"}
    manifest = {
        "kind": "dataset",
        "name": what,
        "out": "out",
        "text_tokenizer": str(ROOT / "tokenizers/demo-text.yaml"),
    }
    manifest |= {"row_length": 32768, "shard_size": "8MB", "sources": [source]}
    (folder / "dataset.yaml").write_text(json.dumps(manifest))


def peak(folder: Path, workers: int) -> int:
    """KiB."""
    command = [sys.executable, "-c", BUILD, str(folder / "dataset.yaml"), str(workers)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, check=True)
    return int(done.stdout.split()[-1])


if __name__ == "__main__":
    main()
