"""Images and videos become frames: uint8[256, 256, 3], RGB.

    image   bytes -> one frame
    video   bytes or path, `fps` -> the frames shown at 0, 1/fps, 2/fps, ... s, one at a time

    frames    |0    |1  |2       |3     |4   |       each begins at its own time stamp, however uneven
    samples   ^     .  ^     .  ^     .  ^            at t: the last frame that began by then
              0         1/fps     2/fps

What cannot be decoded whole gives ValueError(reason, detail): reason is one of few, to be counted. Bounds are
checked on what the header claims, before memory is taken; a header that lies, and time, are bounded by DecodePool.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import Float64, UInt8

from lwm_data.vision.clip import MAX_VIDEO_FRAMES, TOLERANCE, read_clip
from lwm_data.vision.readers import frames_by_decord, frames_by_pyav
from lwm_data.vision.square import FRAME as FRAME
from lwm_data.vision.square import check_size, to_square

if TYPE_CHECKING:
    from PIL import Image

Decoder = Literal["pyav", "decord"]

MAX_PIXELS = 178_956_970  # of an image; PIL's own limit, where it speaks of a decompression bomb
# Neither PIL's other formats, which nobody trains on, nor EPS, which would be run by Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "JPEG2000", "PPM")
ORIENTATION = 0x0112  # EXIF: how the camera was held
TURNS = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # its values -> PIL.Image.Transpose
READERS = {"pyav": frames_by_pyav, "decord": frames_by_decord}


def decode_image(data: bytes, min_size: int = 0) -> UInt8[np.ndarray, "256 256 3"]:
    """The image in `data`, turned as its EXIF says, over white where transparent; of an animation the first frame.

    min_size: least width and height in pixels; of less, "filtered: min_size".
    Colours are taken as the file's numbers say: no ICC profile is applied, CMYK is converted without one (as PIL and
    the LWM release do). Grey of 16 bits is rounded to 8; of 16-bit colours PIL keeps the upper 8. ValueError(reason,
    detail): "not an image", "too small", "too long and thin", "too large", "unsupported", "truncated", "damaged".
    """
    from PIL import Image, UnidentifiedImageError

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of broken EXIF, and of images of half the size that we refuse
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        except UnidentifiedImageError:
            raise ValueError("not an image", f"{len(data):,} bytes that begin with {data[:8]!r}") from None
        except Image.DecompressionBombError as error:
            raise ValueError("too large", str(error)) from None
        except MemoryError:
            raise
        except Exception as error:  # PIL's readers raise what they like on a broken header
            raise ValueError("damaged", f"{type(error).__name__}: {error}") from None
        width, height = image.size
        check_size(width, height, min_size)
        if width * height > MAX_PIXELS:
            raise ValueError("too large", f"{width:,} x {height:,} pixels; wanted at most {MAX_PIXELS:,}")
        if image.mode == "F" or (image.mode == "I" and image.format != "PPM"):
            raise ValueError("unsupported", f"pixels of mode {image.mode}: which value is white is not known")
        try:
            image.load()
            orientation = _orientation(image)
            rgb = _to_rgb(image)
        except MemoryError:
            raise
        except Exception as error:
            truncated = "truncated" in str(error) or isinstance(error, EOFError)
            raise ValueError("truncated" if truncated else "damaged", f"{type(error).__name__}: {error}") from None
    return to_square(rgb.transpose(Image.Transpose(TURNS[orientation])) if orientation in TURNS else rgb)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # PIL's reader raises what it likes; an image is not worse for a broken note about it
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    from PIL import Image

    if image.mode == "I" or image.mode.startswith("I;16"):  # "I" of a PGM: PIL scales it to 16 bits
        deep = image.convert("I")  # of 32 bits, the only one that `point` takes a table of 65,536 for
        grey = deep.point([(value * 255 + 32767) // 65535 for value in range(65536)], "L")
        clear = image.info.get("transparency")  # the one value that stands for transparent
        if isinstance(clear, int):
            grey.paste(255, mask=deep.point([255 * (value == clear) for value in range(65536)], "L"))
        return grey.convert("RGB")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(rgba, mask=rgba.getchannel("A"))
        return white
    return image.convert("RGB")


def sample_times(
    duration_s: float, fps: float, max_frames: int | None, start: float = 0.0, end: float | None = None
) -> Float64[np.ndarray, " n"]:
    """Times in seconds after the video's first frame at which to take frames, ascending, from `start` to before `end`.

    They are start + i / fps, as long as a millisecond of the video is left (where time stamps are rounded, that is
    nothing). Where these are more than `max_frames`, their first and last are kept and as many in between, all
    equally far apart: at the video's own rate this chooses the frames of the LWM release, floor(i (n - 1) / (m - 1)),
    except where that is within TOLERANCE of the next.
    There is always one. ValueError(reason, detail) where nothing of the video lies between start and end.
    """
    if not fps > 0 or not math.isfinite(fps) or (max_frames is not None and max_frames < 1):
        raise ValueError("bad sampling", f"fps {fps}, max_frames {max_frames}; wanted both above 0")
    end = duration_s if end is None else min(end, duration_s)
    if not (0 <= start < end or start == 0 == duration_s):
        raise ValueError("no such clip", f"{start:,.2f} to {end:,.2f} s of a video of {duration_s:,.2f} s")
    count = max(1, math.ceil((end - start - TOLERANCE) * fps))
    kept = count if max_frames is None else min(count, max_frames)
    if kept > MAX_VIDEO_FRAMES:
        raise ValueError("too long", f"{kept:,} frames at {fps:g} per second; wanted at most {MAX_VIDEO_FRAMES:,}")
    stride = (count - 1) / (kept - 1) if kept > 1 else 1.0  # in samples
    return start + np.arange(kept) * stride / fps


def decode_video(
    source: bytes | str | Path,
    *,
    fps: float,
    max_frames: int | None,
    start: float | None = None,
    end: float | None = None,
    decoder: Decoder = "pyav",
    min_size: int = 0,
) -> Iterator[UInt8[np.ndarray, "256 256 3"]]:
    """The frames of `source` (a file's bytes, or its local path) at sample_times, one after the other, read-only.

    Memory is a few frames, whatever the length. ValueError(reason, detail), maybe in the middle (then what came is to
    be thrown away): "not a video", "no video", "no frames", "no time stamps", "no such clip", "truncated", "damaged",
    "unreadable", "too long", and those of an image's size, "filtered: min_size" among them.
    """
    from PIL import Image

    clip = read_clip(source)
    times = sample_times(clip.duration_s, fps, max_frames, start or 0.0, end)
    last = square = None
    for rgb in READERS[decoder](source, clip, times):
        if square is None:
            check_size(rgb.shape[1], rgb.shape[0], min_size)
        if rgb is not last or square is None:
            last, square = rgb, to_square(Image.fromarray(rgb))
        yield square
