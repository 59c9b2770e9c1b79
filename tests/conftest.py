"""Settings that must stand before any import, and the small real things that tests share."""

from __future__ import annotations

import os

os.environ["JAX_PLATFORMS"] = "cpu"
# Most of the time of small models goes into compiling. LLVM's lowest level will do.
os.environ["XLA_FLAGS"] = " ".join(
    (os.environ.get("XLA_FLAGS", ""), "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=8")
).strip()
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest

from lwm_data.format.dataset import FORMAT_VERSION, Dataset, DatasetInfo, SourceCounts, open_dataset, write_index
from lwm_data.format.shard import rows_per_page
from lwm_data.format.vocab import TextTokenizer, load_text_tokenizer

# What was compiled is kept as long as this process lives, each worker's apart: jax does not write it atomically.
compiled = tempfile.TemporaryDirectory(prefix="lwm-compiled-")
os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled.name  # jax is not imported yet

hypothesis.settings.register_profile("lwm", derandomize=True, max_examples=25, deadline=None, database=None)
hypothesis.settings.load_profile("lwm")

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "manifests" / "demo"


@pytest.fixture(scope="session")
def demo_tokenizer() -> TextTokenizer:
    return load_text_tokenizer(ROOT / "tokenizers" / "demo-text.yaml")


@pytest.fixture(scope="session")
def corpus_text() -> str:
    """40,000 characters of a real novel."""
    return (DEMO / "novels" / "alice_in_wonderland.txt").read_text(encoding="utf-8")[:40_000]


@pytest.fixture
def project(tmp_path: Path, corpus_text: str) -> Callable[..., Path]:
    """project(key=value, ...) writes a small real manifest with its input to a folder of its own and returns it.

    Keys override those of the manifest; `sources` too. The manifest is `dataset.yaml`, its out `out`.
    """

    def make(name: str = "project", **keys: Any) -> Path:
        folder = tmp_path / name
        (folder / "books").mkdir(parents=True, exist_ok=True)
        for i in range(4):
            (folder / "books" / f"book{i}.txt").write_text(corpus_text[i * 9000 : i * 9000 + 9000], encoding="utf-8")
        chats = [
            {"id": f"chat-{i}", "data": [f"What is {i} and {i}?", f"It is {2 * i}.", "Thanks!", "Not at all."]}
            for i in range(30)
        ]
        (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats), encoding="utf-8")
        shutil.copy(ROOT / "tokenizers" / "demo-text.yaml", folder)
        shutil.copy(ROOT / "tokenizers" / "demo-text.model", folder)
        manifest: dict[str, Any] = {
            "kind": "dataset",
            "name": "small",
            "out": "out",
            "text_tokenizer": "demo-text.yaml",
            "row_length": 256,
            "shard_size": 8192,
            "sources": [
                {"name": "books", "type": "books", "path": "books/*.txt"},
                {"name": "chats", "type": "chats", "path": "chats.jsonl"},
                {
                    "name": "needles",
                    "type": "needles",
                    "count": 40,
                    "haystack": "books/*.txt",
                    "tokens": {"min": 150, "max": 250},
                },
            ],
        } | keys
        (folder / "dataset.yaml").write_text(json.dumps(manifest), encoding="utf-8")  # JSON is YAML
        return folder / "dataset.yaml"

    return make


@pytest.fixture(scope="session")
def dataset_of(demo_tokenizer: TextTokenizer) -> Callable[..., Dataset]:
    """dataset_of(folder, records, row_length=..., ...) packs records, by the build's own parts, and opens them."""
    from lwm_data.folder import DiskFolder
    from lwm_data.pack import best_fit, concatenate_and_cut
    from lwm_data.shard_rows import RowFormat, ShardRows, StoreRef, write_shard_rows
    from lwm_data.sources.record import Record
    from lwm_data.token_store import StoreFile, write_store

    def make(
        folder: Path,
        records: Sequence[Record],
        row_length: int,
        packing: Any = "masked",
        weighting: Any = "example",
        rows_per_shard: int = 3,
    ) -> Dataset:
        out = folder / "out"
        (out / ".work").mkdir(parents=True)
        write_store(folder / "store.arrow", records)
        lengths = StoreFile(folder / "store.arrow").lengths()
        if packing == "masked":
            rows = [[(i, 0, int(lengths[i])) for i in row] for row in best_fit(lengths, row_length)]
        else:
            rows = list(concatenate_and_cut(lengths, row_length))
        store = StoreRef("store.arrow", "made", "error")
        form = RowFormat(DiskFolder(out), DiskFolder(folder), (store,), row_length, "uint16", packing, weighting)
        shards = []
        for number, at in enumerate(range(0, len(rows), rows_per_shard)):
            held = rows[at : at + rows_per_shard]
            cuts = np.array([(0, record, 0, start, stop) for row in held for record, start, stop in row], np.int64)
            starts = np.cumsum([0, *map(len, held)])
            shards.append(write_shard_rows(form, ShardRows(f"shard-{number:06d}.tar", cuts, starts)))
        counts = [shard.sources["made"] for shard in shards]
        fields = ("examples", "tokens", "vision_tokens", "trained_tokens")
        demo_tokenizer.save(out)
        write_index(
            out,
            DatasetInfo(
                format_version=FORMAT_VERSION,
                name="made",
                row_length=row_length,
                rows_per_page=rows_per_page(row_length, np.dtype(np.uint16)),
                dtype="uint16",
                packing=packing,
                loss_weighting=weighting,
                num_rows=len(rows),
                num_tokens=sum(shard.num_tokens for shard in shards),
                num_trained=sum(shard.num_trained for shard in shards),
                text_vocab_size=demo_tokenizer.vocab_size,
                tokenizer_fingerprint=demo_tokenizer.fingerprint,
                build_fingerprint="made",
                sources={"made": SourceCounts(**{field: sum(getattr(c, field) for c in counts) for field in fields})},
                rejected={},
                manifest={},
                shards=tuple(shard.shard for shard in shards),
            ),
        )
        return open_dataset(out)

    return make
