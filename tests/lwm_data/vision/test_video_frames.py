"""Videos: which frame is shown when, the same by both decoders; each way that a file can be broken."""

from __future__ import annotations

import io
import itertools
import math
import os
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lwm_data.vision import clip, frames
from lwm_data.vision.clip import TOLERANCE
from lwm_data.vision.frames import READERS, Decoder, decode_video, sample_times
from tests.lwm_data.vision.videos import number_of, numbered, write_audio, write_video

BOTTLES = (Path(__file__).parent / "media" / "bottles.mp4").read_bytes()
DECODERS: list[Decoder] = ["pyav", "decord"]
# Gaps of 7 to 260 ms, of a real recorder's kind: no frame lies where its number times the mean gap says.
UNEVEN = list(itertools.accumulate([0, *([20, 50, 33, 7, 41, 120, 33, 33, 260, 17] * 10)]))[:100]
CONTAINERS: dict[str, dict[str, Any]] = {
    "mp4": {},
    "matroska": {},
    "webm": {"codec": "libvpx-vp9"},
    "flv": {},
    "mpegts": {},
    "avi": {"codec": "mpeg4"},
}
OPEN: dict[str, dict[str, Any]] = {  # frames that follow a keyframe in the file and are shown before it
    "mov": {"codec": "mpeg4", "codec_options": {"bf": "2", "g": "30"}},
    "mp4": {"codec": "libx265", "codec_options": {"x265-params": "keyint=30:log-level=none"}},
    "matroska": {"codec": "libx264", "codec_options": {"x264-params": "open-gop=1:keyint=30:bframes=3"}},
}
UNREAD_BY_DECORD: dict[str, dict[str, Any]] = {
    "mpegts": {},
    "avi": {"codec": "mpeg4", "codec_options": {"bf": "2"}},
}


def shown(ticks: list[int], times: np.ndarray) -> list[int]:
    """The frames that a viewer sees at `times`, found one by one."""
    seen = []
    for time in times:
        begun = [number for number, tick in enumerate(ticks) if tick - ticks[0] <= 1000 * (time + TOLERANCE)]
        seen.append(begun[-1])
    return seen


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("stride", [1, 2, 7, 40])
@pytest.mark.parametrize("form", OPEN)
def test_frames_are_right_after_a_jump_to_where_frames_lead_a_keyframe(
    form: str, stride: int, decoder: Decoder
) -> None:
    data = write_video(UNEVEN, form=form, **OPEN[form])
    times = np.array(UNEVEN[stride - 1 :: stride]) / 1000
    read = READERS[decoder](data, clip.read_clip(data), times)
    assert [number_of(frame) for frame in read] == list(range(stride - 1, 100, stride))


@pytest.mark.parametrize("form", UNREAD_BY_DECORD)
def test_what_decord_has_no_time_stamps_of_is_refused(form: str) -> None:
    data = write_video(UNEVEN, form=form, **UNREAD_BY_DECORD[form])
    with pytest.raises(ValueError, match=r"unsupported|no time stamps"):
        list(decode_video(data, fps=4, max_frames=3, decoder="decord"))


@pytest.mark.parametrize(
    ("form", "decoder"),
    [(form, decoder) for form in CONTAINERS for decoder in DECODERS if (form, decoder) != ("mpegts", "decord")],
)
def test_the_frame_at_a_time_is_the_last_that_began_by_then(form: str, decoder: Decoder) -> None:
    data = write_video(UNEVEN, form=form, **CONTAINERS[form])
    got = [number_of(frame) for frame in decode_video(data, fps=16, max_frames=None, decoder=decoder)]
    end = (UNEVEN[-1] - UNEVEN[0]) / 1000
    assert len(got) in range(math.ceil(end * 16), math.ceil(end * 16) + 5)  # the last frame's length is the writer's
    assert got == shown(UNEVEN, np.arange(len(got)) / 16)


@given(
    gaps=st.lists(st.integers(3, 300), min_size=1, max_size=40),
    fps=st.sampled_from([0.7, 4.0, 29.97, 90.0]),
    begin=st.integers(0, 400),
)
def test_both_decoders_show_the_same_frames_of_uneven_clips(gaps: list[int], fps: float, begin: int) -> None:
    ticks = list(itertools.accumulate(gaps, initial=begin))
    data = write_video(ticks, codec_options={"bf": "3", "g": "12", "preset": "ultrafast"})
    by = {decoder: np.stack(list(decode_video(data, fps=fps, max_frames=30, decoder=decoder))) for decoder in DECODERS}
    assert np.array_equal(by["pyav"], by["decord"])
    length = read_length(data)
    assert [number_of(frame) for frame in by["pyav"]] == shown(ticks, sample_times(length, fps, 30))


def read_length(data: bytes) -> float:
    return clip.read_clip(data).duration_s


def all_frames(data: bytes) -> list[tuple[float, np.ndarray]]:
    """Each frame of the file with its time, by plain decoding from start to end."""
    with av.open(io.BytesIO(data)) as container:
        read = [(float(frame.time or 0), frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    return [(time - read[0][0], rgb) for time, rgb in read]


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize(("fps", "max_frames", "start"), [(4, None, 0), (0.5, None, 3.3), (3, 2, 0.1), (40, 50, 7)])
def test_what_is_jumped_over_or_not_decoded_changes_no_value(
    fps: float, max_frames: int | None, start: float, decoder: Decoder
) -> None:
    read = all_frames(BOTTLES)
    times = sample_times(read_length(BOTTLES), fps, max_frames, start)
    expected = [[rgb for begins, rgb in read if begins <= time + TOLERANCE][-1] for time in times]
    got = list(decode_video(BOTTLES, fps=fps, max_frames=max_frames, start=start, decoder=decoder))
    assert len(got) == len(expected) > 0
    for frame, rgb in zip(got, expected, strict=True):
        assert np.array_equal(frame, np.asarray(Image.fromarray(rgb).resize((455, 256)).crop((100, 0, 356, 256))))


def test_at_the_rate_of_the_video_the_frames_are_those_of_the_release() -> None:
    ticks = [1000 * number // 25 for number in range(90)]
    data = write_video(ticks)
    for count in (2, 7, 30, 90, 200):
        got = [number_of(frame) for frame in decode_video(data, fps=25, max_frames=count)]
        assert got == (list(range(90)) if count >= 90 else np.linspace(0, 89, count, dtype=int).tolist())


@given(
    duration=st.floats(0.01, 5000),
    fps=st.floats(0.01, 60),
    max_frames=st.none() | st.integers(1, 50),
    cut=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_sample_times_are_even_inside_the_clip_and_include_both_ends(
    duration: float, fps: float, max_frames: int | None, cut: tuple[float, float]
) -> None:
    start, end = min(cut) * duration, max(cut) * duration
    if end - start < 0.002:
        start, end = 0.0, duration
    times = sample_times(duration, fps, max_frames, start, end)
    every = sample_times(duration, fps, None, start, end)
    assert times[0] == start and (times < end).all() and len(times) <= (max_frames or len(every))
    assert np.allclose(np.diff(every), 1 / fps) and every[-1] + 1 / fps >= end - 2 * TOLERANCE
    if max_frames is None or len(every) <= max_frames:
        assert np.array_equal(times, every)
    else:
        assert len(times) == max_frames
        assert max_frames == 1 or np.allclose(times, np.linspace(every[0], every[-1], max_frames))


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_a_video_is_shown_as_its_display_matrix_turns_it(rotation: int, decoder: Decoder) -> None:
    data = write_video([0, 33, 66], size=(64, 64), rotation=rotation)
    turned = [np.rot90(frame, -rotation // 90) for frame in decode_video(data, fps=30, max_frames=3, decoder=decoder)]
    assert [number_of(frame) for frame in turned] == [0, 1, 2]


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_clip_begins_and_ends_where_it_is_told(decoder: Decoder) -> None:
    data = write_video([100 * number for number in range(60)], codec_options={"g": "10"})
    got = list(decode_video(data, fps=10, max_frames=None, start=4.2, end=5.0, decoder=decoder))
    assert [number_of(frame) for frame in got] == [42, 43, 44, 45, 46, 47, 48, 49]


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_video_of_one_frame_is_one_frame(decoder: Decoder) -> None:
    got = list(decode_video(write_video([0]), fps=4, max_frames=30, decoder=decoder))
    assert [number_of(frame) for frame in got] == [0]


def test_a_path_gives_what_its_bytes_give(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(BOTTLES)
    for one, other in zip(
        decode_video(path, fps=2, max_frames=5), decode_video(BOTTLES, fps=2, max_frames=5), strict=True
    ):
        assert np.array_equal(one, other)


def with_cover(form: str) -> bytes:
    """Audio with a picture of the album."""
    file = io.BytesIO()
    with av.open(file, "w", format=form) as container:
        sound: Any = container.add_stream("aac", rate=44100)
        cover: Any = container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 96, 64, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        picture = av.VideoFrame.from_ndarray(numbered(1), format="rgb24")
        picture.pts, picture.time_base = 0, Fraction(1, 1)
        container.mux(cover.encode(picture))
        container.mux(cover.encode())
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(sound.encode(frame))
        container.mux(sound.encode())
    return file.getvalue()


def cut(data: bytes, share: float = 0.4) -> bytes:
    return data[: int(len(data) * share)]


def overwritten(data: bytes) -> bytes:
    """Random bytes in the middle, where the frames are."""
    rng = np.random.default_rng(0)
    noise = bytearray(data)
    for place in rng.integers(len(data) // 4, len(data) * 3 // 4, 400):
        noise[place] = rng.integers(256)
    return bytes(noise)


EVEN = [33 * number for number in range(60)]
PICTURE = io.BytesIO()
Image.new("RGB", (96, 64)).save(PICTURE, "GIF", save_all=True, append_images=[Image.new("RGB", (96, 64), (9, 9, 9))])
BROKEN: dict[str, tuple[bytes, str]] = {
    "mp4 cut, its table at the end": (cut(write_video(EVEN)), "truncated"),
    "mp4 cut, its table in front": (cut(write_video(EVEN, options={"movflags": "faststart"})), "truncated"),
    "real mp4 cut": (cut(BOTTLES), "truncated"),
    "real mp4, its last kB lost": (BOTTLES[:-1000], "truncated"),
    "mkv cut": (cut(write_video(EVEN, form="matroska")), "truncated"),
    "webm cut": (cut(write_video(EVEN, form="webm", codec="libvpx-vp9")), "truncated"),
    "flv cut": (cut(write_video(EVEN, form="flv")), "truncated"),
    "avi cut": (cut(write_video(EVEN, form="avi", codec="mpeg4"), 0.7), "truncated"),
    "audio only": (write_audio(), "no video"),
    "audio with a cover": (with_cover("mp4"), "no video"),
    "no frames": (write_video([], options={"movflags": "empty_moov+frag_keyframe"}), "no frames"),
    "text": (b"This is not the film that you are looking for.\n" * 20, "not a video"),
    "nothing": (b"", "not a video"),
    "an animated GIF": (PICTURE.getvalue(), "not a video"),
    "a playlist of other files": (b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n/etc/passwd\n", "not a video"),
    "a script of other files": (b"ffconcat version 1.0\nfile /etc/passwd\n", "not a video"),
    "a line of pixels": (write_video(EVEN[:2], size=(640, 16)), "too long and thin"),
    "a wall": (write_video(EVEN[:1], size=(8320, 512), codec_options={"preset": "ultrafast"}), "too large"),
    "a day": (write_video([0, 24 * 3600 * 1000]), "too long"),
}


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_video_is_refused_for_its_reason(kind: str, decoder: Decoder) -> None:
    data, reason = BROKEN[kind]
    with pytest.raises(ValueError) as caught:
        list(decode_video(data, fps=4, max_frames=30, decoder=decoder))
    assert caught.value.args[0] == reason and isinstance(caught.value.args[1], str)


def test_pyav_tells_of_frames_that_are_damaged() -> None:
    with pytest.raises(ValueError, match="damaged"):
        list(decode_video(overwritten(BOTTLES), fps=30, max_frames=None))


def test_a_file_that_is_not_there_is_unreadable(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unreadable"):
        list(decode_video(tmp_path / "none.mp4", fps=4, max_frames=None))


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_path_that_is_not_utf_8_is_read_or_said_to_be_unsupported(tmp_path: Path, decoder: Decoder) -> None:
    path = tmp_path / os.fsdecode(b"\xff.mp4")
    path.write_bytes(BOTTLES)
    if decoder == "pyav":
        assert len(list(decode_video(path, fps=1, max_frames=2))) == 2
    else:
        with pytest.raises(ValueError, match="unsupported"):
            list(decode_video(path, fps=1, max_frames=2, decoder=decoder))


def test_a_clip_after_the_end_is_refused() -> None:
    with pytest.raises(ValueError, match="no such clip"):
        list(decode_video(BOTTLES, fps=4, max_frames=None, start=60, end=70))


def test_the_first_frame_comes_before_the_second_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(frames, "to_square", lambda image: asked.append(1) or np.zeros((256, 256, 3), np.uint8))
    stream = decode_video(BOTTLES, fps=10, max_frames=None)
    for number in range(1, 6):
        next(stream)
        assert len(asked) == number
