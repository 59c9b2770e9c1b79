"""Peak memory of a build whose input grows tenfold: many novels, and one long file of chats.

Each build is a process of its own, looked at 50 times a second. What is told apart: memory of its own, and pages of
mapped files of the token store, which the system takes back when others need room. The text is lines of the demo's
novels in random order, so that no two files are equal.

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
BUILD = """
import re, sys, threading, time
from lwm_data.build import build
peak = {"RssAnon": 0, "RssFile": 0}

def look():
    with open("/proc/self/status") as status:
        said = status.read()
    for name in peak:
        peak[name] = max(peak[name], int(re.search(name + r":\\s+([0-9]+)", said)[1]))

def watch():
    while True:
        look()
        time.sleep(0.02)

threading.Thread(target=watch, daemon=True).start()
build(sys.argv[1])
look()
print(peak["RssAnon"], peak["RssFile"])
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=5)
    args = parser.parse_args()
    lines = [line for file in sorted((DEMO / "novels").glob("*.txt")) for line in file.read_text().splitlines(True)]
    for what in ("books", "chats"):
        peaks = []
        for megabytes in (args.megabytes, 10 * args.megabytes):
            with tempfile.TemporaryDirectory() as folder:
                write(Path(folder), what, int(megabytes * 1e6), lines)
                own, mapped = peak(Path(folder))
            peaks.append(own)
            print(
                f"{what}: {megabytes:,.0f} MB of text, {own >> 10:,} MiB, and {mapped >> 10:,} MiB mapped", flush=True
            )
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


def peak(folder: Path) -> tuple[int, int]:
    """KiB at the peak: of its own, of mapped files."""
    command = [sys.executable, "-c", BUILD, str(folder / "dataset.yaml")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, check=True)
    own, mapped = done.stdout.split()
    return int(own), int(mapped)


if __name__ == "__main__":
    main()
