"""Kills builds of the demo's novels and chats, by the hundred, and asks for the bytes of an undisturbed one each time.

    python tests/end_to_end/kill_build.py --kills 200 --full 20 --errors 20

Half of the kills come at a random moment of time, half in the middle of a random operation on a file: a write, sync,
rename or removal (faulty_build.py). Then a disk (a tmpfs) that is full somewhere on the way, and disks that fail.
After each the build is run again, with another number of workers, and all its bytes and names are compared.
The tests have a short version of this; it takes the time of some 500 builds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import BinaryIO

import faulty_build
import pandas

from lwm_data.build import build
from lwm_data.cli import app
from lwm_data.terminal import run_app

assert build and pandas  # imported here, so that no child has to

ROOT = Path(__file__).parents[2]
FAULTY = Path(__file__).with_name("faulty_build.py")
DEMO = ROOT / "manifests" / "demo"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--full", type=int, default=20)
    parser.add_argument("--errors", type=int, default=20)
    parser.add_argument("--novels", default="*.txt", help="which of the demo's")
    parser.add_argument("--chats", default="*.zst", help="which of the demo's")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kill-build-") as scratch:
        trial = Trial(Path(scratch), args.novels, args.chats, args.seed)
        trial.kills(args.kills)
        trial.full_disks(args.full)
        trial.errors(args.errors)


class Trial:
    """One project folder, what it must hold in the end, and how long it takes."""

    def __init__(self, scratch: Path, novels: str, chats: str, seed: int) -> None:
        self.rng = random.Random(seed)
        self.project = scratch / "project"
        self.project.mkdir()
        for name, pattern in (("novels", novels), ("chats", chats)):
            (self.project / name).mkdir()
            for file in (DEMO / name).glob(pattern):
                shutil.copy(file, self.project / name)
        for file in (ROOT / "tokenizers").glob("demo-text.*"):
            shutil.copy(file, self.project)
        sources = [
            {"name": "novels", "type": "books", "path": "novels/*.txt"},
            {"name": "talk", "type": "chats", "path": "chats/*.jsonl.zst"},
        ]
        manifest = {"kind": "dataset", "name": "killed", "out": "made/out", "text_tokenizer": "demo-text.yaml"}
        manifest |= {"row_length": 2048, "shard_size": 65536, "sources": sources}
        (self.project / "dataset.yaml").write_text(json.dumps(manifest))
        self.made = self.project / "made"
        self.count = scratch / "count"
        self.seconds: dict[int, float] = {}  # of a build with so many workers
        for workers in (3, 2, 1):
            shutil.rmtree(self.made, ignore_errors=True)
            begin = time.monotonic()
            self.say(self.build("count", workers), 0)
            self.seconds[workers] = time.monotonic() - begin
        self.operations = int(self.count.read_text())
        self.wanted = self.found()
        print(
            f"undisturbed: {self.seconds[1]:.1f} s, {self.operations:,} operations, {len(self.wanted)} files",
            flush=True,
        )

    def start(self, fault: str, workers: int) -> tuple[int, BinaryIO]:
        """Begin a build in a process forked from this one, which has imported everything and built nothing."""
        reading, writing = os.pipe()
        pid = os.fork()
        if pid:
            os.close(writing)
            return pid, os.fdopen(reading, "rb")
        os.environ |= {"LWM_FAULT": fault, "LWM_FAULT_UNDER": str(self.project)}
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(writing, 2)
        os.close(writing)
        faulty_build.install()
        code = run_app(app, ["build", str(self.project / "dataset.yaml"), f"--workers={workers}"])
        self.count.write_text(str(faulty_build.done))
        sys.stderr.flush()
        os._exit(code)

    def end(self, pid: int, stderr: BinaryIO) -> tuple[int, str]:
        """Exit code and stderr of a build, once it and its workers are gone: these hold the other end."""
        with stderr:
            said = stderr.read().decode()
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said

    def build(self, fault: str, workers: int) -> tuple[int, str]:
        """The same, all in one."""
        return self.end(*self.start(fault, workers))

    def found(self) -> dict[str, str]:
        """name -> hash of all that is there, hidden files too."""
        return {
            str(path.relative_to(self.made)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(self.made.rglob("*"))
            if path.is_file()
        }

    def say(self, result: tuple[int, str], code: int) -> None:
        assert result[0] == code, result

    def finish(self, workers: int, what: str) -> None:
        """Run it again and compare."""
        self.say(self.build("count", workers), 0)
        found = self.found()
        assert found == self.wanted, (
            what,
            {name for name in found.keys() | self.wanted if found.get(name) != self.wanted.get(name)},
        )

    def kills(self, num: int) -> None:
        stages: Counter[str] = Counter()  # where they came
        for kill in range(num):
            shutil.rmtree(self.made)
            workers = self.rng.choice((1, 1, 2, 3))
            if kill % 2:
                code, said = self.build(f"kill:{self.rng.randint(1, self.operations)}", workers)
            else:
                pid, stderr = self.start("count", workers)
                time.sleep(self.rng.uniform(0, self.seconds[workers]))
                os.kill(pid, signal.SIGKILL)
                code, said = self.end(pid, stderr)
            stage = said.splitlines()[-1].split(":")[0] if said else "start"
            stages["finished before" if code == 0 else stage] += 1
            self.finish(self.rng.choice((2, 3)) if workers == 1 else 1, f"kill {kill}")
            if kill % 10 == 9:
                print(f"{kill + 1} kills, all equal: {dict(stages)}", flush=True)

    def full_disks(self, num: int) -> None:
        needed = sum(path.stat().st_size for path in self.made.rglob("*") if path.is_file()) >> 10
        codes: Counter[int] = Counter()
        for full in range(num):
            shutil.rmtree(self.made)
            self.made.mkdir()
            small = self.rng.randint(needed // 20, needed)
            python = f"LWM_FAULT=count LWM_FAULT_UNDER=/none PYTHONPATH={ROOT} {sys.executable} {FAULTY}"
            build = f"{python} build {self.project}/dataset.yaml --workers={self.rng.choice((1, 2))}"
            script = f"mount -t tmpfs -o size={small}k none {self.made} && {{ {build}; echo CODE $?; "
            script += f"mount -o remount,size=1g {self.made}; {build} && cp -a {self.made} {self.made}-copied; }}"
            done = subprocess.run(["unshare", "-Urm", "sh", "-c", script], capture_output=True, text=True)
            assert done.returncode == 0, done
            (code,) = (int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("CODE"))
            assert code == 0 or "No space left on device" in done.stderr, done.stderr
            codes[code] += 1
            self.made.rmdir()
            (self.made.with_name("made-copied")).rename(self.made)
            found = self.found()
            assert found == self.wanted, f"full disk {full}"
        print(f"{num} disks full at {needed // 20:,} to {needed:,} kB, all equal with room: exit codes {dict(codes)}")

    def errors(self, num: int) -> None:
        codes: Counter[int] = Counter()
        for error in range(num):
            shutil.rmtree(self.made)
            for attempt in range(100):
                seed = self.rng.randint(0, 1 << 20)
                code, said = self.build(f"io:{self.rng.choice((0.3, 1, 3)) / self.operations}:{seed}", 1 + attempt % 2)
                codes[code] += 1
                assert code == 0 or "Input/output error" in said, said
                if (self.made / "out" / "index.json").exists():
                    whole = {
                        name: of for name, of in self.found().items() if ".work" not in name and ".tmp" not in name
                    }
                    assert whole.items() <= self.wanted.items(), f"disk {error}: {whole.keys()}"
                if code == 0:
                    break
            self.finish(1, f"failing disk {error}")
        print(f"{num} failing disks, all equal in the end: exit codes {dict(codes)}")


if __name__ == "__mp_main__":  # a worker of a build
    faulty_build.install()
if __name__ == "__main__":
    main()
