"""Images: each kind of pixel, each way that a file can be broken, and the one square."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import UInt8
from PIL import Image

from lwm_data.vision.frames import FRAME, MAX_PIXELS, decode_image
from lwm_data.vision.square import MAX_ASPECT, to_square

MEDIA = Path(__file__).parent / "media"
RNG = np.random.default_rng(0)
GREY = np.add.outer(np.arange(FRAME), np.arange(FRAME)).astype(np.int64) // 2  # 0..255, every value
COLOUR = np.stack([GREY, GREY[::-1], GREY.T // 2 + 60], -1).astype(np.uint8)
ALPHA = np.ascontiguousarray(GREY[:, ::-1]).astype(np.uint8)


def save(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def over_white(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    a = alpha[..., None] / 255
    return rgb * a + 255 * (1 - a)


def grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, axis=-1)


def png_16_bits(values: np.ndarray, clear: int | None = None) -> bytes:
    """A grey PNG of 16 bits, written by hand: PIL need not write what it reads."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, 0, 0, 0, 0))
    transparent = chunk(b"tRNS", struct.pack(">H", clear)) if clear is not None else b""
    return b"\x89PNG\r\n\x1a\n" + head + transparent + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


DEEP = GREY * 257 + (GREY.T % 3) * 90  # 0..65535
PALETTE = RNG.integers(0, 256, (256, 3), dtype=np.uint8)


def palette_image() -> Image.Image:
    image = Image.fromarray(GREY.astype(np.uint8), "L").copy()
    image.putpalette(PALETTE.tobytes())
    return image


def with_alpha() -> Image.Image:
    return Image.fromarray(np.concatenate([COLOUR, ALPHA[..., None]], -1))


CMYK = np.concatenate([COLOUR, (ALPHA // 2)[..., None]], -1)
KINDS: dict[str, tuple[bytes, np.ndarray]] = {
    "colour": (save(Image.fromarray(COLOUR)), COLOUR),
    "grey": (save(Image.fromarray(GREY.astype(np.uint8))), grey(GREY)),
    "1 bit": (save(Image.fromarray(GREY > 99)), grey((GREY > 99) * 255)),
    "palette": (save(palette_image()), PALETTE[GREY]),
    "palette, one entry clear": (
        save(palette_image(), transparency=7),
        over_white(PALETTE[GREY], np.where(GREY == 7, 0, 255)),
    ),
    "palette, every entry its alpha": (
        save(palette_image(), transparency=bytes(range(256))),
        over_white(PALETTE[GREY], GREY),
    ),
    "alpha": (save(with_alpha()), over_white(COLOUR, ALPHA)),
    "alpha, WebP": (save(with_alpha(), "WEBP", lossless=True, exact=True), over_white(COLOUR, ALPHA)),
    "grey and alpha": (
        save(Image.fromarray(np.stack([GREY.astype(np.uint8), ALPHA], -1))),
        over_white(grey(GREY), ALPHA),
    ),
    "grey, one value clear": (
        save(Image.fromarray(GREY.astype(np.uint8)), transparency=100),
        grey(np.where(GREY == 100, 255, GREY)),
    ),
    "colour, one clear": (
        save(Image.fromarray(COLOUR), transparency=(100, 155, 110)),
        np.where((COLOUR == [100, 155, 110]).all(-1, keepdims=True), 255, COLOUR),
    ),
    "16 bits": (png_16_bits(DEEP), grey(DEEP / 257)),
    "16 bits, one value clear": (
        png_16_bits(DEEP, clear=257 * 30),
        grey(np.where(DEEP == 257 * 30, 65535, DEEP) / 257),
    ),
    "16 bits, TIFF": (save(Image.fromarray(DEEP.astype(np.uint16)), "TIFF"), grey(DEEP / 257)),
    "16 bits, PGM": (b"P5 256 256 65535\n" + DEEP.astype(">u2").tobytes(), grey(DEEP / 257)),
    "CMYK": (save(Image.fromarray(CMYK, "CMYK"), "TIFF"), (255 - CMYK[..., :3]) * (255.0 - CMYK[..., 3:]) / 255),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_pixel_becomes_the_colour_that_it_stands_for(kind: str) -> None:
    data, expected = KINDS[kind]
    frame = decode_image(data)
    assert frame.dtype == np.uint8 and frame.shape == (FRAME, FRAME, 3)
    tolerance = 1.0 if kind == "CMYK" else 0.51  # PIL rounds twice in CMYK
    assert np.abs(frame - np.asarray(expected, np.float64)).max() <= tolerance


def test_a_cmyk_jpeg_is_not_inverted() -> None:
    ink = np.zeros((FRAME, FRAME, 4), np.uint8)
    ink[:, :128] = [0, 255, 255, 0]  # red; the rest is white paper
    frame = decode_image(save(Image.fromarray(ink, "CMYK"), "JPEG", quality=95)).astype(int)
    assert np.abs(frame[:, :120] - [255, 0, 0]).max() < 12 and frame[:, 136:].min() > 243


UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a.swapaxes(0, 1)[:, ::-1],
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a.swapaxes(0, 1)[::-1],
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("form", ["PNG", "TIFF", "JPEG"])
def test_exif_orientation_turns_the_image_upright(orientation: int, form: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {"quality": 100, "subsampling": 0} if form == "JPEG" else {}
    frame = decode_image(save(Image.fromarray(COLOUR), form, exif=exif, **options))
    assert np.abs(frame.astype(int) - UPRIGHT[orientation](COLOUR).astype(int)).max() <= (4 if form == "JPEG" else 0)


def test_broken_exif_does_not_cost_an_image() -> None:
    data = save(Image.fromarray(COLOUR), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert decode_image(data).shape == (FRAME, FRAME, 3)


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP"])
def test_of_an_animation_the_first_frame_is_taken(form: str) -> None:
    first, second = Image.new("RGB", (300, 300), (250, 0, 0)), Image.new("RGB", (300, 300), (0, 0, 250))
    data = save(first, form, save_all=True, append_images=[second, first])
    assert np.abs(decode_image(data).astype(int) - [250, 0, 0]).max() < 6


def release_square(image: Image.Image) -> UInt8[np.ndarray, "256 256 3"]:
    """The LWM release's steps, with a Pillow that resamples rows first, in full, then columns, then cuts."""
    width, height = image.size
    if width < height:
        wide, high = 256, int(256 * height / width)
    else:
        wide, high = int(256 * width / height), 256
    resized = image.resize((wide, height)).resize((wide, high))
    box = ((wide - 256) / 2, (high - 256) / 2, (wide + 256) / 2, (high + 256) / 2)
    return np.asarray(resized.crop(box))  # type: ignore[arg-type]


@given(width=st.integers(16, 700), height=st.integers(16, 700))
def test_the_square_has_the_values_of_the_release(width: int, height: int) -> None:
    if max(width, height) > MAX_ASPECT * min(width, height):
        width = height
    noise = np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    assert np.array_equal(to_square(image), release_square(image))


@pytest.mark.parametrize("name", ["chelsea.jpg", "hubble.jpg"])
def test_a_real_photograph_has_the_values_of_the_release(name: str) -> None:
    data = (MEDIA / name).read_bytes()
    with Image.open(io.BytesIO(data)) as image:
        assert np.array_equal(decode_image(data), release_square(image.convert("RGB")))


NOISE = save(Image.fromarray(RNG.integers(0, 256, (FRAME, FRAME, 3), dtype=np.uint8)))
PHOTO = (MEDIA / "chelsea.jpg").read_bytes()
BROKEN: dict[str, tuple[bytes, str]] = {
    "truncated JPEG": (PHOTO[: len(PHOTO) * 2 // 5], "truncated"),
    "truncated PNG": (NOISE[: len(NOISE) // 2], "truncated"),
    "text named .jpg": (b"This is not the photograph that you are looking for.\n" * 20, "not an image"),
    "nothing": (b"", "not an image"),
    "a page of PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 300 300\nshowpage\n", "not an image"),
    "1 x 1": (save(Image.new("RGB", (1, 1)), "GIF"), "too small"),
    "30,000 x 2": (save(Image.new("RGB", (30_000, 2))), "too small"),
    "2,000 x 20": (save(Image.new("RGB", (2_000, 20))), "too long and thin"),
    "decompression bomb": (save(Image.new("1", (20_000, 20_000))), "too large"),
    "bytes lost in the middle": (NOISE[:9_000] + bytes(9_000) + NOISE[18_000:], "damaged"),
    "heights as floats": (save(Image.fromarray(GREY.astype(np.float32)), "TIFF"), "unsupported"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_image_is_refused_for_its_reason(kind: str) -> None:
    data, reason = BROKEN[kind]
    with pytest.raises(ValueError) as caught:
        decode_image(data)
    assert caught.value.args[0] == reason and isinstance(caught.value.args[1], str)


def test_a_bomb_is_refused_before_its_pixels_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    side = int(MAX_PIXELS**0.5) + 1
    data = save(Image.new("1", (side, side)))
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
    with pytest.raises(ValueError, match="too large"):
        decode_image(data)
