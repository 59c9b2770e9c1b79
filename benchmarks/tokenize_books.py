"""Tokens a second of a whole build (read, tokenize, pack, write; one worker) beside SentencePiece's own `encode`.

    .venv/bin/python benchmarks/tokenize_books.py [--rounds 5]

Both sides take the demo's novels in turn, in one process, on texts that are already in the file cache; the build
starts from an empty folder each time and fsyncs all it writes. The ratio is of the fastest rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import tempfile
import time
from pathlib import Path

import sentencepiece

from lwm_data.build import build

ROOT = Path(__file__).parents[1]


def encode_alone(texts: list[str]) -> int:
    """Tokens of `texts` by SentencePiece, as Python lists, nothing else done."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(ROOT / "tokenizers" / "demo-text.model"))
    return sum(len(processor.encode(text)) for text in texts)


def build_dataset(folder: Path) -> int:
    """Tokens of a dataset of the same texts, built into `folder`."""
    manifest = folder / "dataset.yaml"
    novels = {"name": "novels", "type": "books", "path": str(ROOT / "manifests/demo/novels/*.txt")}
    described = {"kind": "dataset", "name": "bench", "out": "out", "row_length": 4096, "sources": [novels]}
    manifest.write_text(json.dumps(described | {"text_tokenizer": str(ROOT / "tokenizers/demo-text.yaml")}))
    with contextlib.redirect_stderr(io.StringIO()):
        return build(manifest).info.num_tokens


def main() -> None:
    """Time both sides in turn and print tokens a second and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    texts = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "manifests/demo/novels").glob("*.txt"))]
    best = {"sentencepiece": 0.0, "build": 0.0}
    for _ in range(rounds):
        begin = time.perf_counter()
        num_tokens = encode_alone(texts)
        best["sentencepiece"] = max(best["sentencepiece"], num_tokens / (time.perf_counter() - begin))
        with tempfile.TemporaryDirectory() as folder:
            begin = time.perf_counter()
            num_tokens = build_dataset(Path(folder))
            best["build"] = max(best["build"], num_tokens / (time.perf_counter() - begin))
    for name, rate in best.items():
        print(f"{name:14} {rate / 1e6:6.2f} M tokens/s")
    print(f"ratio          {best['build'] / best['sentencepiece']:6.2f}")


if __name__ == "__main__":
    main()
