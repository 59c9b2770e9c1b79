"""Pictures of a unit to codes: results in the items' order, with few items between reading and result."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lwm_data import encode
from lwm_data.code_store import Coded, CodeFile, write_codes
from lwm_data.encode import encode_items
from lwm_data.manifest_sources import Images
from lwm_data.sources.media import MediaItem
from lwm_data.sources.record import Rejection
from lwm_data.vision.decode_pool import DecodePool
from lwm_data.vision.vqgan import load_vision_tokenizer
from tests.tiny_vision import gradients, write_tiny_tokenizer

SOURCE = Images(name="photos", type="images", path="photos/*.tar")


def _png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def test_filtered_rows_do_not_pile_up_behind_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that waits for a full batch, too. Order, codes and rejections are those of the items one by one."""
    monkeypatch.setattr(encode, "STRETCH", 40)
    write_tiny_tokenizer(tmp_path / "tiny.yaml")
    tokenizer = load_vision_tokenizer(tmp_path / "tiny.yaml")
    pixels = gradients(4)
    write_codes(tmp_path / "known.arrow", [Coded("7", "known", np.full((1, 256), 7, np.uint16))])
    pictures = {0: pixels[0], 119: pixels[1], 120: pixels[2], 300: pixels[3]}
    num_read = 0

    def items() -> Iterator[MediaItem | Rejection]:
        nonlocal num_read
        for number in range(400):
            num_read += 1
            if number in pictures:
                yield MediaItem(str(number), _png(pictures[number]), f"caption {number}")
            elif number in (7, 41):
                yield MediaItem("7", b"not read", "again")
            elif number == 350:
                yield MediaItem(str(number), b"not a picture", "")
            else:
                yield Rejection(str(number), "filtered: where", "")

    results: list[Coded | Rejection] = []
    with DecodePool(1) as pool:
        for result in encode_items(SOURCE, items(), pool, tokenizer, [CodeFile(tmp_path / "known.arrow")]):
            assert num_read - len(results) <= 40
            results.append(result)
    assert [result.key for result in results] == ["7" if n == 41 else str(n) for n in range(400)]
    coded = {result.key: result for result in results if isinstance(result, Coded)}
    assert {key: result.caption for key, result in coded.items()} == {
        "7": "again",
        **{str(number): f"caption {number}" for number in pictures},
    }
    assert coded["7"].codes.tolist() == [[7] * 256]
    wanted = tokenizer.encode(pixels)
    for row, number in enumerate(pictures):
        np.testing.assert_array_equal(coded[str(number)].codes[0], wanted[row])
    reasons = {n: r.reason for n, r in enumerate(results) if isinstance(r, Rejection) and "filtered" not in r.reason}
    assert reasons == {41: "duplicate key", 350: "not an image"}


def test_no_items_give_no_results(tmp_path: Path) -> None:
    write_tiny_tokenizer(tmp_path / "tiny.yaml")
    with DecodePool(1) as pool:
        assert list(encode_items(SOURCE, [], pool, load_vision_tokenizer(tmp_path / "tiny.yaml"), [])) == []
