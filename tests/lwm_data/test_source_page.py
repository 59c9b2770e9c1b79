"""The sources that docs/build.md shows are built as they stand there, and its table has every key."""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
import zstandard

from lwm_data.build import build
from lwm_data.manifest_sources import Books, Chats, Text, Tokens

PAGE = (Path(__file__).parents[2] / "docs" / "build.md").read_text(encoding="utf-8")
TABLE = PAGE[PAGE.index("## Texts, chats and tokens") :]


def _sources(containing: str) -> list[dict[str, Any]]:
    blocks = re.findall(r"^```yaml\n(.*?)^```$", TABLE, flags=re.MULTILINE | re.DOTALL)
    (block,) = [of for of in blocks if containing in of]
    sources: list[dict[str, Any]] = yaml.safe_load(block)["sources"]
    return sources


def _tar(name: str, data: bytes) -> bytes:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as tar:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    return raw.getvalue()


def _write_input(folder: Path) -> None:
    for name in ("novels", "web", "notes", "pages", "talk", "ready", "tuned"):
        (folder / name).mkdir()
    (folder / "novels" / "a.txt").write_text("A story without any mark.")
    web = [json.dumps({"url": f"u{i}", "content": f"This is page number {i}."}) for i in range(3)]
    (folder / "web" / "a.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress("\n".join(web).encode()))
    (folder / "notes" / "a.txt").write_text("one\n\ntwo\n")
    (folder / "pages" / "0.tar").write_bytes(_tar("7.txt", b"A page of a tar."))
    datasets.Dataset.from_dict({"text": ["A saved text."]}).save_to_disk(str(folder / "saved"))
    chat = {"conversations": [{"from": "human", "value": "Hello!"}, {"from": "gpt", "value": "Good day."}]}
    (folder / "talk" / "a.json").write_text(json.dumps([chat, {"data": ["Hello!", "Good day."]}]))
    np.save(folder / "ready" / "a.npy", np.array([1, 5, 6, 2, 7, 8, 2], np.uint16))
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}]
    pq.write_table(pa.Table.from_pylist(rows), folder / "tuned" / "a.parquet")


def test_the_page_s_sources_are_built(project: Callable[..., Path]) -> None:
    manifest = project(sources=_sources("name: tuned"))
    _write_input(manifest.parent)
    sources = build(manifest).info.sources
    kept = {"novels": 1, "web": 3, "notes": 2, "pages": 1, "saved": 1, "talk": 2, "ready": 2, "tuned": 1}
    assert {name: of.kept for name, of in sources.items()} == kept
    assert sources["novels"].reasons == {"no Gutenberg mark": 1}
    assert sources["tuned"].tokens == 5 and sources["tuned"].trained_tokens == 3


def test_the_page_s_two_manifests_share_no_document(project: Callable[..., Path]) -> None:
    keys: list[set[str]] = []
    for name in ("train", "heldout"):
        manifest = project(name, sources=_sources(f"# {name}.yaml"))
        (manifest.parent / "web").mkdir()
        (manifest.parent / "web" / "a.jsonl").write_text('{"text": "A page."}\n' * 100)
        out = build(manifest).out
        tables = [pq.read_table(path, columns=["key"]) for path in out.glob("*.examples.parquet")]
        keys.append({key for table in tables for key in table["key"].to_pylist()})
    assert not keys[0] & keys[1] and len(keys[0] | keys[1]) == 100 and keys[1]


def test_the_page_names_every_key_of_these_sources() -> None:
    for model in (Books, Text, Chats, Tokens):
        own = model.model_fields.keys() - {"name", "type", "path", "share", "pack_with", "overflow"}
        for key in own - {"deduplicate", "decontaminate"} - ({"trained"} if model is Books else set()):
            assert f"`{key}`" in TABLE, f"{model.__name__}.{key}"
