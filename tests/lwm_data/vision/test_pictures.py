"""What a person sees of vision tokens is what they decode to, each frame of it, in its place."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from pathlib import Path

import av
import fsspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lwm_data.format.dataset import Dataset, open_dataset
from lwm_data.format.example import Run, text_runs, vision_runs
from lwm_data.format.vocab import EOF, EOV, TextTokenizer
from lwm_data.sources.record import Record
from lwm_data.vision.dataset_tokenizer import dataset_vision_tokenizer
from lwm_data.vision.picture_files import read_codes_file, write_codes_file, write_frames
from lwm_data.vision.pictures import data_uri, decode_block, evenly, png_bytes, strip, vision_blocks, whole_frames
from lwm_data.vision.vqgan import VisionTokenizer, load_vision_tokenizer
from tests.tiny_vision import TINY, gradients, with_tokenizer, write_tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> VisionTokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tiny.yaml"
    write_tiny_tokenizer(path)
    return load_vision_tokenizer(path)


def block_of(codes: np.ndarray) -> np.ndarray:
    ends = [EOF] * (len(codes) - 1) + [EOV]
    return np.array([token for frame, end in zip(codes, ends, strict=True) for token in [*frame, end]], np.uint16)


def random_codes(num_frames: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, TINY.num_codes, (num_frames, 256), dtype=np.int32)


@given(st.integers(1, 5), st.data())
def test_frames_are_found_wherever_a_row_cuts(num_frames: int, data: st.DataObject) -> None:
    codes = random_codes(num_frames)
    block = block_of(codes)
    start = data.draw(st.integers(0, len(block) - 1))
    stop = data.draw(st.integers(start + 1, len(block)))
    whole = [codes[i] for i in range(num_frames) if start <= 257 * i and 257 * i + 256 <= stop]
    np.testing.assert_array_equal(
        whole_frames(block[start:stop]), np.array(whole, np.int32).reshape(-1, 256), strict=True
    )


def test_two_videos_without_a_word_between_are_frames_too() -> None:
    codes = random_codes(3)
    np.testing.assert_array_equal(whole_frames(np.concatenate([block_of(codes[:2]), block_of(codes[2:])])), codes)


@pytest.mark.parametrize("lengths", [(255, 256), (256, 255, 256), (257,), (256, 300), (256, 0, 256)])
def test_a_frame_of_another_number_of_codes_is_refused(lengths: tuple[int, ...]) -> None:
    block = np.concatenate([[*range(length), EOF] for length in (256, *lengths, 256)])
    with pytest.raises(ValueError, match=r"got a frame of \d+ codes; wanted 256"):
        whole_frames(block)


def test_no_tokens_are_no_frames() -> None:
    assert whole_frames(np.array([], np.int32)).shape == (0, 256)
    with pytest.raises(ValueError, match="a code of -1"):
        whole_frames(np.array([-1] * 10))


@given(st.integers(0, 60), st.integers(1, 20))
def test_chosen_frames_are_spread_over_all(num_frames: int, most: int) -> None:
    chosen = evenly(num_frames, most).tolist()
    assert len(chosen) == min(num_frames, most) and chosen == sorted(set(chosen))
    if len(chosen) > 1:
        assert (chosen[0], chosen[-1]) == (0, num_frames - 1)
        steps = np.diff(chosen)
        assert steps.max() - steps.min() <= 1


def test_a_block_decodes_to_its_codes_pictures(tokenizer: VisionTokenizer) -> None:
    codes = random_codes(3)
    pictures = tokenizer.decode(codes)
    np.testing.assert_array_equal(decode_block(block_of(codes), tokenizer), pictures)
    np.testing.assert_array_equal(decode_block(block_of(codes), tokenizer, most=2), pictures[[0, 2]])
    with pytest.raises(ValueError, match="wanted 0 to 499"):
        decode_block(block_of(codes + 400), tokenizer)


def test_blocks_are_found_in_a_row(
    demo_tokenizer: TextTokenizer, dataset_of: Callable[..., Dataset], tmp_path: Path
) -> None:
    words = demo_tokenizer.encode("so it is")
    end = Run(np.array([demo_tokenizer.eos], np.int32), is_vision=False, trained=True)
    image, video = (vision_runs(demo_tokenizer, random_codes(n), trained=True) for n in (1, 2))
    both = Record("both", (*text_runs(demo_tokenizer, [(words, True)], eos=False), *image, *video, end))
    cut = Record("cut", (Run(np.array([1], np.int32), is_vision=False, trained=False), *video[1:2], end))
    for packing in ("masked", "naive"):
        dataset = dataset_of(tmp_path / packing, [both, cut, both], 810, packing=packing)
        found = []
        for row in range(len(dataset)):
            packed, arrays = dataset.packed(row), dataset[row]
            covered = np.zeros(810, bool)
            for segment, start, stop in vision_blocks(packed):
                assert not covered[start:stop].any() and arrays["vision_mask"][start:stop].all()
                assert (arrays["segment_ids"][start:stop] == segment).all()
                covered[start:stop] = True
                found.append(packed.tokens[start:stop])
            np.testing.assert_array_equal(covered, arrays["vision_mask"])
        assert sum(map(len, found)) == sum(of.vision_tokens for of in dataset.info.sources.values())


def test_a_naive_row_that_begins_with_a_code_keeps_that_frame(
    demo_tokenizer: TextTokenizer, dataset_of: Callable[..., Dataset], tmp_path: Path
) -> None:
    """Its first token has no weight; the frame is whole all the same."""
    codes = random_codes(2)
    bos, _, block, _ = (*text_runs(demo_tokenizer, [], eos=False), *vision_runs(demo_tokenizer, codes, trained=True))
    padding = Run(np.full(256, 5, np.int32), is_vision=False, trained=True)
    dataset = dataset_of(tmp_path, [Record("a", (bos, padding, block))], 257, packing="naive")
    packed = dataset.packed(1)
    assert packed.runs[:, 0].tolist() == [257] and vision_blocks(packed) == [(1, 0, 257)]
    np.testing.assert_array_equal(whole_frames(packed.tokens), codes[:1])


def test_a_strip_has_every_frame_in_its_place() -> None:
    frames = gradients(5)
    sheet = strip(frames[:3], frames[3:], height=256)
    gap = sheet.shape[0] - 512
    assert gap > 0 and sheet.shape[1] == 3 * 256 + 2 * gap
    for i, frame in enumerate(frames):
        down, across = (256 + gap) * (i // 3), (256 + gap) * (i % 3)
        np.testing.assert_array_equal(sheet[down : down + 256, across : across + 256], frame)
    assert (sheet[256 : 256 + gap] == 255).all() and (sheet[-256:, -256:] == 255).all()
    small = strip(frames, height=96)
    assert small.shape[0] == 96
    np.testing.assert_allclose(small[:, :96].mean((0, 1)), frames[0].mean((0, 1)), atol=2)
    with pytest.raises(ValueError, match="no frame"):
        strip(frames[:0], height=96)


def test_files_of_pictures_are_the_same_bytes_each_time_and_hold_the_pixels(tmp_path: Path) -> None:
    frames = gradients(3)
    sheet = strip(frames, height=96)
    assert png_bytes(sheet) == png_bytes(sheet.copy())
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(png_bytes(sheet)))), sheet)
    head, _, data = data_uri(sheet).partition(",")
    assert head == "data:image/jpeg;base64" and data_uri(sheet) == data_uri(sheet.copy())
    jpeg = np.asarray(Image.open(io.BytesIO(base64.b64decode(data, validate=True)))).astype(int)
    assert jpeg.shape == sheet.shape and np.abs(jpeg - sheet).mean() < 8
    for name in ("a.gif", "a.mp4", "a.png"):
        write_frames(frames, tmp_path / name, 4.0)
        write_frames(frames, tmp_path / f"again-{name}", 4.0)
        assert (tmp_path / name).read_bytes() == (tmp_path / f"again-{name}").read_bytes(), name
    with Image.open(tmp_path / "a.gif") as gif:
        assert (getattr(gif, "n_frames", 1), gif.info["duration"]) == (3, 250)
    with av.open(tmp_path / "a.mp4") as clip:
        decoded = [(frame.time, frame.to_ndarray(format="rgb24").astype(int)) for frame in clip.decode(video=0)]
    assert [time for time, _ in decoded] == [0, 0.25, 0.5]
    assert max(np.abs(got - want).mean() for (_, got), want in zip(decoded, frames, strict=True)) < 8
    with pytest.raises(ValueError, match=r"ends in \.png, \.gif, \.mp4"):
        write_frames(frames, tmp_path / "a.bmp", 4.0)


@pytest.mark.parametrize("name", ["codes.npy", "codes.json"])
def test_codes_come_back_from_their_file(tmp_path: Path, name: str) -> None:
    codes = random_codes(3)
    write_codes_file(codes, tmp_path / name)
    np.testing.assert_array_equal(read_codes_file(tmp_path / name), codes, strict=True)


def npy_header(shape: tuple[int, ...]) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<i4", "fortran_order": False, "shape": shape})
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.npy", b"\x80\x04\x95.", "not codes"),
        ("a.npy", b"", "not codes"),
        ("a.npy", b"PK\x03\x04 an archive of nothing", "not codes"),
        ("a.npy", npy_header((2**42, 256)), "not codes"),  # of 1 PiB
        ("a.npy", npy_header((2**70, 256)), "not codes"),
        ("a.npy", npy_header((-1, 256)), "not codes"),
        ("a.npy", npy_header((0, 256)), "wanted integers"),
        ("a.json", b"{broken", "not codes"),
        ("a.json", b"[[1, 2], [3]]", "not codes"),
        ("a.json", b"{}", "wanted integers"),
        ("a.json", b"[]", "wanted integers"),
        ("a.json", b"[" * 10**5, "not codes"),
        ("a.json", str([[0.5] * 256]).encode(), "wanted integers"),
        ("a.json", str([[1] * 257]).encode(), r"got int64\[1, 257\]"),
        ("a.json", str([[EOF] * 256]).encode(), "wanted 0 to 8191"),
    ],
)
def test_a_file_without_codes_is_refused(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read_codes_file(tmp_path / name)


def test_a_pickle_in_an_npy_file_is_not_loaded(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"not codes: .*Python objects in dtype"):
        read_codes_file(tmp_path / "a.npy")


def test_a_dataset_s_tokenizer_is_its_own_from_a_folder_and_from_a_store(
    demo_tokenizer: TextTokenizer, dataset_of: Callable[..., Dataset], tmp_path: Path
) -> None:
    runs = (*text_runs(demo_tokenizer, [], eos=False), *vision_runs(demo_tokenizer, random_codes(1), trained=True))
    plain = dataset_of(tmp_path, [Record("a", runs)], 300)
    assert dataset_vision_tokenizer(plain) is None, "a dataset that names none"
    spec = write_tiny_tokenizer(tmp_path / "tiny.yaml")
    dataset = with_tokenizer(plain, spec)
    own = dataset_vision_tokenizer(dataset)
    assert own is not None and own.fingerprint == dataset.info.vision_tokenizer_fingerprint
    fsspec.filesystem("memory").put(dataset.url, "/pictures", recursive=True)
    far = dataset_vision_tokenizer(open_dataset("memory://pictures"))
    assert far is not None and far.fingerprint == own.fingerprint
    codes = random_codes(1)
    np.testing.assert_array_equal(far.decode(codes), own.decode(codes))

    write_tiny_tokenizer(Path(dataset.url) / "vision_tokenizer.yaml", seed=1)
    with pytest.raises(ValueError, match="is not the vision tokenizer this dataset was built with"):
        dataset_vision_tokenizer(dataset)
    (Path(dataset.url) / "vision_tokenizer.yaml").unlink()
    assert dataset_vision_tokenizer(dataset) is None, "a dataset without its file"
    fsspec.filesystem("memory").rm("/pictures/vision_tokenizer.safetensors")
    assert dataset_vision_tokenizer(open_dataset("memory://pictures")) is None
