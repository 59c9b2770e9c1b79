"""Whole books to tokens: SentencePiece's `encode`, ours, our whole build and datatrove's, with one tokenizer, in turn.

    .venv/bin/python benchmarks/tokenize_books.py [--books 'GLOB' ...] [--tokenizer SPEC] [--rounds 5] [--copies 200]

datatrove takes part where it is importable (`PYTHONPATH` may name the folder of an environment of its own). Texts are
in the file cache. Ours begins each round with an empty table; `again` is the same tokenizer on the same books. The
build reads, tokenizes, packs, writes, and fsyncs all that it writes; datatrove reads, tokenizes and writes. A core's
rate is tokens by seconds of processor time, all threads counted; the best of the rounds. Ids are compared, each round.

The last part builds `--copies` times the books, each copy turned to begin elsewhere, with 1 and 2 workers; its seconds
are those of the clock, so that it wants a machine with two idle cores: the load is printed. 200 copies of the demo's
books are 1 GB and take minutes; with few, what counts is how long the workers take to import all they need.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
import sentencepiece

from lwm_data.build import build
from lwm_data.format.dataset import DatasetInfo
from lwm_data.format.vocab import TextTokenizer, load_text_tokenizer

ROOT = Path(__file__).parents[1]
BOOKS = [str(ROOT / "manifests" / "demo" / folder / "*.txt") for folder in ("novels", "heldout")]


def build_dataset(folder: Path, books: Path, spec: Path, workers: int = 1) -> DatasetInfo:
    """The index of a dataset of all files in `books`, built into the empty `folder`."""
    source = {"name": "books", "type": "books", "path": str(books / "*.txt")}
    described = {"kind": "dataset", "name": "bench", "out": "out", "row_length": 4096, "sources": [source]}
    # Shards of 16 MB, so that the copies fill enough of them for two workers.
    described |= {"text_tokenizer": str(spec), "shard_size": "16MB"}
    (folder / "dataset.yaml").write_text(json.dumps(described))
    with contextlib.redirect_stderr(io.StringIO()):
        return build(folder / "dataset.yaml", workers=workers).info


def tokenizer_json(model_bytes: bytes, path: Path) -> None:
    """Write the SentencePiece model as Hugging Face's `tokenizer.json`, which datatrove reads."""
    from sentencepiece import sentencepiece_model_pb2 as model_format
    from transformers.convert_slow_tokenizer import SpmConverter

    model = model_format.ModelProto.FromString(model_bytes)
    vocab = {piece.piece: i for i, piece in enumerate(model.pieces)}
    SpmConverter.build_tokenizer_from_spm_proto(model, vocab).save(str(path))


def datatrove_tokens(folder: Path, books: Path, tokenizer: Path) -> int:
    """Tokens that datatrove's DocumentTokenizer writes to `folder`, of all files in `books`."""
    from datatrove.data import Document
    from datatrove.pipeline.tokens import DocumentTokenizer

    def documents() -> Iterator[Any]:
        for path in sorted(books.iterdir()):
            yield Document(path.read_text(encoding="utf-8"), path.name)

    step = DocumentTokenizer(str(folder), str(tokenizer), save_filename="books", shuffle_documents=False)
    for _ in step.run(documents(), 0, 1) or ():
        pass
    return sum(path.stat().st_size for path in folder.rglob("*.ds")) // (2 if step.token_size == 2 else 4)


def main() -> None:
    """Time all sides in turn and print their rates and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--books", nargs="+", default=BOOKS, help="globs of UTF-8 texts")
    parser.add_argument("--tokenizer", type=Path, default=ROOT / "tokenizers" / "demo-text.yaml")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--copies", type=int, default=200, help="0: leave the two workers out")
    args = parser.parse_args()
    spec = args.tokenizer.absolute()
    tokenizer = load_text_tokenizer(spec)
    paths = [path for pattern in args.books for path in sorted(Path("/").glob(str(Path(pattern).absolute())[1:]))]
    texts = [path.read_text(encoding="utf-8") for path in paths]
    print(f"{len(texts)} books, {sum(len(text.encode()) for text in texts) / 1e6:.1f} MB, {tokenizer.name}")
    with tempfile.TemporaryDirectory() as folder:
        books = Path(folder) / "books"
        write_books(books, texts)
        one_core(args.rounds, texts, books, spec, tokenizer)
        if args.copies:
            turned = Path(folder) / "copies"
            write_books(turned, [text[at:] + text[:at] for text in texts for at in cuts(text, args.copies)])
            two_cores(turned, spec)


def write_books(folder: Path, texts: list[str]) -> None:
    folder.mkdir()
    for i, text in enumerate(texts):
        (folder / f"{i:06d}.txt").write_text(text, encoding="utf-8")


def cuts(text: str, count: int) -> list[int]:
    return [len(text) * i // count for i in range(count)]


def one_core(rounds: int, texts: list[str], books: Path, spec: Path, tokenizer: TextTokenizer) -> None:
    """The table of rates by processor time."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model_bytes)
    has_datatrove = importlib.util.find_spec("datatrove") is not None
    if not has_datatrove:
        print("datatrove is not importable here: its row is left out")
    best: dict[str, tuple[float, float]] = {}

    def timed(name: str, call: Callable[..., Any], *arguments: Any) -> Any:
        clock, processor_time = time.perf_counter(), time.process_time()
        result = call(*arguments)
        seconds = (time.process_time() - processor_time, time.perf_counter() - clock)
        before = best.get(name, seconds)
        best[name] = (min(before[0], seconds[0]), min(before[1], seconds[1]))
        return result

    def each(encode: Callable[[str], Any]) -> list[Any]:
        return [encode(text) for text in texts]

    for _ in range(rounds):
        fresh = load_text_tokenizer(spec)
        wanted = timed("SentencePieceProcessor.encode", each, processor.encode)
        num_tokens = sum(map(len, wanted))
        for name in ("ours", "ours, again"):
            got = timed(name, each, fresh.encode)
            assert all(np.array_equal(a, b) for a, b in zip(got, wanted, strict=True)), "ids differ"
        with tempfile.TemporaryDirectory() as out:
            info = timed("whole build", build_dataset, Path(out), books, spec)
            assert info.num_tokens >= num_tokens
        if has_datatrove:
            with tempfile.TemporaryDirectory() as out:
                tokenizer_json(tokenizer.model_bytes, Path(out) / "tokenizer.json")
                count = timed("datatrove", datatrove_tokens, Path(out) / "out", books, Path(out) / "tokenizer.json")
                assert count == num_tokens, f"datatrove: {count:,} tokens, SentencePiece: {num_tokens:,}"
    base, peer = (best.get(name, (0.0, 0.0)) for name in ("SentencePieceProcessor.encode", "datatrove"))
    print(f"{'':32}{'M tokens/s of a core':>21}{'of SentencePiece':>18}{'of datatrove':>14}{'by the clock':>14}")
    for name, (seconds, clock) in best.items():
        of_peer = f"{peer[0] / seconds:14.2f}" if has_datatrove else f"{'-':>14}"
        rate = num_tokens / seconds / 1e6
        print(f"{name:32}{rate:21.2f}{base[0] / seconds:18.2f}{of_peer}{num_tokens / clock / 1e6:14.2f}")


def two_cores(books: Path, spec: Path) -> None:
    """Seconds by the clock of the same build with 1 and 2 workers, twice each in turn."""
    seconds = {1: float("inf"), 2: float("inf")}
    num_tokens = 0
    for workers in (1, 2, 1, 2):
        with tempfile.TemporaryDirectory() as out:
            begin = time.perf_counter()
            num_tokens = build_dataset(Path(out), books, spec, workers).num_tokens
            seconds[workers] = min(seconds[workers], time.perf_counter() - begin)
    print(f"{len(list(books.iterdir()))} turned copies, {num_tokens / 1e6:.0f} M tokens; load {os.getloadavg()[0]:.1f}")
    for workers, taken in seconds.items():
        rate = num_tokens / taken / 1e6
        print(f"{workers} workers: {taken:.2f} s, {rate:.2f} M tokens/s, {seconds[1] / taken:.2f} times one")


if __name__ == "__main__":
    main()
