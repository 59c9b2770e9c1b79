"""Shards beside raw files, copies of memory and bare `pread`: writing, reading, opening, cold slices.

    .venv/bin/python benchmarks/storage.py [--rounds 5] [--megabytes 128] [--only write read open cold]

Each case runs in a process of its own, all cases in turn, `--rounds` times; figures are of the best round. Before a
case it waits up to `--patience` seconds for a second in which the machine has nothing else to do. Rows are
of 4,096 and 1,048,576 uint16 tokens, documents in them of lognormal(6.5, 1.3) tokens. Everything written ends with
fsync unless said. Copies and fills return new arrays, as our reader does.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lwm_data.format.dataset import Dataset, ShardInfo, open_dataset, write_index
from lwm_data.format.packed import PackedSequence
from lwm_data.format.shard import ShardWriter, rows_per_page

ROOT = Path(__file__).parents[1]
SHORT, LONG = 4096, 1 << 20
BATCH = {SHORT: 64, LONG: 2}
UINT16 = np.dtype(np.uint16)
clock = time.perf_counter


def make_rows(length: int, megabytes: int) -> list[PackedSequence]:
    """Rows of random ids in documents, each trained but for its first token: a run each, as `pack_row` makes them."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(megabytes * (1 << 20) // (2 * length)):
        ends = np.cumsum(np.clip(rng.lognormal(6.5, 1.3, 8 + length // 400), 8, 32768).astype(np.int64))
        lengths = np.diff(np.append(ends[ends < length - 8], length), prepend=0)
        runs = np.zeros((len(lengths), 3), np.uint32)
        runs[:, 0], runs[:, 1] = lengths, np.arange(len(lengths)) + 1
        weights = (1 / (lengths - 1)).astype(np.float32)
        rows.append(PackedSequence(rng.integers(0, 32000, length).astype(np.uint16), runs, weights))
    return rows


def write_dataset(folder: Path, rows: list[PackedSequence], links: int = 1) -> None:
    """A dataset of one shard, or of `links` shards that are the same file."""
    folder.mkdir()
    length = len(rows[0].tokens)
    with ShardWriter(folder / "shard-000000.tar", length, UINT16) as writer:
        for row in rows:
            writer.add(row)
    of_writer = {field: getattr(writer, field) for field in ("num_rows", "num_bytes", "sha256", "offsets_at")}
    names = [f"shard-{number:06d}.tar" for number in range(links)]
    for name in names[1:]:
        os.link(folder / names[0], folder / name)
    update = {
        "row_length": length,
        "rows_per_page": rows_per_page(length, UINT16),
        "num_rows": writer.num_rows * links,
        "shards": tuple(ShardInfo(name=name, examples_sha256=writer.sha256, **of_writer) for name in names),
    }
    golden = open_dataset(ROOT / "tests" / "lwm_data" / "golden" / "v2-masked").info
    write_index(folder, golden.model_copy(update=update))


def prepare(folder: Path, megabytes: int, *_: object) -> dict[str, float]:
    """The datasets that the cases read: one shard each, 10^6 rows in links of one, and two indexes without shards."""
    rows = make_rows(SHORT, megabytes)
    write_dataset(folder / "short", rows)
    write_dataset(folder / "million", rows, links=-(-1_000_000 // len(rows)))
    rows = make_rows(LONG, megabytes)
    write_dataset(folder / "long", rows)
    write_dataset(folder / "cold", rows)  # what a disk reads in pieces stays in the page cache in pieces
    info = open_dataset(folder / "short").info
    for links in (3_200, 100_000):
        (folder / f"{links}").mkdir()
        shard = replace(info.shards[0], num_rows=32768)
        shards = tuple(replace(shard, name=f"shard-{n:06d}.tar") for n in range(links))
        write_index(folder / f"{links}", info.model_copy(update={"shards": shards, "num_rows": 32768 * links}))
    return {}


# Cases: each returns figures by name, of one process.


def write(folder: Path, megabytes: int, kind: str, length: int) -> dict[str, float]:
    """MB/s of tokens, and the bytes beyond the tokens in % of them."""
    rows, path = make_rows(length, megabytes), folder / "written.tar"
    num_bytes = sum(row.tokens.nbytes for row in rows)
    if kind == "shard, no fsync":
        os.fsync = lambda descriptor: None  # type: ignore[assignment]
    if kind == "webdataset":
        import webdataset  # noqa: F401 (takes seconds, which are not to be counted below)
    os.sync()
    begin = clock()
    if kind == HASHED:  # the least that any writer does that hashes its file in one stream
        with ThreadPoolExecutor(1) as hasher, open(path, "wb") as file:
            hashed = hasher.submit(_hash, rows)
            for row in rows:
                file.write(row.tokens.data)
            hashed.result()
    elif kind == "sha256 alone":
        _hash(rows)
    elif kind.startswith("raw"):
        with open(path, "wb") as file:
            for row in rows:
                file.write(row.tokens.data)
    elif kind.startswith("shard"):
        with ShardWriter(path, length, UINT16) as writer:
            for row in rows:
                writer.add(row)
    else:
        {"parquet": _write_parquet, "webdataset": _write_webdataset}[kind](path, rows, length)
    if kind in ("raw", "parquet", "webdataset"):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    seconds = clock() - begin
    beyond = path.stat().st_size / num_bytes - 1 if path.exists() else 0.0
    path.unlink(missing_ok=True)
    return {"MB/s": num_bytes / 1e6 / seconds, "beyond tokens %": 100 * beyond}


def _hash(rows: list[PackedSequence]) -> None:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(row.tokens.data)


def _write_parquet(path: Path, rows: list[PackedSequence], length: int) -> None:
    schema = pa.schema([pa.field("tokens", pa.binary(2 * length))])
    group = max(1, (16 << 20) // (2 * length))
    with pq.ParquetWriter(path, schema, compression="none", use_dictionary=False) as writer:
        for at in range(0, len(rows), group):
            held = np.stack([row.tokens for row in rows[at : at + group]])
            column = pa.FixedSizeBinaryArray.from_buffers(schema[0].type, len(held), [None, pa.py_buffer(held)])
            writer.write_table(pa.table([column], schema=schema))


def _write_webdataset(path: Path, rows: list[PackedSequence], length: int) -> None:
    import webdataset

    with webdataset.TarWriter(str(path)) as writer:  # what its ShardWriter writes each shard with
        for number, row in enumerate(rows):
            writer.write({"__key__": f"{number:08d}", "tokens.npy": row.tokens})


def read(folder: Path, megabytes: int, name: str) -> dict[str, float]:
    """MB/s of tokens (of bytes of all arrays for the last two), rows shuffled, in batches, from the page cache."""
    dataset = open_dataset(folder / name)
    length, num = dataset.info.row_length, BATCH[dataset.info.row_length]
    num_held = min(len(dataset), megabytes * (1 << 20) // (2 * length))
    held = dataset.read_tokens(range(num_held))  # the same bytes in memory
    order = np.random.default_rng(1).permutation(len(dataset))[: num_held // num * num].reshape(-1, num)

    def copy_rows(rows: np.ndarray) -> np.ndarray:
        out = np.empty((num, length), np.uint16)
        for place, row in enumerate((rows % num_held).tolist()):
            out[place] = held[row]
        return out

    def fill(rows: np.ndarray) -> list[np.ndarray]:
        return [np.full((num, length), 1, dtype) for dtype in (np.int32, np.int32, np.int32, np.float32, bool)]

    tasks: dict[str, tuple[Callable[[np.ndarray], Any], int]] = {
        "copy": (copy_rows, 2),
        "gather": (lambda rows: held[rows % num_held], 2),
        "read_tokens": (dataset.read_tokens, 2),
        "fill": (fill, 17),
        "read_batch": (dataset.read_batch, 17),
    }
    figures: dict[str, float] = {}
    for _ in range(5):
        for task, (run, bytes_a_token) in tasks.items():
            begin = clock()
            for rows in order:
                run(rows)
            rate = order.size * length * bytes_a_token / 1e6 / (clock() - begin)
            figures[task] = max(figures.get(task, 0.0), rate)
    return figures


def first_row(folder: Path, megabytes: int, name: str) -> dict[str, float]:
    """Milliseconds to open the dataset, and to open it and have a row's arrays."""
    begin = clock()
    dataset = open_dataset(folder / name)
    opened = clock()
    dataset[len(dataset) * 2 // 3]
    return {"open ms": 1e3 * (opened - begin), "open and a row ms": 1e3 * (clock() - begin)}


def open_index(folder: Path, megabytes: int, name: str) -> dict[str, float]:
    """Milliseconds and MB to open an index whose shards are not there."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    before, begin = resident(), clock()
    dataset = open_dataset(folder / name)
    milliseconds = 1e3 * (clock() - begin)
    return {"open ms": milliseconds, "MB": (resident() - before) / 1e6, "rows": len(dataset)}


def cold(folder: Path, megabytes: int, kind: str) -> dict[str, float]:
    """Median milliseconds of a 1/64 slice of a row of 1M tokens that no cache has, and bytes read / bytes wanted."""
    dataset: Dataset = open_dataset(folder / "cold")
    path, size = folder / "cold" / "shard-000000.tar", LONG // 64
    descriptor = os.open(path, os.O_RDONLY)
    offsets = np.fromfile(path, "<u8", 4 * len(dataset), offset=dataset.info.shards[0].offsets_at).reshape(-1, 4)
    dataset.read(0, 0, 1)  # opens the shard
    if "pread" in kind:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
    table = dataset.packed(0).runs.nbytes + dataset.packed(0).weights.nbytes + 8
    milliseconds, bytes_read = [], []
    for row in np.random.default_rng(2).permutation(len(dataset))[1:33].tolist():
        start = size * (7 * row % 64)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        before, begin = _read_bytes(), clock()
        if kind == "read":
            dataset.read(row, start, start + size)
        elif kind == "read_tokens":
            dataset.read_tokens([row], start, start + size)
        elif "pread" in kind:
            os.pread(descriptor, 2 * size, int(offsets[row, 0]) + 2 * start)
            if kind == "pread twice":  # the run tables too
                os.pread(descriptor, int(offsets[row, 3] - offsets[row, 1]) + 8, int(offsets[row, 1]))
        else:
            np.memmap(path, np.uint16, "r", int(offsets[row, 0]) + 2 * start, size).copy()
        milliseconds.append(1e3 * (clock() - begin))
        bytes_read.append(_read_bytes() - before)
    wanted = 2 * size + (table if kind in ("read", "pread twice") else 0)
    return {"ms": float(np.median(milliseconds)), "read / wanted": float(np.mean(bytes_read)) / wanted}


def _read_bytes() -> int:
    return int(Path("/proc/self/io").read_text().split("read_bytes: ")[1].split()[0])


def wait_until_idle(patience: float) -> None:
    """Return after a second in which the processors were idle but for a tenth, or after `patience` seconds."""

    def ticks() -> tuple[int, int]:
        counts = [int(count) for count in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
        return sum(counts), counts[3] + counts[4]  # idle, and waiting for a disk

    end = clock() + patience
    while clock() < end:
        before = ticks()
        time.sleep(1)
        all_ticks, idle = (now - then for now, then in zip(ticks(), before, strict=True))
        if idle > 0.9 * all_ticks:
            return


Figures = dict[str, float]
HASHED = "raw and sha256, no fsync"
WRITERS = ("raw", "raw, no fsync", HASHED, "sha256 alone", "shard", "shard, no fsync", "parquet", "webdataset")
CASES: dict[str, list[tuple[Callable[..., Figures], tuple[Any, ...]]]] = {
    "write": [(write, (kind, length)) for length in (SHORT, LONG) for kind in WRITERS],
    "read": [(read, (name,)) for name in ("short", "long", "million")],
    "open": [(first_row, ("million",)), (open_index, ("3200",)), (open_index, ("100000",))],
    "cold": [(cold, (kind,)) for kind in ("pread", "read_tokens", "pread twice", "read", "memmap")],
}


def in_its_own_process(
    folder: Path, megabytes: int, run: Callable[..., Figures], arguments: tuple[Any, ...]
) -> Figures:
    """The case's figures."""
    case = json.dumps([str(folder), megabytes, run.__name__, *arguments])
    done = subprocess.run([sys.executable, __file__, "--case", case], stdout=subprocess.PIPE, check=True)
    figures: Figures = json.loads(done.stdout)
    return figures


def main() -> None:
    """Run the cases in turn and print the best of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=int, default=128)
    parser.add_argument("--patience", type=float, default=5)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        folder, megabytes, name, *rest = json.loads(arguments.case)
        print(json.dumps(globals()[name](Path(folder), megabytes, *rest)))
        return
    (ROOT / "runs").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT / "runs") as temporary:
        folder = Path(temporary)
        in_its_own_process(folder, arguments.megabytes, prepare, ())
        best: dict[str, Figures] = {}
        for _ in range(arguments.rounds):
            for run, case in (case for group in arguments.only for case in CASES[group]):
                wait_until_idle(arguments.patience)
                figures = best.setdefault(f"{run.__name__} {' '.join(map(str, case))}", {})
                for name, value in in_its_own_process(folder, arguments.megabytes, run, case).items():
                    better = max if name not in ("ms", "open ms", "open and a row ms", "read / wanted", "MB") else min
                    figures[name] = better(value, figures.get(name, value))
    for case_name, figures in best.items():
        print(f"{case_name:28}", "  ".join(f"{name} {value:,.4g}" for name, value in figures.items()))
    for length in (SHORT, LONG) if "write" in arguments.only else ():
        rate = {kind: best[f"write {kind} {length}"]["MB/s"] for kind in WRITERS}
        print(f"write {length}: of a raw file, fsync", {k: round(rate[k] / rate["raw"], 2) for k in WRITERS})
        of_raw, limit = (rate[k] / rate["raw, no fsync"] for k in ("shard, no fsync", HASHED))
        print(f"write {length}: no fsync on either side: shard {of_raw:.2f} of raw; raw and sha256 {limit:.2f} of raw")
    for name in ("short", "long", "million") if "read" in arguments.only else ():
        of = best[f"read {name}"]
        print(f"read_tokens {name}: {of['read_tokens'] / of['copy']:.2f} of a copy row by row", end=", ")
        print(f"{of['read_tokens'] / of['gather']:.2f} of a gather")
        print(f"read_batch {name}: {of['read_batch'] / of['fill']:.2f} of a fill")
    if "cold" in arguments.only:
        for kind, limit in (("read_tokens", "pread"), ("memmap", "pread"), ("read", "pread twice")):
            print(f"cold {kind}: {best[f'cold {kind}']['ms'] / best[f'cold {limit}']['ms']:.2f} times {limit}")


if __name__ == "__main__":
    main()
