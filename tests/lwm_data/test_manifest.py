"""What a person can write in a dataset's manifest, and what they are told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lwm_data.build import describe
from lwm_data.manifest import DatasetManifest, read_dataset_manifest

DEMO = Path(__file__).parents[2] / "manifests" / "demo"
BOOKS = {"name": "b", "type": "books", "path": "books/*.txt"}
NEEDLES = {"name": "n", "type": "needles", "count": 1, "haystack": "books/*.txt", "tokens": 250}
LINES = {"name": "l", "type": "lwm_jsonl", "path": "x.jsonl"}
PHOTOS = {"name": "p", "type": "images", "path": "*.tar"}


@pytest.mark.parametrize("name", ["dataset", "short", "medium", "heldout"])
def test_the_demo_s_manifests_are_valid(name: str) -> None:
    manifest = read_dataset_manifest(DEMO / f"{name}.yaml")
    assert manifest.packing == "masked" and Path(manifest.text_tokenizer).is_file()


@pytest.mark.parametrize(("text", "wanted"), [("256MB", 256_000_000), ("1.5 GB", 1_500_000_000), (4096, 4096)])
def test_shard_sizes_can_be_written_with_a_unit(project: Callable[..., Path], text: Any, wanted: int) -> None:
    assert read_dataset_manifest(project(shard_size=text)).shard_size == wanted


def test_a_number_in_quotes_is_text_and_one_without_is_none(project: Callable[..., Path]) -> None:
    assert read_dataset_manifest(project(name="2024"), ["name='3e-4'"]).name == "3e-4"
    assert read_dataset_manifest(project(), ["max_rejected=1e-1"]).max_rejected == 0.1


def test_a_number_stands_for_a_range_of_one(project: Callable[..., Path]) -> None:
    needles = {"name": "n", "type": "needles", "count": 1, "haystack": "books/*.txt", "tokens": 100}
    (source,) = read_dataset_manifest(project(sources=[needles])).sources
    assert source.type == "needles" and (source.tokens.min, source.tokens.max) == (100, 100)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"row_lenght": 5}, r"dataset.yaml:1: row_lenght: unknown key;.*did you mean `row_length`"),
        ({"row_length": "long"}, r"row_length: got 'long'; wanted a valid integer"),
        ({"row_length": 1}, r"row_length: got 1; wanted greater than or equal to 2"),
        ({"packing": "mask"}, r"packing: got 'mask'; wanted 'masked' or 'naive'"),
        ({"shard_size": "256 megs"}, r"shard_size: got '256 megs'; wanted"),
        ({"sources": []}, r"sources: got \[\]; wanted"),
        ({"sources": [BOOKS, BOOKS]}, r"sources of different names \(two are called b\)"),
        ({"sources": [BOOKS | {"type": "boks"}]}, r"sources.0: got .*; wanted .*'books', 'text', 'chats'"),
        ({"sources": [BOOKS | {"overflo": "drop"}]}, r"sources.0.overflo: unknown key;.*did you mean `overflow`"),
        (
            {"sources": [BOOKS, PHOTOS | {"split": {"heldout": 0.1, "take": "train"}}]},
            r"^\S+: sources.1.split: unknown key; wanted one of: name, share, [^\n]*, min_size, [^\n]*overflow$",
        ),
        ({"sources": [BOOKS | {"overflow": "cut"}]}, r"sources.0.overflow: got 'cut'; wanted 'split', 'truncate'"),
        ({"sources": [BOOKS | {"tokens": {"mini": 3}}]}, r"sources.0.tokens.mini: unknown key;.*`min`"),
        (
            {"sources": [NEEDLES | {"needles": 100}]},
            r"sources.0.*wanted needles.max <= \d+, a city for each fact \(got 100\)",
        ),
        (
            {"sources": [BOOKS | {"share": 1}, BOOKS | {"name": "c"}]},
            r"manifest: wanted a share for every source, or for none \(none for c\)",
        ),
        ({"sources": [BOOKS | {"pack_with": "none"}], "packing": "naive"}, r"wanted pack_with: none only under"),
        ({"sources": [LINES]}, r"sources.0: wanted one of fields and fields_from_example"),
        ({"sources": [PHOTOS]}, r"wanted vision_tokenizer: tokenizers/\*.yaml, for the source p"),
        ({"sources": [PHOTOS | {"where": "width >"}]}, r"sources.0.where: got 'width >'; wanted .*a condition like"),
        ({"shard_size": "1.5.2MB"}, r"shard_size: got '1.5.2MB'; wanted"),
        ({"kind": "data"}, r"kind: got 'data'; wanted dataset"),
    ],
)
def test_a_wrong_key_is_told_with_got_and_wanted(project: Callable[..., Path], keys: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_dataset_manifest(project(**keys))


def test_set_overrides_keys_also_of_sources(project: Callable[..., Path]) -> None:
    manifest = read_dataset_manifest(project(), ["row_length=64", "sources.1.overflow=truncate", "out=elsewhere"])
    assert manifest.row_length == 64 and manifest.sources[1].overflow == "truncate"
    assert manifest.out.endswith("project/elsewhere")


def test_what_the_index_keeps_of_a_manifest_has_no_path_of_this_machine(project: Callable[..., Path]) -> None:
    path = project()
    described = describe(read_dataset_manifest(path), path.parent)
    assert str(path.parent) not in json.dumps(described)
    assert described["sources"][0]["path"] == "books/*.txt" and "out" not in described


def test_the_schema_names_every_key() -> None:
    schema = DatasetManifest.model_json_schema()
    assert {"row_length", "packing", "sources", "shard_size"} <= set(schema["properties"])
    assert {"Books", "Chats", "Needles"} <= set(schema["$defs"])
