"""Marks of texts (near and exact duplicates, evaluation text) beside plain datasketch, and the plan that follows.

    novels    the demo's ten novels, whole
    pages     the same words in texts of 400, as short documents are

Plain datasketch is what its manual shows: the same 5-word sequences as bytes, hashed by its own function, one MinHash
of 128 permutations for each text. datatrove takes part where it is installed, with spacy. All start from the token
store. One core, in turn, the least CPU time of `--rounds`: a busy machine stretches the clock, and not each side alike.
Ratios are to ours.

    plan      a million signatures, of which a tenth are near duplicates: seconds and bytes for each
"""

from __future__ import annotations

import argparse
import importlib
import re
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasketch import MinHash

from lwm_data.duplicates import find_duplicates
from lwm_data.evaluation_texts import cleanings_of, find_evaluation_files, read_evaluation_texts
from lwm_data.folder import DiskFolder
from lwm_data.format.example import text_runs
from lwm_data.format.vocab import TextTokenizer, load_text_tokenizer
from lwm_data.manifest import Contamination
from lwm_data.sources.record import Record
from lwm_data.text_marks import PERMUTATIONS, SCHEMA, SHINGLE, Marking, MarkUnit, mark_unit
from lwm_data.token_store import StoreFile, write_store

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "manifests" / "demo"
PAGE = 400  # words
WORD = re.compile(r"[^\W_]+")


def ours(folder: Path, tokenizer: TextTokenizer, near: bool, evaluation: bool) -> Callable[[str], None]:
    rule = Contamination(texts=(str(DEMO / "heldout" / "*.txt"),))
    texts = read_evaluation_texts(rule, find_evaluation_files(rule), tokenizer, cleanings_of([]))
    shared = Marking(DiskFolder(folder), tokenizer, texts)
    return lambda name: void(mark_unit(shared, MarkUnit(name, "marks.arrow", near, evaluation)))


def void(_: object) -> None:
    pass


def plain(folder: Path, tokenizer: TextTokenizer) -> Callable[[str], None]:
    def run(name: str) -> None:
        store = StoreFile(folder / name)
        for i in range(len(store)):
            words = WORD.findall(tokenizer.decode(store.record(i).runs[1].tokens).lower())
            sketch = MinHash(num_perm=PERMUTATIONS)
            sketch.update_batch(
                [" ".join(words[at : at + SHINGLE]).encode() for at in range(max(1, len(words) - SHINGLE + 1))]
            )

    return run


def datatrove(folder: Path, tokenizer: TextTokenizer) -> Callable[[str], None] | None:
    """datatrove's signature stage as it computes it, without reading and writing; 14 buckets of 9 hashes, as ours."""
    try:
        minhash = importlib.import_module("datatrove.pipeline.dedup.minhash")
        stage = minhash.MinhashDedupSignature(
            str(folder), config=minhash.MinhashConfig(n_grams=SHINGLE, num_buckets=14, hashes_per_bucket=9)
        )
        digest = importlib.import_module("xxhash").xxh64_intdigest
        stage._hash_func = lambda text: digest(text.encode())  # its own gives text, which xxhash 4 refuses
        stage.get_signature(stage.get_shingles("It was the best of times, it was the worst of times"))
    except (ImportError, OSError):
        return None

    def run(name: str) -> None:
        store = StoreFile(folder / name)
        for i in range(len(store)):
            stage.get_signature(stage.get_shingles(tokenizer.decode(store.record(i).runs[1].tokens)))

    return run


def write(path: Path, tokenizer: TextTokenizer, texts: list[str]) -> None:
    runs = (text_runs(tokenizer, [(tokenizer.encode(text), True)], eos=True) for text in texts)
    write_store(path, (Record(str(i), of) for i, of in enumerate(runs)))


def compare(folder: Path, tokenizer: TextTokenizer, rounds: int) -> None:
    novels = [path.read_text(encoding="utf-8") for path in sorted((DEMO / "novels").glob("*.txt"))]
    words = [word for novel in novels for word in novel.split()]
    pages = [" ".join(words[at : at + PAGE]) for at in range(0, len(words), PAGE)]
    num_bytes = sum(len(text.encode()) for text in novels)
    runs = {
        "ours: near, exact, evaluation": ours(folder, tokenizer, True, True),
        "ours: near, exact": ours(folder, tokenizer, True, False),
        "ours: exact": ours(folder, tokenizer, False, False),
        "datasketch, plain": plain(folder, tokenizer),
    }
    if peer := datatrove(folder, tokenizer):
        runs["datatrove, signatures"] = peer
    for name, texts in (("novels", novels), ("pages", pages)):
        write(folder / name, tokenizer, texts)
        seconds = dict.fromkeys(runs, np.inf)
        for _ in range(rounds):
            for what, run in runs.items():
                start = time.process_time()
                run(name)
                seconds[what] = min(seconds[what], time.process_time() - start)
        reference = seconds["ours: near, exact"]
        print(f"{name}: {len(texts):,} texts, {num_bytes / 1e6:.1f} MB")
        for what, took in seconds.items():
            print(
                f"  {what:30} {num_bytes / 1e6 / took:7.2f} MB/s {len(texts) / took:10,.0f} texts/s "
                f"{took / reference:6.2f} of our time"
            )


def plan(folder: Path, num_records: int) -> None:
    """Signatures of unlike texts, and of near duplicates: each a tenth of its minima drawn anew."""
    rng = np.random.default_rng(0)
    per_file = 10_000
    names = []
    for number in range(num_records // per_file):
        signatures = rng.integers(0, 1 << 32, (per_file, PERMUTATIONS), np.uint32)
        tenth = per_file // 10
        signatures[-tenth:] = signatures[:tenth]
        drawn = rng.random((tenth, PERMUTATIONS)) < 0.1
        signatures[-tenth:][drawn] = rng.integers(0, 1 << 32, int(drawn.sum()), np.uint32)
        contents = rng.bytes(16 * per_file)
        arrays = [
            pa.array([contents[i * 16 : i * 16 + 16] for i in range(per_file)], pa.binary(16)),
            pa.array([row.tobytes() for row in signatures], pa.binary(4 * PERMUTATIONS)),
            pa.array(np.zeros(per_file, np.uint32)),
            *(pa.array([None] * per_file, pa.string()) for _ in range(2)),
        ]
        names.append(f"marks-{number}")
        with pa.ipc.new_file(folder / names[-1], SCHEMA) as writer:
            writer.write_batch(pa.record_batch(arrays, schema=SCHEMA))
    taken = [np.ones(per_file, np.bool_) for _ in names]
    start = time.process_time()
    found = find_duplicates(DiskFolder(folder), names, taken, True, 0.8)
    seconds = time.process_time() - start
    tracemalloc.start()
    find_duplicates(DiskFolder(folder), names, taken, True, 0.8)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    on_disk = sum((folder / name).stat().st_size for name in names)
    print(
        f"plan: {num_records:,} records, {len(found.records):,} found of {num_records // 10:,}: {seconds:.1f} s, "
        f"{peak / num_records:.0f} bytes of memory and {on_disk / num_records:.0f} on disk for each"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--records", type=int, default=1_000_000, help="signatures in the plan")
    options = parser.parse_args()
    tokenizer = load_text_tokenizer(ROOT / "tokenizers" / "demo-text.yaml")
    with tempfile.TemporaryDirectory() as folder:
        compare(Path(folder), tokenizer, options.rounds)
        plan(Path(folder), options.records)


if __name__ == "__main__":
    main()
