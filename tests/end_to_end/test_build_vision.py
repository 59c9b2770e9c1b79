"""Pictures and videos to rows: the right codes in the right place, computed once, whatever is broken beside them."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from lwm_data.build import BuildResult, build
from lwm_data.check import check_dataset
from lwm_data.encode import Encoding, encode_unit
from lwm_data.format.dataset import Dataset, open_dataset
from lwm_data.format.vocab import EOV
from lwm_data.manifest_sources import Images
from lwm_data.sources.unit import Unit
from lwm_data.vision.dataset_tokenizer import dataset_vision_tokenizer
from lwm_data.vision.frames import decode_image, decode_video
from lwm_data.vision.vqgan import VisionTokenizer, load_vision_tokenizer
from tests.tiny_vision import write_tiny_tokenizer

MEDIA = Path(__file__).parents[1] / "lwm_data" / "media"
CLIPS = Path(__file__).parents[2] / "manifests" / "demo" / "clips" / "00000.tar"
PHOTOS = {"name": "photos", "type": "images", "path": "photos/*.tar"}


def _clip(key: str) -> bytes:
    with tarfile.open(CLIPS) as tar:
        file = tar.extractfile(f"{key}.mp4")
        assert file is not None
        return file.read()


def _members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        found = ((member.name, tar.extractfile(member)) for member in tar)
        return {name: file.read() for name, file in found if file is not None}


@pytest.fixture
def vision(project: Callable[..., Path]) -> Callable[..., Path]:
    """vision(sources, key=value, ...) is a manifest with a tiny vision tokenizer and three photographs beside it."""

    def make(sources: list[dict[str, Any]], **keys: Any) -> Path:
        keys = {"row_length": 1024, "shard_size": 10**6, "vision_tokenizer": "tiny.yaml"} | keys
        manifest = project(sources=sources, **keys)
        if not (manifest.parent / "tiny.yaml").exists():
            write_tiny_tokenizer(manifest.parent / "tiny.yaml")
            (manifest.parent / "photos").mkdir()
            for name in ("00000.tar", "00000.parquet"):
                shutil.copy(MEDIA / name, manifest.parent / "photos")
        return manifest

    return make


def _blocks(dataset: Dataset) -> Iterator[tuple[str, np.ndarray]]:
    """Key and codes [frames, 256] of each example's vision block."""
    table = pq.read_table(Path(dataset.url) / "shard-000000.examples.parquet").to_pylist()
    for line in table:
        row = dataset[line["row"]]
        inside = (row["segment_ids"] == line["segment"]) & row["vision_mask"]
        if inside.any():
            tokens = row["tokens"][inside].reshape(-1, 257)
            assert tokens[-1, -1] == EOV
            yield line["key"], tokens[:, :-1]


def _rejected(result: BuildResult) -> Counter[str]:
    lines = (result.out / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
    return Counter(json.loads(line)["reason"] for line in lines)


def test_a_row_holds_the_codes_of_its_pictures_and_the_words_of_their_captions(vision: Callable[..., Path]) -> None:
    manifest = vision([PHOTOS])
    result = build(manifest)
    dataset = open_dataset(result.out)
    assert check_dataset(dataset, lambda _: None) == []
    tokenizer = dataset_vision_tokenizer(dataset)
    assert tokenizer is not None
    members = _members(MEDIA / "00000.tar")
    pictures = {name.removesuffix(".jpg"): data for name, data in members.items() if name.endswith(".jpg")}
    blocks = dict(_blocks(dataset))
    assert len(blocks) == len(pictures) == 3
    for key, codes in blocks.items():
        wanted = tokenizer.encode(decode_image(pictures[key.rpartition("/")[2]])[None])
        np.testing.assert_array_equal(codes, wanted)
    text = "".join(dataset.text_tokenizer.decode(dataset[i]["tokens"][~dataset[i]["vision_mask"]]) for i in range(1))
    for name, data in members.items():
        if name.endswith(".txt"):
            assert data.decode().split()[0] in text


def test_a_video_is_split_at_frames_borders_and_thinned_to_both_ends(vision: Callable[..., Path]) -> None:
    source = {"name": "clips", "type": "videos", "path": "clips/*.mp4", "fps": 3, "max_frames": 10}
    frames = list(decode_video(_clip("000000006"), fps=3, max_frames=10))
    assert len(frames) == 10
    tokens = {}
    for overflow in ("split", "thin"):
        manifest = vision([source | {"overflow": overflow}], name=overflow)
        (manifest.parent / "clips").mkdir()
        (manifest.parent / "clips" / "a.mp4").write_bytes(_clip("000000006"))
        (manifest.parent / "clips" / "a.txt").write_text("A woman makes a sign.")
        dataset = open_dataset(build(manifest).out)
        assert check_dataset(dataset, lambda _: None) == []
        tokenizer = dataset_vision_tokenizer(dataset)
        assert tokenizer is not None
        tokens[overflow] = np.concatenate([codes for _, codes in sorted(_parts(dataset), key=lambda part: part[0])])
    wanted = tokenizer.encode(np.stack(frames))
    np.testing.assert_array_equal(tokens["split"], wanted)
    np.testing.assert_array_equal(tokens["thin"], wanted[[0, 4, 9]])


def _parts(dataset: Dataset) -> Iterator[tuple[int, np.ndarray]]:
    table = pq.read_table(Path(dataset.url) / "shard-000000.examples.parquet").to_pylist()
    for line in table:
        row = dataset[line["row"]]
        inside = (row["segment_ids"] == line["segment"]) & row["vision_mask"]
        if inside.any():
            yield line["part"], row["tokens"][inside].reshape(-1, 257)[:, :-1]


def test_codes_are_computed_once_for_every_row_length_order_and_filter(
    vision: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build(vision([PHOTOS]))

    def fails(*_: Any) -> Any:
        raise AssertionError("pictures were encoded again")

    monkeypatch.setattr(VisionTokenizer, "encode", fails)
    other = build(vision([PHOTOS | {"order": "text-first", "train": "last"}], row_length=512))
    assert other.info.num_rows != first.info.num_rows
    filtered = build(vision([PHOTOS | {"where": "width >= 1"}]))
    assert filtered.info.fingerprint == first.info.fingerprint
    none = vision([PHOTOS | {"where": "width < 1"}, {"name": "talk", "type": "chats", "path": "chats.jsonl"}])
    assert build(none).info.sources["photos"].rejected == 3


@pytest.mark.parametrize("order", ["text-first", "vision-first"])
def test_the_last_side_alone_is_trained_when_the_manifest_says_so(vision: Callable[..., Path], order: str) -> None:
    dataset = open_dataset(build(vision([PHOTOS | {"order": order, "train": "last"}], loss_weighting="token")).out)
    row = dataset[0]
    weights = {is_vision: row["loss_weights"][row["vision_mask"] == is_vision].sum() for is_vision in (False, True)}
    assert (weights[True] > 0) == (order == "text-first")
    assert weights[False] > 0  # EOS at the least


def test_another_tokenizer_at_the_same_path_gives_its_own_codes(vision: Callable[..., Path]) -> None:
    """In one process, too, and a change between the plan and the encoding is refused."""
    manifest = vision([PHOTOS])
    first = dict(_blocks(open_dataset(build(manifest).out)))
    write_tiny_tokenizer(manifest.parent / "tiny.yaml", seed=1)
    dataset = open_dataset(build(manifest).out)
    tokenizer = dataset_vision_tokenizer(dataset)
    assert tokenizer is not None
    members = _members(MEDIA / "00000.tar")
    for key, codes in _blocks(dataset):
        picture = members[key.rpartition("/")[2] + ".jpg"]
        np.testing.assert_array_equal(codes, tokenizer.encode(decode_image(picture)[None]))
        assert not np.array_equal(codes, first[key])
    shared = Encoding(manifest.parent, str(manifest.parent / "tiny.yaml"), "another", 1)
    with pytest.raises(ValueError, match="changed while it was in use"):
        encode_unit(shared, Unit(Images(**PHOTOS), (), 0, "", codes="codes-0-0.arrow"))


def test_what_the_manifest_filters_is_counted_but_not_bad(vision: Callable[..., Path]) -> None:
    talk = {"name": "talk", "type": "chats", "path": "chats.jsonl"}
    result = build(vision([PHOTOS | {"where": "width < 1"}, talk]))  # max_rejected is 0.05
    assert _rejected(result) == {"filtered: where": 3}
    assert result.info.sources["photos"].rejected == 3


def test_parts_of_a_video_in_which_nothing_is_trained_are_left_out_and_counted(vision: Callable[..., Path]) -> None:
    source = {"name": "clips", "type": "videos", "path": "clips/*.mp4", "fps": 3, "max_frames": 10, "train": "last"}
    manifest = vision([source | {"overflow": "split", "order": "vision-first"}])
    (manifest.parent / "clips").mkdir()
    (manifest.parent / "clips" / "a.mp4").write_bytes(_clip("000000006"))
    (manifest.parent / "clips" / "a.txt").write_text("A woman makes a sign.")
    result = build(manifest)
    table = pq.read_table(result.out / "shard-000000.examples.parquet").to_pylist()
    assert len(table) == 1 and table[0]["num_trained"] > 0  # the caption's
    assert _rejected(result) == {"truncated": 1}  # one part is left
    assert result.info.sources["clips"].rejected == 0


def test_bytes_do_not_depend_on_the_number_of_workers(vision: Callable[..., Path]) -> None:
    results = [build(vision([PHOTOS], name=f"workers{workers}"), workers=workers) for workers in (1, 2)]
    assert results[0].info.fingerprint == results[1].info.fingerprint


def test_the_vision_tokenizer_is_carried_and_another_one_is_another_dataset(vision: Callable[..., Path]) -> None:
    manifest = vision([PHOTOS])
    result = build(manifest)
    assert not build(manifest).built
    carried = load_vision_tokenizer(result.out / "vision_tokenizer.yaml")
    assert carried.fingerprint == result.info.vision_tokenizer_fingerprint
    spec = manifest.parent / "tiny.yaml"
    spec.write_text(spec.read_text().replace("dtype: fp32", "dtype: bf16"))
    again = build(manifest)
    assert again.built and again.info.vision_tokenizer_fingerprint != result.info.vision_tokenizer_fingerprint


def test_pictures_without_a_vision_tokenizer_are_an_error_that_names_the_key(project: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match="vision_tokenizer"):
        build(project(sources=[PHOTOS]))


def _jpeg(side: int = 64, **options: Any) -> bytes:
    noise = np.random.default_rng(side).integers(0, 255, (side, side, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(noise).save(out, options.pop("format", "JPEG"), **options)
    return out.getvalue()


def test_broken_pictures_are_counted_by_reason_and_stop_nothing(vision: Callable[..., Path]) -> None:
    manifest = vision([{"name": "loose", "type": "images", "path": "loose/*.*"}], max_rejected=1)
    folder = manifest.parent / "loose"
    folder.mkdir()
    thin = io.BytesIO()
    Image.new("RGB", (30_000, 2)).save(thin, "PNG")
    bomb = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(bomb, "PNG")
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "blue")]
    animated = io.BytesIO()
    frames[0].save(animated, "GIF", save_all=True, append_images=frames[1:])
    pictures = {
        "good.jpg": _jpeg(),
        "animated.gif": animated.getvalue(),
        "truncated.jpg": _jpeg(200)[:4000],
        "text.jpg": b"no picture at all",
        "dot.png": _jpeg(1, format="PNG"),
        "thin.png": thin.getvalue(),
        "bomb.png": bomb.getvalue(),
        "wordless.jpg": _jpeg(65),
    }
    for name, data in pictures.items():
        (folder / name).write_bytes(data)
        if name != "wordless.jpg":
            (folder / name).with_suffix(".txt").write_text(f"It is {name}.")
    result = build(manifest)
    kept = {key for key, _ in _blocks(open_dataset(result.out))}
    assert {key.rpartition("/")[2].partition(".")[0] for key in kept} == {"good", "animated"}
    counts = _rejected(result)
    assert sum(counts.values()) == 6
    assert counts["no caption"] == counts["truncated"] == counts["not an image"] == counts["too large"] == 1
    assert counts["too small"] + counts["too long and thin"] == 2


def test_a_picture_whose_size_nobody_noted_is_measured_for_min_size(vision: Callable[..., Path]) -> None:
    """Also where an earlier build has its codes: they do not tell its size."""
    source = {"name": "loose", "type": "images", "path": "loose/*.jpg"}
    manifest = vision([source], max_rejected=1)
    folder = manifest.parent / "loose"
    folder.mkdir()
    for side in (64, 80):
        (folder / f"{side}.jpg").write_bytes(_jpeg(side))
        (folder / f"{side}.txt").write_text(f"It is {side}.")
    assert build(manifest).info.sources["loose"].rejected == 0
    result = build(manifest, ["sources.0.min_size=72"])
    assert _rejected(result) == {"filtered: min_size": 1}
    assert result.info.sources["loose"].examples == 1


def test_broken_videos_are_counted_by_reason_and_stop_nothing(vision: Callable[..., Path]) -> None:
    source = {"name": "clips", "type": "videos", "path": "clips/*.mp4", "fps": 1, "max_frames": 2}
    manifest = vision([source], max_rejected=1)
    folder = manifest.parent / "clips"
    folder.mkdir()
    whole = _clip("000000006")
    for name, data in {"good": whole, "cut": whole[: len(whole) * 2 // 5], "text": b"words", "empty": b""}.items():
        (folder / f"{name}.mp4").write_bytes(data)
        (folder / f"{name}.txt").write_text(f"It is {name}.")
    result = build(manifest)
    assert {key.rpartition("/")[2].partition(".")[0] for key, _ in _blocks(open_dataset(result.out))} == {"good"}
    assert sum(_rejected(result).values()) == 3
