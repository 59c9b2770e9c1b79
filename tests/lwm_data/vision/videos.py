"""Small real videos whose every frame says its number, for tests.

frame 5 = binary 000101     +--+--+--+--+--+--+     six columns, white for 1; read back by their brightness
                            |  |  |  |##|  |##|     from a frame cut to its centre, since the columns are in it
                            +--+--+--+--+--+--+
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from jaxtyping import UInt8

TICK = Fraction(1, 1000)
BITS = 8


def numbered(number: int, width: int = 96, height: int = 64) -> UInt8[np.ndarray, "height width 3"]:
    """The picture of `number`; its bits lie in the central square."""
    picture = np.full((height, width, 3), 40, np.uint8)
    left, side = (width - min(width, height)) // 2, min(width, height) // BITS
    for bit in range(BITS):
        if number >> (BITS - 1 - bit) & 1:
            picture[:, left + bit * side : left + (bit + 1) * side] = 220
    return picture


def number_of(frame: UInt8[np.ndarray, "height width 3"]) -> int:
    """The number that a frame shows."""
    height, width = frame.shape[:2]
    left, side = (width - min(width, height)) // 2, min(width, height) / BITS
    columns = [int(left + (bit + 0.5) * side) for bit in range(BITS)]
    return sum(int(frame[height // 2, column].mean() > 130) << (BITS - 1 - bit) for bit, column in enumerate(columns))


def write_video(
    ticks: Sequence[int],
    *,
    form: str = "mp4",
    codec: str = "libx264",
    size: tuple[int, int] = (96, 64),
    rotation: int | None = None,
    codec_options: dict[str, str] | None = None,
    options: dict[str, str] | None = None,
) -> bytes:
    """A file of frames 0, 1, ... shown at `ticks` (ms)."""
    with tempfile.NamedTemporaryFile() as file:  # a path: `faststart` opens it twice
        _write(file.name, ticks, form, codec, size, rotation, codec_options or {}, options or {})
        return Path(file.name).read_bytes()


def _write(
    path: str,
    ticks: Sequence[int],
    form: str,
    codec: str,
    size: tuple[int, int],
    rotation: int | None,
    codec_options: dict[str, str],
    options: dict[str, str],
) -> None:
    with av.open(path, "w", format=form, options=options) as container:
        stream: Any = container.add_stream(codec, rate=30, options=codec_options)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = TICK
        if rotation is not None:
            stream.set_display_rotation(rotation)
        for number, tick in enumerate(ticks):
            frame = av.VideoFrame.from_ndarray(numbered(number, *size), format="rgb24")
            frame.pts, frame.time_base = tick, TICK
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if not ticks:
            container.start_encoding()


def write_audio(form: str = "mp4") -> bytes:
    """A file of silence without a picture."""
    file = io.BytesIO()
    with av.open(file, "w", format=form) as container:
        stream: Any = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()
