"""Pictures from S3, coded to a token store on S3, in rows on S3: the bytes of a build on a disk."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest

from lwm_data.build import build
from tests.s3_server import BUCKET, local_bytes, s3_bytes, to_s3
from tests.tiny_vision import write_tiny_tokenizer

MEDIA = Path(__file__).parents[1] / "lwm_data" / "media"
PHOTOS = {"name": "photos", "type": "images", "path": "photos/*.tar"}


@pytest.mark.usefixtures("s3")
def test_pictures_on_s3_become_the_rows_of_pictures_on_a_disk(project: Callable[..., Path]) -> None:
    keys = {"row_length": 1024, "shard_size": 10**6, "vision_tokenizer": "tiny.yaml", "sources": [PHOTOS]}
    manifest = project(**keys)
    write_tiny_tokenizer(manifest.parent / "tiny.yaml")
    (manifest.parent / "photos").mkdir()
    for name in ("00000.tar", "00000.parquet"):
        shutil.copy(MEDIA / name, manifest.parent / "photos")
    to_s3(manifest.parent / "photos", f"{BUCKET}/in/photos")
    here = build(manifest)
    at_s3 = [f"out={BUCKET}/run/out", f"sources.0.path={BUCKET}/in/photos/*.tar"]
    build(manifest, at_s3)
    wanted, got = local_bytes(here.out), s3_bytes(f"{BUCKET}/run/out")
    infos = [json.loads(files.pop("index.json")) for files in (wanted, got)]
    assert got == wanted and infos[0]["shards"] == infos[1]["shards"]
    store = local_bytes(here.out.parent / "token-store")
    assert s3_bytes(f"{BUCKET}/run/token-store") == store and any(name.startswith("codes-") for name in store)

    fs = fsspec.filesystem("s3")
    for name in store:
        if not name.startswith("codes-"):  # as after another text tokenizer: codes are taken from the store
            fs.rm_file(f"{BUCKET}/run/token-store/{name}")
    build(manifest, [*at_s3, "row_length=2048"])
    assert s3_bytes(f"{BUCKET}/run/token-store") == store
